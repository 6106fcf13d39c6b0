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
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.claims import EXPLANATION, Claim, tally
from resjax.analysis.experiment_figures import (
    Experiment,
    Tables,
    load_experiment,
    load_tables,
)
from resjax.analysis.profiles import profiles
from resjax.analysis.runs import (
    Warn,
    describe,
    is_inside,
    load_runs,
    primary_metrics,
    status,
    summarize,
    varying,
)
from resjax.analysis.statistics import differences as paired_tables
from resjax.analysis.statistics import intervals
from resjax.disk import report_disk_errors, write_atomically
from resjax.errors import UserError, one_line
from resjax.run_files import DamagedFileError, Metric, read_json_object
from resjax.text import csv_cell, user_path

POINTS = 300
"""The most measurements on the page for one split of one run; longer curves are thinned."""

NUMBER = re.compile(r"[-+.,e\d]+( ± [-+.,e\d]+)?|–|nan|")
"""Matches the text of a table's cell in a column of numbers."""

MOST_DIFFERENCES = 60
"""The most rows in the page's table of paired differences."""

SPLITS = {"train": "training", "train_set": "training-set", "test": "test"}

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class FiguresError(UserError):
    """An experiment's figures could not be drawn, or its claims not be judged.

    The report has the default figures, or no claims.
    """


def write_report(
    paths: Paths,
    experiment: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    warn: Warn = lambda _: None,
) -> Path:
    """Writes report.html, figures/ and tables, and returns the path of the page.

    The tables are runs.csv, results.csv (a mean with its intervals for each setting and metric),
    differences.csv (paired differences at equal seed) and claims.csv.

    Args:
        paths: A sweep folder, or any folder that contains runs, or several of them.
        experiment: The experiment file, which describes and draws the runs; by default the one
            that `find_experiment` finds or, without it, curves of all settings.
        out: The folder to write to; by default that of `default_out`.
        warn: Called with what is left out because its files are damaged; the page says it too.

    Raises:
        FileNotFoundError, ValueError: if `load_runs`, `load_curves` or `load_layers` raises them.
        FiguresError: if the experiment cannot draw its figures or judge its claims; the report is
            written nevertheless.
    """
    roots, left_out = _roots(paths), list[str]()
    root = default_out(roots) if out is None else Path(out)
    runs = load_runs(*roots, warn=left_out.append)
    source = find_experiment(roots) if experiment is None else Path(experiment)
    tables = load_tables(runs, source, left_out.append)
    table = runs.assign(folder=[os.path.relpath(folder, root) for folder in runs["folder"]])
    with report_disk_errors(root, "mend that, or add --out=DIR to write elsewhere"):
        root.mkdir(parents=True, exist_ok=True)
        described, figures, failure = _draw(source, root, roots, tables, left_out.append)
        claims, fault = _judge(described, tables)
        if fault and failure is None:
            failure = FiguresError(f"{fault}; {_advice(source, roots)}")
        for problem in left_out:
            warn(problem)
        differences = paired_tables(runs)
        page = Template(_asset("report.html")).substitute(
            title=html.escape(described.title),
            kind=_kind(described),
            claim=_prose(described.claim),
            measured=html.escape(_measured(runs, claims)),
            claims=_claims(claims),
            training_metric=training_metric(runs),
            status=html.escape(_status(roots, runs)),
            left_out="\n".join(f"<p>Left out: {html.escape(text)}</p>" for text in left_out),
            style=_asset("report.css"),
            script=_asset("report.js"),
            figures=figures,
            directions=html.escape(_directions(runs)),
            summary=_table(summary_columns(runs)),
            differences=_differences(differences, primary_metrics(runs)),
            runs=_runs(table),
            layers=_layers(runs, tables.layers, root),
            config=_config(runs),
            provenance=_provenance(roots, runs),
            data=_data(runs, tables.curves),
        )
        _write_table(root / "runs.csv", table)
        _write_claims(root / "claims.csv", claims)
        _write_table(root / "results.csv", intervals(runs))
        _write_table(root / "differences.csv", differences)
        path = write_atomically(root / "report.html", page)
    if failure:
        raise failure
    if experiment is not None:
        with suppress(OSError):  # the folders may be read-only
            _refresh_copies(roots, Path(experiment))
    return path


