"""Writes the report of a sweep: figures, tables, interactive curves and provenance on one page.

`write_report` draws an experiment's figures for print and writes `report.html`, a single file that
opens from disk without a network. Its style sheet and script are files of this package, because
plotting libraries for web pages add a megabyte or more.
"""

import html
import importlib.resources
import json
import os
import re
import runpy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.runs import (
    describe,
    load_curves,
    load_layers,
    load_runs,
    primary_metrics,
    status,
    summarize,
    varying,
)
from resjax.disk import write_atomically
from resjax.run_files import read_json_object

POINTS = 300
"""The most measurements on the page for one split of one run; longer curves are thinned."""

NUMBER = re.compile(r"[-+.,e\d]+( ± [-+.,e\d]+)?|–|nan|")
"""Matches the text of a table's cell in a column of numbers."""

SPLITS = {"train": "training", "test": "test"}

Drawing = Callable[[pd.DataFrame, pd.DataFrame], dict[str, Figure]]


def write_report(
    path: str | os.PathLike[str], experiment: str | os.PathLike[str] | None = None
) -> Path:
    """Writes report.html, runs.csv and figures/ to `path`, and returns the path of the page.

    Args:
        path: A sweep folder, or any folder that contains runs.
        experiment: The experiment file, which describes and draws the runs; by default
            `path`/experiment.py or, without that file, curves of all settings.

    Raises:
        FileNotFoundError, ValueError: if `load_runs`, `load_curves` or `load_layers` raises them.
    """
    root = Path(path)
    runs = load_runs(root)
    curves, layers = load_curves(runs), load_layers(runs)
    title, claim, draw_figures = _load(root, experiment)
    table = runs.assign(folder=[os.path.relpath(folder, root) for folder in runs["folder"]])
    write_atomically(root / "runs.csv", table.to_csv(index=False))
    page = Template(_asset("report.html")).substitute(
        title=html.escape(title),
        claim="\n".join(f"<p>{html.escape(text)}</p>" for text in _paragraphs(claim)),
        status=html.escape(_status(root, runs)),
        style=_asset("report.css"),
        script=_asset("report.js"),
        figures=_figures(draw_figures(runs, curves), root),
        directions=html.escape(_directions(runs)),
        summary=_table(summary_columns(runs)),
        runs=_runs(table),
        layers=_layers(runs, layers, root),
        config=_config(runs),
        provenance=_provenance(root, runs),
        data=_data(runs, curves),
    )
    return write_atomically(root / "report.html", page)


@draw.style()
def overview(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws the curves of all settings in one panel for each primary metric."""
    if curves.empty:
        return {}
    series = runs[["folder"]].assign(panel="all runs", series=describe(runs, varying(runs)))
    curves = curves.merge(series, on="folder")
    metrics = primary_metrics(curves)
    return {
        "curves" if len(metrics) == 1 else f"{metric.name}_curves": draw.metric_curves(
            curves, metric.name, panel="panel", series="series"
        )
        for metric in metrics
    }


def _load(root: Path, experiment: str | os.PathLike[str] | None) -> tuple[str, str, Drawing]:
    """Returns an experiment's title and claim, from its docstring, and the function that draws."""
    source = Path(experiment) if experiment is not None else root / "experiment.py"
    if experiment is None and not source.exists():
        return root.resolve().name, "", overview
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such experiment file")
    # Run as a script, the file leaves no module and no bytecode behind.
    names = runpy.run_path(str(source), run_name="experiment")
    title, _, claim = (names.get("__doc__") or source.stem).strip().partition("\n")
    return title.rstrip("."), claim, names.get("figures", overview)


def _asset(name: str) -> str:
    return importlib.resources.files("resjax.analysis").joinpath(name).read_text("utf-8")


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _status(root: Path, runs: pd.DataFrame) -> str:
    counts = status(runs).value_counts()
    plan = root / "sweep.json"
    planned = len(read_json_object(plan)["runs"] if plan.exists() else runs)
    text = f"{int(runs['finished'].sum())} of {planned} runs finished"
    if counts.get("diverged"):
        text += f", {counts['diverged']} of them diverged"
    datasets = ", ".join(runs["data.name"].unique())
    starts = sorted(runs["start"].dropna())
    return " · ".join([text, datasets, *(f"started {start}" for start in starts[:1])])


def _directions(runs: pd.DataFrame) -> str:
    return "; ".join(
        f"{'lower' if metric.lower_is_better else 'higher'} {metric.name} is better"
        for metric in primary_metrics(runs)
    )


def _figures(figures: Mapping[str, Figure], root: Path) -> str:
    """Saves figures and returns them as HTML."""
    parts = []
    for name, figure in figures.items():
        files = {path.suffix[1:]: path for path in draw.save(figure, root / "figures" / name)}
        svg = files["svg"].read_text("utf-8")
        # All drawings of a page share one namespace of ids.
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
        # Hundredths of a point are finer than any screen and halve the size.
        svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
        svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(name)}"', 1)
        hrefs = {kind: html.escape(f"figures/{name}.{kind}") for kind in files}
        links = ", ".join(f'<a href="{href}">{kind.upper()}</a>' for kind, href in hrefs.items())
        caption = f"<figcaption>{html.escape(name.replace('_', ' '))} ({links})</figcaption>"
        parts.append(f'<figure><div class="print">{svg}</div>{caption}</figure>')
    return "\n".join(parts)


