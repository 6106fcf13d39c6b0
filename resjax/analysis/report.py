"""A sweep's answer on one page: figures, tables, curves to explore, and where it all comes from.

`write_report` draws an experiment's figures for print and writes a report.html that is one file:
it opens from disk, anywhere, without a network, and can be sent to a colleague. Its style and
script stand beside this file; plotting libraries for pages weigh a megabyte and more.
"""

import html
import importlib.resources
import json
import os
import re
import runpy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.runs import (
    describe,
    load_curves,
    load_runs,
    read_json_object,
    status,
    summarize,
    varying,
)
from resjax.disk import write_atomically

POINTS = 300
"""Measurements that the page holds of one split of one run; longer curves are thinned."""

Drawing = Callable[[pd.DataFrame, pd.DataFrame], dict[str, Figure]]


def write_report(
    path: str | os.PathLike[str], experiment: str | os.PathLike[str] | None = None
) -> Path:
    """Writes `path`/report.html, `path`/runs.csv and `path`/figures/, and returns the page's path.

    Args:
        path: A sweep folder, or any folder with runs in or under it.
        experiment: The experiment file that says what the runs are about and draws them; by
            default `path`/experiment.py, or, without one, curves of every setting.

    Raises:
        FileNotFoundError, ValueError: if there are no runs to report, as `load_runs` says.
    """
    root = Path(path)
    runs = load_runs(root)
    curves = load_curves(runs)
    source = Path(experiment) if experiment is not None else root / "experiment.py"
    if experiment is None and not source.exists():
        question = Experiment(root.resolve().name, "", overview)
    else:
        question = _load(source)
    pictures = []
    for name, figure in question.figures(runs, curves).items():
        saved = draw.save(figure, root / "figures" / name)
        pictures.append(_figure(name, [file.relative_to(root) for file in saved], root))
    table = runs.assign(folder=[os.path.relpath(folder, root) for folder in runs["folder"]])
    write_atomically(root / "runs.csv", table.to_csv(index=False))
    page = Template(_asset("report.html")).substitute(
        title=html.escape(question.title),
        claim="\n".join(f"<p>{html.escape(text)}</p>" for text in _paragraphs(question.claim)),
        status=html.escape(_status(root, runs)),
        style=_asset("report.css"),
        script=_asset("report.js"),
        figures="\n".join(pictures),
        summary=_summary(runs),
        runs=_runs(table),
        config=_config(runs),
        provenance=_provenance(root, runs),
        data=_data(runs, curves),
    )
    return write_atomically(root / "report.html", page)


class Experiment(NamedTuple):
    """What the runs are about: the first line of a docstring, the rest of it, and the figures."""

    title: str
    claim: str
    figures: Drawing