def default_out(paths: Paths) -> Path:
    """Returns the folder of a report: that of the runs or, of several, their common parent."""
    roots = _roots(paths)
    return roots[0] if len(roots) == 1 else Path(os.path.commonpath([r.absolute() for r in roots]))


def find_experiment(paths: Paths) -> Path | None:
    """Returns the copy of the experiment in the sweep folders, if all of them have the same."""
    copies = [root / "experiment.py" for root in _roots(paths)]
    inside = [copy.is_file() and is_inside(copy, copy.parent) for copy in copies]
    same = all(inside) and len({copy.read_bytes() for copy in copies}) == 1
    return copies[0] if same else None


def _roots(paths: Paths) -> list[Path]:
    return list(map(user_path, [paths] if isinstance(paths, str | os.PathLike) else paths))


def _draw(
    file: Path | None, root: Path, roots: list[Path], tables: Tables, warn: Warn
) -> tuple[Experiment, str, FiguresError | None]:
    """Returns the experiment, its figures or the default ones as HTML, and why its own failed."""
    fault, described = "", Experiment(Path(), root.resolve().name, "")
    try:
        if file is not None:
            described = load_experiment(file)
        if described.measure is not None:
            _warn_of_unmeasured(described, tables, warn)
        if described.draw is not None and not described.lacks_measurements(tables):
            return described, _figures(described.figures(tables), root), None
    except UserError as error:
        fault = str(error)
    except OSError:  # of the disk
        raise
    except Exception as error:
        fault = f"{file}: a figure cannot be drawn: {one_line(error)}"
    failure = FiguresError(f"{fault}; {_advice(file, roots)}") if fault else None
    return described, _figures(overview(tables.runs, tables.curves), root), failure


def _judge(experiment: Experiment, tables: Tables) -> tuple[list[Claim], str]:
    """Returns the experiment's claims, and why they could not be judged or ""."""
    if experiment.lacks_measurements(tables):
        return [], ""
    try:
        return experiment.claims(tables), ""
    except UserError as error:
        return [], str(error)


def _claims(claims: Sequence[Claim]) -> str:
    """Returns a section with the table of claims; "" without claims."""
    if not claims:
        return ""
    columns = {
        "claim": [claim.statement for claim in claims],
        "verdict": [claim.verdict for claim in claims],
        "measured here": [claim.measured for claim in claims],
        "published": [claim.published for claim in claims],
        "source": [claim.source for claim in claims],
    }
    return f"""<section id="claims">
<h2>Claims</h2>
<p>{html.escape(EXPLANATION)} A verdict holds for the data and the recipe of these runs.</p>
{_table(columns)}
</section>"""


def read_claims(root: Path) -> list[Claim]:
    """Returns the claims in the report of a folder."""
    path = root / "claims.csv"
    if not path.exists():
        return []
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    return [Claim(*row) for row in rows.itertuples(index=False, name=None)]


def _write_table(path: Path, table: pd.DataFrame) -> None:
    cells: pd.DataFrame = table.map(lambda cell: csv_cell(cell) if isinstance(cell, str) else cell)
    write_atomically(path, cells.rename(columns=csv_cell).to_csv(index=False))


def _write_claims(path: Path, claims: Sequence[Claim]) -> None:
    """Writes the claims as a table, or removes an earlier one if there are none."""
    if not claims:
        path.unlink(missing_ok=True)
        return
    _write_table(path, pd.DataFrame(claims, columns=Claim._fields))


def _warn_of_unmeasured(experiment: Experiment, tables: Tables, warn: Warn) -> None:
    """Warns of finished runs that the experiment has not measured."""
    ended = tables.runs[tables.runs["finished"] & ~tables.runs["diverged"]]
    missing = ~ended["folder"].isin(tables.measurements["folder"])
    if missing.any():
        default = "; the figures are the default ones" * experiment.lacks_measurements(tables)
        warn(
            f"measurements of {missing.sum()} of {len(ended)} finished runs, which measure() of "
            f"{experiment.file} has not seen; `resjax sweep` with the same options measures them"
            f"{default}"
        )