def _text(value: Any) -> str:
    return "" if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)


def _number(value: float, form: str = ",.0f") -> str:
    return "–" if pd.isna(value) else format(value, form)


def _table(columns: Mapping[str, Iterable[str]], *, sortable: bool = False) -> str:
    """Returns a table as HTML; columns of numbers are aligned to the right."""
    heads, cells = [], []
    for name, column in columns.items():
        texts, title = list(column), html.escape(name)
        kind = "number" if all(map(NUMBER.fullmatch, texts)) else ""
        button = f'<button type="button">{title}</button>' if sortable else title
        heads.append(f'<th scope="col" class="{kind}">{button}</th>')
        kinds = zip(texts, texts if name == "status" else [kind] * len(texts), strict=True)
        cells.append([f'<td class="{kind}">{html.escape(text)}</td>' for text, kind in kinds])
    head, *rows = (f"<tr>{''.join(row)}</tr>" for row in (heads, *zip(*cells, strict=True)))
    body = "\n".join(rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead>{head}</thead><tbody>\n'
        f"{body}\n</tbody></table></div>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    rows = (
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(text)}</td></tr>'
        for name, text in facts.items()
    )
    return "<table><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"


def summary_columns(runs: pd.DataFrame) -> dict[str, list[str]]:
    """Returns the table of `summarize` as text: the columns by their headings."""
    results = summarize(runs)
    columns: dict[str, Iterable[str]] = {name: map(_text, results[name]) for name in varying(runs)}
    columns["parameters"] = map(_number, results["parameters"])
    columns["seeds"] = map(str, results["seeds"])
    for metric in primary_metrics(runs):
        for split, title in SPLITS.items():
            name = f"{split}_{metric.name}"
            means, deviations = results[f"{name}_mean"], results[f"{name}_std"]
            columns[f"{title} {metric.label}"] = map(metric.format, means, deviations)
    for name in ("unfinished", "diverged"):
        if results[name].any():
            columns[name] = map(str, results[name])
    return {name: list(column) for name, column in columns.items()}


def _runs(runs: pd.DataFrame) -> str:
    columns: dict[str, Iterable[str]] = {"run": runs["folder"]}
    columns |= {name: map(_text, runs[name]) for name in (*varying(runs), "seed")}
    columns["status"] = status(runs)
    for metric in primary_metrics(runs):
        for name, title in (*SPLITS.items(), ("best_test", "best test")):
            columns[f"{title} {metric.label}"] = map(metric.format, runs[f"{name}_{metric.name}"])
    columns["at step"] = map(_number, runs["best_test_step"])
    columns["training loss"] = (_number(loss, ".4g") for loss in runs["train_loss"])
    columns["seconds"] = map(_number, runs["seconds"])
    columns["images/s"] = map(_number, runs["images_per_second"])
    columns["start"] = map(_text, runs["start"])
    return _table(columns, sortable=True)