@draw.style()
def overview(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws training and test error of every setting in one panel, for runs without a question."""
    if curves.empty:
        return {}
    series = runs[["folder"]].assign(panel="all runs", series=describe(runs, varying(runs)))
    joined = curves.merge(series, on="folder")
    return {"curves": draw.error_curves(joined, panel="panel", series="series")}


def _load(source: Path) -> Experiment:
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such experiment file")
    # As a script, not as a module: nothing is left behind beside it or among the modules.
    names = runpy.run_path(str(source), run_name="experiment")
    title, _, claim = (names.get("__doc__") or source.stem).strip().partition("\n")
    return Experiment(title.rstrip("."), claim, names.get("figures", overview))


def _asset(name: str) -> str:
    return importlib.resources.files("resjax.analysis").joinpath(name).read_text("utf-8")


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _status(root: Path, runs: pd.DataFrame) -> str:
    counts = status(runs).value_counts()
    planned = len(runs)
    if (root / "sweep.json").exists():
        planned = len(read_json_object(root / "sweep.json")["runs"])
    text = f"{int(runs['finished'].sum())} of {planned} runs finished"
    if counts.get("diverged"):
        text += f", {counts['diverged']} of them diverged"
    datasets = ", ".join(runs["data.name"].unique())
    starts = sorted(runs["start"].dropna())
    return " · ".join([text, datasets, *(f"started {start}" for start in starts[:1])])


def _figure(name: str, saved: Sequence[Path], root: Path) -> str:
    vector = next(root / file for file in saved if file.suffix == ".svg")
    svg = vector.read_text("utf-8")
    svg = svg[svg.index("<svg") :]
    # Several drawings share one page, and with it one name space of ids.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    # A hundredth of a point is finer than any screen, and half the size.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(name)}"', 1)
    links = ", ".join(
        f'<a href="{html.escape(file.as_posix())}">{html.escape(file.suffix[1:].upper())}</a>'
        for file in saved
    )
    caption = f"{html.escape(name.replace('_', ' '))} ({links})"
    return f'<figure><div class="print">{svg}</div><figcaption>{caption}</figcaption></figure>'


class Cell(NamedTuple):
    """A cell of a table: its text, and what it is sorted by (nothing: last)."""

    text: str
    value: Any
    kind: str = ""


def _words(value: Any) -> Cell:
    text = "" if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)
    numeric = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return Cell(text, text, "number" if numeric else "")


def _number(value: float, form: str = "{:,.0f}") -> Cell:
    if pd.isna(value):
        return Cell("–", "", "number")
    return Cell(form.format(value), value, "number")


def _spread(mean: float, deviation: float) -> Cell:
    if pd.isna(mean):
        return Cell("–", "", "number")
    text = f"{100 * mean:.2f}"
    return Cell(text if pd.isna(deviation) else f"{text} ± {100 * deviation:.2f}", mean, "number")


def _table(columns: Mapping[str, Iterable[Cell]], *, sortable: bool = False) -> str:
    table = {name: list(cells) for name, cells in columns.items()}
    heads = []
    for name, cells in table.items():
        kind = ' class="number"' if all(cell.kind == "number" for cell in cells) else ""
        text = html.escape(name)
        button = f'<button type="button">{text}</button>' if sortable else text
        heads.append(f'<th scope="col"{kind}>{button}</th>')
    rows = [
        "<tr>" + "".join(_cell(cell, sortable) for cell in row) + "</tr>"
        for row in zip(*table.values(), strict=True)
    ]
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{"".join(heads)}</tr></thead><tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _cell(cell: Cell, sortable: bool) -> str:
    kind = f' class="{cell.kind}"' if cell.kind else ""
    key = f' data-value="{html.escape(str(cell.value))}"' if sortable else ""
    return f"<td{kind}{key}>{html.escape(cell.text)}</td>"


def _facts(facts: Mapping[str, str]) -> str:
    rows = (
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(text)}</td></tr>'
        for name, text in facts.items()
    )
    return "<table><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"


def _summary(runs: pd.DataFrame) -> str:
    results = summarize(runs)
    columns: dict[str, Iterable[Cell]] = {
        name: map(_words, results[name]) for name in varying(runs)
    }
    columns["parameters"] = map(_number, results["parameters"])
    columns["seeds"] = map(_words, results["seeds"])
    for split, title in (("train", "training error"), ("test", "test error")):
        name = f"{split}_error"
        columns[title] = map(_spread, results[f"{name}_mean"], results[f"{name}_std"])
    for name in ("unfinished", "diverged"):
        if results[name].any():
            columns[name] = map(_words, results[name])
    return _table(columns)


def _runs(runs: pd.DataFrame) -> str:
    states = status(runs)
    columns: dict[str, Iterable[Cell]] = {"run": map(_words, runs["folder"])}
    columns |= {name: map(_words, runs[name]) for name in (*varying(runs), "seed")}
    columns["status"] = (Cell(state, state, state) for state in states)
    for name, title in (
        ("train_error", "training error"),
        ("test_error", "test error"),
        ("best_test_error", "best test error"),
    ):
        columns[title] = (_spread(error, np.nan) for error in runs[name])
    columns["at step"] = map(_number, runs["best_test_step"])
    columns["training loss"] = (_number(loss, "{:.4g}") for loss in runs["train_loss"])
    columns["seconds"] = map(_number, runs["seconds"])
    columns["images/s"] = map(_number, runs["images_per_second"])
    columns["start"] = map(_words, runs["start"])
    return _table(columns, sortable=True)


def _config(runs: pd.DataFrame) -> str:
    differing = varying(runs)
    shared = [str(name) for name in runs if "." in str(name) and name not in differing]
    return _facts({name: str(runs[name].iloc[0]) for name in shared})


def _provenance(root: Path, runs: pd.DataFrame) -> str:
    seen: dict[str, list[str]] = {}

    def note(name: str, text: str) -> None:
        if text not in seen.setdefault(name, []):
            seen[name].append(text)

    if (root / "sweep.json").exists():
        note("sweep", str(read_json_object(root / "sweep.json").get("command", "")))
    for folder in runs["folder"]:
        file = Path(folder) / "provenance.json"
        origin = read_json_object(file) if file.exists() else {}
        changed = ", with uncommitted changes" if origin.get("dirty") else ""
        note("commit", f"{origin.get('commit') or 'unknown'}{changed}")
        for name in ("command", "python", "platform"):
            note(name, str(origin.get(name, "unknown")))
        devices = origin.get("devices")
        listed = ", ".join(map(str, devices)) if isinstance(devices, list) else ""
        note("devices", listed or "unknown")
        note("device kind", str(origin.get("device_kind", "unknown")))
        versions = origin.get("versions")
        for package, version in versions.items() if isinstance(versions, dict) else ():
            note(package, str(version))
    starts = sorted(runs["start"].dropna())
    for start in starts[:1] + starts[-1:]:
        note("first and last start", str(start))
    return _facts({name: "; ".join(texts) for name, texts in seen.items()})


def _data(runs: pd.DataFrame, curves: pd.DataFrame) -> str:
    names = describe(runs, varying(runs))
    palette = draw.colors(names)
    order = {name: place for place, name in enumerate(palette)}
    steps: dict[tuple[int, ...], int] = {}
    records = []
    for folder, name in zip(runs["folder"], names, strict=True):
        record: dict[str, Any] = {"name": Path(folder).name, "group": order[name]}
        for split in ("train", "test"):
            curve = curves[(curves["folder"] == folder) & (curves["split"] == split)]
            chosen = curve.iloc[_thin(len(curve))]
            errors = [None if pd.isna(e) else round(100 * e, 3) for e in chosen["error"]]
            # Runs of one sweep are measured at the same steps, which need telling once.
            place = steps.setdefault(tuple(chosen["step"].tolist()), len(steps))
            record[split] = {"steps": place, "error": errors}
        records.append(record)
    groups = [{"name": name, "color": color} for name, color in palette.items()]
    content = {"groups": groups, "steps": list(steps), "runs": records}
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    # Inside a script element only "<" could end it, and JSON has this other way to write it.
    return text.replace("<", "\\u003c")


def _thin(count: int) -> list[int]:
    """Returns evenly spread places among `count`, the first and the last with them."""
    return np.linspace(0, count - 1, min(count, POINTS)).round().astype(int).tolist()