def _advice(file: Path | None, roots: list[Path]) -> str:
    """Returns what to type after an experiment's figures failed."""
    original = next((source for root in roots if (source := _plan(root).get("file"))), file)
    folders = shlex.join(map(str, roots))
    return (
        f"the runs are kept, and the report was written without them. Fix {original}, then type: "
        f"resjax report {folders} --experiment={shlex.quote(str(original))}"
    )


def _refresh_copies(roots: list[Path], experiment: Path) -> None:
    """Replaces the copies of an experiment in sweep folders by its corrected file."""
    for root in roots:
        copy = root / "experiment.py"
        if copy.is_file() and _plan(root).get("experiment") == experiment.stem:
            write_atomically(copy, experiment.read_bytes())


def _plan(root: Path) -> dict[str, Any]:
    """Returns the content of a folder's sweep.json; {} without a readable one."""
    file = root / "sweep.json"
    with suppress(DamagedFileError, OSError):
        return read_json_object(file) if is_inside(file, root) else {}
    return {}


@draw.style()
def overview(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws the curves of all settings in one panel for each primary metric."""
    if curves.empty:
        return {}
    series = runs[["folder"]].copy()
    series["(panel)"] = "all runs"  # no metric has such a name
    series["(series)"] = describe(runs, varying(runs))
    curves = curves.merge(series, on="folder")
    metrics = primary_metrics(curves)
    return {
        "curves" if len(metrics) == 1 else f"{metric.name}_curves": draw.metric_curves(
            curves, metric.name, panel="(panel)", series="(series)"
        )
        for metric in metrics
    }


def _asset(name: str) -> str:
    return importlib.resources.files("resjax.analysis").joinpath(name).read_text("utf-8")


def _prose(text: str) -> str:
    """Returns a docstring as HTML; backticks mark code, and indented paragraphs are commands."""
    blocks = []
    for paragraph in re.split(r"\n\s*\n", html.escape(text.strip("\n"))):
        if paragraph.startswith("    "):
            blocks.append(f"<pre><code>{textwrap.dedent(paragraph).rstrip()}</code></pre>")
        else:
            marked = re.sub("`([^`]+)`", r"<code>\1</code>", " ".join(paragraph.split()))
            blocks.append(f"<p>{marked}</p>")
    return "\n".join(blocks)


def _kind(experiment: Experiment) -> str:
    """Returns "Claim: " or "Question: " for an experiment's title; "" for a folder's name."""
    if experiment.file == Path():
        return ""
    return f"<small>{'Question' if experiment.title.endswith('?') else 'Claim'}:</small> "


def _measured(runs: pd.DataFrame, claims: Sequence[Claim]) -> str:
    """Returns how many claims agree, then the range of each metric and the settings at its ends."""
    verdicts = f"{tally(claims)}. Over all settings, " if claims else ""
    return f"{verdicts}{_range(runs)}"


def _range(runs: pd.DataFrame) -> str:
    results = summarize(runs)
    results = results[results["seeds"] > 0]
    if results.empty:
        return "nothing yet, because no run has finished."
    names = describe(results, varying(runs))
    parts = []
    for metric in primary_metrics(runs):
        for split, title in _splits(runs, metric).items():
            mean = f"{split}_{metric.name}_mean"
            rows = results.assign(name=names).dropna(subset=mean).sort_values(mean)
            ends = [
                f"{metric.format(row[mean], row[f'{split}_{metric.name}_std'])} ({row['name']})"
                for _, row in rows.iloc[[0, -1][: len(rows)]].iterrows()
            ]
            parts.append(f"{title} {metric.label} {' to '.join(ends) or '–'}")
    return "; ".join(parts) + "."


def _splits(runs: pd.DataFrame, metric: Metric) -> dict[str, str]:
    """Returns the titles of train and test, and of train_set if some run has the metric on it."""
    measured = f"train_set_{metric.name}" in runs and runs[f"train_set_{metric.name}"].notna().any()
    return {name: title for name, title in SPLITS.items() if measured or name != "train_set"}


def training_metric(runs: pd.DataFrame) -> str:
    """Returns a sentence that explains the training metric, and that of the training set."""
    every = set(runs["train.log_every"].dropna() if "train.log_every" in runs else ())
    steps = f"{every.pop():.0f}" if len(every) == 1 else "train.log_every"
    text = (
        f"The training metric is the mean over the last {steps} steps, in training mode and on "
        "images as the config augments them."
    )
    if any("train_set" in _splits(runs, metric) for metric in primary_metrics(runs)):
        text += (
            " The training-set metric is that of the whole training split after the last step, in "
            "evaluation mode and without augmentation."
        )
    return text


def _status(roots: list[Path], runs: pd.DataFrame) -> str:
    diverged, finished = runs["diverged"], runs["finished"]
    listed = [_plan(root).get("runs") for root in roots]
    planned = max(sum(len(each) for each in listed if isinstance(each, list)), len(runs))
    text = f"{finished.sum()} of {planned} runs finished"
    if to_the_end := (finished & diverged).sum():
        text += f", {to_the_end} of them diverged"
    if before := (~finished & diverged).sum():
        text += f", {before} diverged before the end"
    if moved := runs["device_changes"].notna().sum():
        text += f", {moved} went on on other devices"
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
        title = f"{name.replace('_', ' ')}: {draw.caption(figure)}".removesuffix(": ")
        caption = f"<figcaption>{html.escape(title)} ({links})</figcaption>"
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
        of_value = name in ("status", "verdict")  # which the style sheet knows
        kinds = zip(texts, texts if of_value else [kind] * len(texts), strict=True)
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
        for split, title in _splits(runs, metric).items():
            name = f"{split}_{metric.name}"
            means, deviations = results[f"{name}_mean"], results[f"{name}_std"]
            columns[f"{title} {metric.label}"] = map(metric.format, means, deviations)
    for name in ("unfinished", "diverged"):
        if results[name].any():
            columns[name] = map(str, results[name])
    return {name: list(column) for name, column in columns.items()}


def _differences(rows: pd.DataFrame, metrics: Sequence[Metric]) -> str:
    """Returns a section with paired differences of the test metrics; "" without any."""
    by_column = {f"test_{metric.name}": metric for metric in metrics}
    if rows.empty or (shown := rows[rows["metric"].isin(by_column) & (rows["seeds"] > 0)]).empty:
        return ""
    units = [by_column[name] for name in shown["metric"]]
    ends = {
        kind: [
            f"{unit.format(low)} to {unit.format(high)}" if np.isfinite([low, high]).all() else "–"
            for unit, low, high in zip(
                units, shown[f"{kind}_low"], shown[f"{kind}_high"], strict=True
            )
        ]
        for kind in ("t", "bootstrap")
    }
    columns: dict[str, Iterable[str]] = {
        "field": shown["field"],
        "value": map(_text, shown["value"]),
        "compared with": map(_text, shown["baseline"]),
        "at": shown["at"],
        "difference of the test metric": [
            f"{unit.label} {unit.format(mean, deviation)}"
            for unit, mean, deviation in zip(units, shown["mean"], shown["deviation"], strict=True)
        ],
        "95 %, Student's t": ends["t"],
        "95 %, bootstrap": ends["bootstrap"],
        "seeds": map(_number, shown["seeds"]),
    }
    columns = {name: list(column)[:MOST_DIFFERENCES] for name, column in columns.items()}
    more = f"The first {MOST_DIFFERENCES} of {len(shown)} are shown. " * (
        len(shown) > MOST_DIFFERENCES
    )
    return f"""<section id="differences">
<h2>Paired differences</h2>
<p>Each value of a field is compared with the first one, at equal seed and equal other fields,
except those that change with it: mean ± sample standard deviation over seeds, and intervals of the
mean. With three seeds the bootstrap interval is their range. Pairs with a diverged run have no
difference.
{more}differences.csv has the training metrics too.</p>
{_table(columns)}
</section>"""


def _runs(runs: pd.DataFrame) -> str:
    columns: dict[str, Iterable[str]] = {"run": runs["folder"]}
    columns |= {name: map(_text, runs[name]) for name in (*varying(runs), "seed") if name in runs}
    columns["status"] = status(runs)
    if runs["diverged"].any():
        columns["diverged at step"] = map(_number, runs["diverged_step"])
        columns["reason"] = map(_text, runs["diverged_reason"])
    for metric in primary_metrics(runs):
        for name, title in (*_splits(runs, metric).items(), ("best_test", "best test")):
            columns[f"{title} {metric.label}"] = map(metric.format, runs[f"{name}_{metric.name}"])
    columns["at step"] = map(_number, runs["best_test_step"])
    columns["training loss"] = (_number(loss, ".4g") for loss in runs["train_loss"])
    columns["seconds"] = map(_number, runs["seconds"])
    columns["images/s"] = map(_number, runs["images_per_second"])
    columns["start"] = map(_text, runs["start"])
    return _table(columns, sortable=True)


@draw.style()
def _layers(runs: pd.DataFrame, layers: pd.DataFrame, root: Path) -> str:
    """Returns a section with the figures of each diagnostic, by layer and by step."""
    if layers.empty:
        return ""
    settings = runs[["folder"]].assign(setting=describe(runs, varying(runs)))
    figures: dict[str, Figure] = {}
    for name in layers.columns.drop(["folder", "step", "layer"]):
        measured = layers.merge(settings, on="folder").dropna(subset=name)
        if measured.empty:
            continue
        kernels = measured["layer"].str.endswith("/kernel")
        if kernels.any():  # beside them, biases and the scales of norms are another matter
            measured = measured[kernels]
        last = measured[measured["step"] == measured.groupby("folder")["step"].transform("max")]
        sizes = measured.loc[measured[name] > 0, name]  # a gradient that is 0 has no logarithm
        log = bool((measured[name] >= 0).all()) and sizes.max() > 10 * sizes.min()
        figures[f"layers_{name}"] = draw.layer_profile(
            last, name, series="setting", log=log, width=draw.TEXT_WIDTH
        )
        if measured["step"].nunique() > 1:
            figures[f"steps_{name}"] = _by_step(measured, name, log)
    return f"""<section id="layers">
<h2>Layers</h2>
<p>Each diagnostic is drawn by layer, at the last step with finite values, and by step, as the mean
over the layers of each part of the network. Among parameters, only kernels are drawn; layers.jsonl
has all of them.</p>
{_figures(figures, root)}
</section>"""


def _by_step(measured: pd.DataFrame, name: str, log: bool) -> Figure:
    """Draws a diagnostic against the step, in a panel for each part: stem, stages and head."""
    part = measured["layer"].str.partition("/")[0]
    # The activation after the last norm of a pre-activation network stands beside that norm.
    table = measured.assign(panel=part.replace("relu_0", "norm"), series=measured["setting"])
    keys = ["folder", "panel", "series", "step"]
    means = table.groupby(keys, sort=False)[name].mean().rename("value").reset_index()
    means = means.rename(columns={"step": "x"})
    ylabel = draw.plain(name.replace("_", " "))
    return profiles(means, xlabel="training steps", ylabel=ylabel, log=log)


def _config(runs: pd.DataFrame) -> str:
    shared = [str(n) for n in runs if "." in str(n) and runs[n].nunique(dropna=False) == 1]
    return _facts({name: str(runs[name].iloc[0]) for name in shared})


def _provenance(roots: list[Path], runs: pd.DataFrame) -> str:
    starts = sorted(runs["start"].dropna())
    commands = [str(plan.get("command", "")) for plan in map(_plan, roots) if plan]
    facts = {"sweep": "; ".join(commands)} if commands else {}
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
        for split in ("train", "test"):
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