@draw.style()
def _layers(runs: pd.DataFrame, layers: pd.DataFrame, root: Path) -> str:
    """Returns a section with one figure per diagnostic."""
    if layers.empty:
        return ""
    settings = runs[["folder"]].assign(setting=describe(runs, varying(runs)))
    figures = {}
    for name in layers.columns.drop(["folder", "step", "layer"]):
        measured = layers.merge(settings, on="folder").dropna(subset=name)
        if measured.empty:
            continue
        kernels = measured["layer"].str.endswith("/kernel")
        if kernels.any():  # beside them, biases and the scales of norms are another matter
            measured = measured[kernels]
        last = measured[measured["step"] == measured.groupby("folder")["step"].transform("max")]
        log = bool((last[name] > 0).all())
        figures[f"layers_{name}"] = draw.layer_profile(
            last, name, series="setting", log=log, width=draw.TEXT_WIDTH
        )
    return f"""<section id="layers">
<h2>Layers</h2>
<p>What diagnostics measured in each layer, at the last step with finite values. Of parameters,
kernels are drawn; layers.jsonl has the others too.</p>
{_figures(figures, root)}
</section>"""


def _config(runs: pd.DataFrame) -> str:
    shared = [str(n) for n in runs if "." in str(n) and runs[n].nunique(dropna=False) == 1]
    return _facts({name: str(runs[name].iloc[0]) for name in shared})


def _provenance(root: Path, runs: pd.DataFrame) -> str:
    plan, starts = root / "sweep.json", sorted(runs["start"].dropna())
    facts = {"sweep": str(read_json_object(plan).get("command", ""))} if plan.exists() else {}
    origins = pd.DataFrame([_origin(Path(folder) / "provenance.json") for folder in runs["folder"]])
    facts |= {str(name): "; ".join(origins[name].dropna().unique()) for name in origins}
    if starts:
        facts["first and last start"] = "; ".join(dict.fromkeys((starts[0], starts[-1])))
    return _facts(facts)


def _origin(file: Path) -> dict[str, str]:
    content = read_json_object(file) if file.exists() else {}
    devices, versions = content.get("devices"), content.get("versions")
    changed = ", with uncommitted changes" if content.get("dirty") else ""
    return {
        "commit": f"{content.get('commit') or 'unknown'}{changed}",
        **{name: str(content.get(name, "unknown")) for name in ("command", "python", "platform")},
        "devices": ", ".join(map(str, devices)) if isinstance(devices, list) else "unknown",
        "device kind": str(content.get("device_kind", "unknown")),
        **({name: str(v) for name, v in versions.items()} if isinstance(versions, dict) else {}),
    }


def _data(runs: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Returns the data of the interactive chart as JSON, with values as they are shown."""
    names = describe(runs, varying(runs))
    palette = draw.colors(names)
    groups = {name: index for index, name in enumerate(palette)}
    metrics = {metric.name: metric for metric in primary_metrics(runs)}
    steps: dict[tuple[int, ...], int] = {}
    records = []
    for folder, metric, name in zip(runs["folder"], runs["primary_metric"], names, strict=True):
        record = {"name": Path(folder).name, "group": groups[name], "metric": metric}
        for split in SPLITS:
            curve = curves[(curves["folder"] == folder) & (curves["split"] == split)]
            last, count = len(curve) - 1, min(len(curve), POINTS)
            chosen = curve.iloc[np.linspace(0, last, count).round().astype(int)]
            scaled = metrics[metric].scale * chosen[metric]
            # Runs of one sweep are measured at the same steps, which are stored once.
            index = steps.setdefault(tuple(chosen["step"].tolist()), len(steps))
            values = [float(f"{value:.5g}") if np.isfinite(value) else None for value in scaled]
            record[split] = {"steps": index, "values": values}
        records.append(record)
    content = {
        "groups": [{"name": name, "color": color} for name, color in palette.items()],
        "metrics": {name: metric.label for name, metric in metrics.items()},
        "steps": list(steps),
        "runs": records,
    }
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    # Inside a script element only "<" could end it; JSON has another way to write that character.
    return text.replace("<", "\\u003c")
