"""Writes the report of a sweep: figures, tables, interactive curves and provenance on one page.

`write_report` draws an experiment's figures for print and writes `report.html`, a single file that
opens from disk without a network. Its style sheet and script are files of this package, because
plotting libraries for web pages add a megabyte or more. `inline_svg` draws the figures of the page,
`chart_data` collects what its interactive chart shows.
"""

import base64
import html
import importlib.resources
import os
import re
import textwrap
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.chart_data import SPLITS, chart_data, to_json
from resjax.analysis.claims import EXPLANATION, Claim, tally
from resjax.analysis.experiment_figures import Experiment, Tables, load_experiment
from resjax.analysis.inline_svg import dark_colors, drawings
from resjax.analysis.latex import results_table
from resjax.analysis.lines import divide, extend
from resjax.analysis.parts import (
    NO_FIELD,
    FiguresError,
    Part,
    advice,
    differing_settings,
    failed_before_start,
    judge,
    load_parts,
    read_sweep_json,
    refresh_copies,
    unstarted,
    warn_of_unmeasured,
)
from resjax.analysis.runs import (
    Sweeps,
    Warn,
    is_inside,
    load_sweeps,
    primary_metrics,
    status,
    summarize,
    varying,
)
from resjax.analysis.setting_names import join_values
from resjax.analysis.statistics import differences as paired_tables
from resjax.analysis.statistics import intervals
from resjax.disk import report_disk_errors, write_atomically
from resjax.errors import UserError, one_line
from resjax.run_files import Metric, find_error, read_json_object
from resjax.text import csv_cell, user_path

MOST_ROWS = 500
"""The most rows of the page's tables of settings and of runs."""

NUMBER = re.compile(r"[-+.,e\d]+( ± [-+.,e\d]+)?|–|nan|")
"""Matches the text of a table's cell in a column of numbers."""

MOST_NAMES = 4
"""The most sweeps that the title of a report names."""

MOST_PREDICTIONS = 8
"""The most settings whose predictions the page shows."""

MOST_DIFFERENCES = 60
"""The most rows in the page's table of paired differences."""

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def write_report(
    paths: Paths,
    experiment: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    warn: Warn = lambda _: None,
    *,
    announce: Callable[[Path], object] = lambda _: None,
    bold_best: bool = False,
) -> Path:
    """Writes report.html, figures/ and tables, and returns the path of the page.

    The tables are runs.csv, results.csv (a mean with its intervals for each setting and metric),
    results.tex (the primary metrics for a paper), differences.csv (paired differences at equal
    seed), claims.csv and, of several sweeps, settings.csv (the fields in which they differ).

    Several sweeps have common tables, in which a run of two sweeps has one row. Each sweep has its
    own figures and claims, unless one experiment draws all of them: that of `experiment`, or the
    one that all have if at most one field differs only between the sweeps.

    Args:
        paths: A sweep folder, or any folder that contains runs, or several of them.
        experiment: The experiment file, which describes and draws the runs; by default the one
            that `find_experiment` finds or, without it, curves of all settings.
        out: The folder to write to; by default that of `default_out`.
        warn: Called with a line for each run that is left out, because a file is damaged or
            another sweep has the same run; the page has these lines too.
        announce: Called with each experiment file before it is executed.
        bold_best: Whether the best mean of each column is bold in results.tex.

    Raises:
        FileNotFoundError, ValueError: if `load_runs`, `load_curves` or `load_layers` raises them.
        FiguresError: if an experiment cannot draw its figures or judge its claims; the report is
            written nevertheless.
    """
    roots, left_out = _roots(paths), list[str]()
    root = default_out(roots) if out is None else Path(out)
    sweeps = load_sweeps(*roots, warn=left_out.append)
    runs = sweeps.runs
    parts = load_parts(sweeps, roots, Path(experiment) if experiment else None, left_out.append)
    table = runs.assign(folder=[os.path.relpath(folder, root) for folder in runs["folder"]])
    with report_disk_errors(root, "mend that, or add --out=DIR to write elsewhere"):
        root.mkdir(parents=True, exist_ok=True)
        drawn = [_draw(part, root, announce, left_out.append) for part in parts]
        claims = [
            (part.name, claim)
            for part, each in zip(parts, drawn, strict=True)
            for claim in each.claims
        ]
        for problem in left_out:
            warn(problem)
        lines = _lines(runs, drawn)
        differences = paired_tables(runs)
        settings = differing_settings(sweeps)
        described = drawn[0].described if len(parts) == 1 and parts[0].file else None
        body = Template(_asset("report.html")).substitute(
            title=html.escape(described.title if described else _names(sweeps, root)),
            kind=_kind(described) if described else "",
            claim=_prose(described.claim) if described else "",
            measured=html.escape(_measured(runs, lines["name"], [claim for _, claim in claims])),
            sweeps=_sweeps(sweeps, settings, parts, drawn, root),
            claims=_claims(parts, drawn),
            training_metric=training_metric(runs),
            status=html.escape(_status(sweeps, runs)),
            left_out="\n".join(f"<p>Left out: {html.escape(text)}</p>" for text in left_out),
            failures=_failures(sweeps, runs, lines["name"]),
            script=_asset("report.js"),
            figures=_titled(parts, [each.html for each in drawn]),
            directions=html.escape(_directions(runs)),
            summary=_summary(runs, lines["name"]),
            downloads=_downloads(claims, settings),
            differences=_differences(differences, runs),
            runs=_runs(table, lines["name"]),
            layers=_layers(parts, drawn, root),
            predictions=_predictions(runs, lines["name"]),
            config=_config(runs),
            provenance=_provenance(sweeps, runs),
            data=to_json(_chart_data(runs, parts, lines)),
            style="$style",
        )
        # The dark theme replaces the colors that the page has.
        style = Template(_asset("report.css")).substitute(colors=dark_colors(body, lines["color"]))
        page = body.replace("$style", style, 1)
        _write_table(root / "runs.csv", table)
        _write_claims(root / "claims.csv", claims)
        _write_or_remove(root / "settings.csv", settings)
        _write_table(root / "results.csv", intervals(runs))
        latex = results_table(runs, _names(sweeps, root), bold_best=bold_best)
        write_atomically(root / "results.tex", latex)
        _write_table(root / "differences.csv", differences)
        path = write_atomically(root / "report.html", page)
    if failures := [each.failure for each in drawn if each.failure]:
        raise FiguresError("; ".join(failures))
    if experiment is not None:
        with suppress(OSError):  # the folders may be read-only
            refresh_copies(roots, Path(experiment))
    return path


def default_out(paths: Paths) -> Path:
    """Returns the folder of a report: that of the runs or, of several, their common parent."""
    roots = _roots(paths)
    return roots[0] if len(roots) == 1 else Path(os.path.commonpath([r.absolute() for r in roots]))


def _roots(paths: Paths) -> list[Path]:
    """Returns the paths, each folder once."""
    listed = [paths] if isinstance(paths, str | os.PathLike) else paths
    unique: dict[Path, Path] = {}
    for path in map(user_path, listed):
        unique.setdefault(path.resolve(), path)
    return list(unique.values())


def _names(sweeps: Sweeps, root: Path) -> str:
    """Returns the names of several sweeps, or their number, or the name of a report's folder."""
    if len(sweeps.by_name) > MOST_NAMES:
        return f"{len(sweeps.by_name)} sweeps in {root.resolve().name}"
    *first, last = sweeps.by_name or [""]
    return f"{', '.join(first)} and {last}" if first else root.resolve().name


class Drawn(NamedTuple):
    """A part of a report with its figures, also as HTML, its claims, and its failure or ""."""

    described: Experiment
    figures: Mapping[str, Figure]
    html: str
    claims: list[Claim]
    failure: str


def _draw(part: Part, root: Path, announce: Callable[[Path], object], warn: Warn) -> Drawn:
    """Draws the figures of a part's experiment, or the default ones, and judges its claims."""
    file, tables = part.file, part.tables
    fault, described = "", Experiment(Path(), "", "")
    figures: Mapping[str, Figure] = {}
    shown: str | None = None
    try:
        if file is not None:
            announce(file)
            described = load_experiment(file)
        if described.measure is not None:
            warn_of_unmeasured(described, tables, warn)
        if described.draw is not None and not described.lacks_measurements(tables):
            figures = described.figures(tables)
            shown = _figures(figures, root, part.slug)
    except UserError as error:
        fault = str(error)
    except OSError:  # of the disk
        raise
    except Exception as error:
        fault = f"{file}: a figure cannot be drawn: {one_line(error)}"
    if shown is None:
        figures = overview(tables.runs, tables.curves)
        shown = _figures(figures, root, part.slug)
    claims, fault_of_claims = judge(described, tables)
    fault = fault or fault_of_claims
    failure = f"{fault}; {advice(file, part.roots)}" if fault else ""
    return Drawn(described, figures, shown, claims, failure)


def _lines(runs: pd.DataFrame, drawn: Sequence[Drawn]) -> pd.DataFrame:
    """Returns the panel and the line of each run: those of the figure with curves, if there is one.

    See `lines.divide` for the columns. The index is that of the runs.
    """
    figures = drawn[0].figures.values() if len(drawn) == 1 else ()
    curves = filter(lambda lines: lines is not None, map(draw.lines, figures))
    of_figure = next(curves, None)
    extended = None if of_figure is None else extend(of_figure, runs)
    found = divide(runs) if extended is None else extended
    return found.set_axis(runs.index)


def _chart_data(runs: pd.DataFrame, parts: Sequence[Part], lines: pd.DataFrame) -> dict[str, Any]:
    curves = pd.concat([part.tables.curves for part in parts]).drop_duplicates(
        ["folder", "split", "step"]
    )
    layers = pd.concat([part.tables.layers for part in parts]).drop_duplicates(
        ["folder", "layer", "step"]
    )
    kept = lines["folder"]
    return chart_data(
        runs, curves[curves["folder"].isin(kept)], layers[layers["folder"].isin(kept)], lines
    )


def _titled(parts: Sequence[Part], contents: Sequence[str]) -> str:
    """Returns contents of parts below the names of their sweeps, if there are several."""
    if len(parts) == 1:
        return contents[0]
    titled = zip(parts, contents, strict=True)
    return "\n".join(f"<h3>{html.escape(part.name)}</h3>\n{text}" for part, text in titled if text)


def _sweeps(
    sweeps: Sweeps,
    settings: pd.DataFrame,
    parts: Sequence[Part],
    drawn: Sequence[Drawn],
    root: Path,
) -> str:
    """Returns a section with the sweeps of a report and their settings; "" for only one."""
    if len(sweeps.by_name) < 2:
        return ""
    titles = {
        part.name: each.described.title
        for part, each in zip(parts, drawn, strict=True)
        if part.file
    }
    items = []
    for name, sweep in sweeps.by_name.items():
        text, page = f"<b>{html.escape(name)}</b>", sweep.folder / "report.html"
        if page.exists() and sweep.folder != root.resolve():
            href = html.escape(urllib.parse.quote(os.path.relpath(page, root.resolve())))
            text = f'<a href="{href}">{html.escape(name)}</a>'
        title = f": {html.escape(titles[name])}" if name in titles else ""
        status = html.escape(_status(Sweeps(sweep.runs, {name: sweep}), sweep.runs))
        items.append(f'<li>{text}{title}<br><span class="status">{status}</span></li>')
    listed = "\n".join(items)
    columns = {str(name): list(map(str, settings[name])) for name in settings}
    shown = (
        f"<p>The sweeps differ in these settings; “{NO_FIELD}” stands for a field that is not set "
        f"or that a config does not have.</p>\n{_table(columns)}"
        if len(settings)
        else "<p>The configs of the sweeps do not differ.</p>"
    )
    return f"""<section id="sweeps">
<h2>Sweeps</h2>
<ul>
{listed}
</ul>
{shown}
</section>"""


def _claims(parts: Sequence[Part], drawn: Sequence[Drawn]) -> str:
    """Returns a section with the claims of each part in a table; "" without claims."""
    tables = [_claims_table(each.claims) if each.claims else "" for each in drawn]
    if not any(tables):
        return ""
    return f"""<section id="claims">
<h2>Claims</h2>
<p>{html.escape(EXPLANATION)} A verdict holds for the data and the recipe of these runs.</p>
{_titled(parts, tables)}
</section>"""


def _claims_table(claims: Sequence[Claim]) -> str:
    return _table(
        head="claim",
        cards=True,
        columns={
            "claim": [claim.statement for claim in claims],
            "verdict": [claim.verdict for claim in claims],
            "measured here": [claim.measured for claim in claims],
            "published": [claim.published for claim in claims],
            "source": [claim.source for claim in claims],
        },
    )


def read_claims(root: Path) -> list[tuple[str, Claim]]:
    """Returns the claims in the report of a folder, with their sweeps or "" if it has only one."""
    path = root / "claims.csv"
    if not path.exists():
        return []
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    sweeps = rows.pop("sweep") if "sweep" in rows else [""] * len(rows)
    claims = (Claim(*row) for row in rows.itertuples(index=False, name=None))
    return list(zip(sweeps, claims, strict=True))


def _write_table(path: Path, table: pd.DataFrame) -> None:
    cells: pd.DataFrame = table.map(lambda cell: csv_cell(cell) if isinstance(cell, str) else cell)
    write_atomically(path, cells.rename(columns=csv_cell).to_csv(index=False))


def _write_or_remove(path: Path, table: pd.DataFrame) -> None:
    """Writes a table, or removes an earlier one if this one has no rows."""
    if table.empty:
        path.unlink(missing_ok=True)
    else:
        _write_table(path, table)


def _write_claims(path: Path, claims: Sequence[tuple[str, Claim]]) -> None:
    table = pd.DataFrame([claim for _, claim in claims], columns=Claim._fields)
    if claims and claims[0][0]:
        table.insert(0, "sweep", [sweep for sweep, _ in claims])
    _write_or_remove(path, table)


@draw.style()
def overview(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws the curves of all settings, with the panels and lines of the interactive chart."""
    if curves.empty:
        return {}
    lines = divide(runs)[["folder", "panel", "label"]]
    # No metric has such names.
    lines = lines.rename(columns={"panel": "(panel)", "label": "(series)"})
    curves = curves.merge(lines, on="folder")
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
    """Returns a docstring as HTML, folded after its first paragraph.

    Backticks mark code, and indented paragraphs are commands.
    """
    blocks = []
    for paragraph in re.split(r"\n\s*\n", html.escape(text.strip("\n"))):
        if paragraph.startswith("    "):
            code = textwrap.dedent(paragraph).rstrip()
            blocks.append(f'<pre tabindex="0"><code>{code}</code></pre>')
        else:
            marked = re.sub("`([^`]+)`", r"<code>\1</code>", " ".join(paragraph.split()))
            blocks.append(f"<p>{marked}</p>")
    first, *others = blocks
    more = "\n".join(others)
    folded = f"\n<details><summary>About the experiment</summary>\n{more}\n</details>"
    return first + folded * bool(others)


def _kind(experiment: Experiment) -> str:
    """Returns "Claim: " or "Question: " for an experiment's title."""
    return f"<small>{'Question' if experiment.title.endswith('?') else 'Claim'}:</small> "


def _measured(runs: pd.DataFrame, names: pd.Series, claims: Sequence[Claim]) -> str:
    """Returns how many claims agree, then the range of each metric and the settings at its ends."""
    verdicts = f"{tally(claims)}. Over all settings, " if claims else ""
    return f"{verdicts}{_range(runs, names)}"


def _range(runs: pd.DataFrame, names: pd.Series) -> str:
    results = summarize(runs)
    results = results.assign(name=_names_of(results, runs, names))
    results = results[results["seeds"] > 0]
    if results.empty:
        return "nothing yet, because no run has finished."
    parts = []
    for metric in primary_metrics(runs):
        for split, title in _splits(runs, metric).items():
            mean = f"{split}_{metric.name}_mean"
            rows = results.dropna(subset=mean).sort_values(mean)
            ends = [
                f"{metric.format(row[mean], row[f'{split}_{metric.name}_std'])} ({row['name']})"
                for _, row in rows.iloc[[0, -1][: len(rows)]].iterrows()
            ]
            parts.append(f"{title} {metric.label} {' to '.join(ends) or '–'}")
    return "; ".join(parts) + "."


def _names_of(results: pd.DataFrame, runs: pd.DataFrame, names: pd.Series) -> pd.Series:
    """Returns the name of the setting of each row of `summarize`, given those of the runs."""
    by = varying(runs)
    of_setting = names.groupby(_settings(runs, by), sort=False).first()
    return _settings(results, by).map(of_setting)


def _settings(table: pd.DataFrame, names: list[str]) -> pd.Series:
    """Returns a key for the setting of each row of a table of runs or of their summary."""
    # Some settings have no value in some runs.
    values = table[names].map(str, na_action="ignore").fillna("")
    rows = values.itertuples(index=False, name=None)
    return pd.Series(["\0".join(row) for row in rows] if names else "", table.index, dtype=str)


def _splits(runs: pd.DataFrame, metric: Metric) -> dict[str, str]:
    """Returns the titles of test and train, and of train_set if some run has the metric on it."""
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


def _status(sweeps: Sweeps, runs: pd.DataFrame) -> str:
    diverged, finished = runs["diverged"], runs["finished"]
    planned = len(runs) + sum(unstarted(sweep) for sweep in sweeps.by_name.values())
    text = f"{finished.sum()} of {planned} runs finished"
    if to_the_end := (finished & diverged).sum():
        text += f", {to_the_end} of them diverged"
    if before := (~finished & diverged).sum():
        text += f", {before} diverged before the end"
    if moved := runs["device_changes"].notna().sum():
        text += f", {moved} continued on other devices"
    datasets = ", ".join(runs["data.name"].unique())
    starts = sorted(runs["start"].dropna())
    return " · ".join([text, datasets, *(f"started {start}" for start in starts[:1])])


def _directions(runs: pd.DataFrame) -> str:
    return "; ".join(
        f"{'lower' if metric.lower_is_better else 'higher'} {metric.title} is better"
        for metric in primary_metrics(runs)
    )


def _figures(figures: Mapping[str, Figure], root: Path, folder: str = "") -> str:
    """Saves figures in a folder below figures/ and returns them as HTML."""
    parts = []
    for name, figure in figures.items():
        stem = Path("figures", folder, name)
        files = {path.suffix[1:]: path for path in draw.save(figure, root / stem)}
        hrefs = {kind: html.escape(f"{stem}.{kind}") for kind in files}
        links = " ".join(
            f'<a href="{href}" download>{kind.upper()}</a>' for kind, href in hrefs.items()
        )
        title = name.replace("_", " ").replace("-", " ")
        title, text = html.escape(title[:1].upper() + title[1:]), draw.caption(figure)
        drawn = drawings(figure, f"{folder}{name}", f"{title}. {text}".strip())
        caption = f"<b>{title}.</b> {html.escape(text)} <span>{links}</span>"
        parts.append(f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>")
    return "\n".join(parts)


def _text(value: Any) -> str:
    return "" if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)


def _number(value: float, form: str = ",.0f") -> str:
    return "–" if pd.isna(value) else format(value, form)


def _table(
    columns: Mapping[str, Iterable[str]],
    *,
    head: str = "",
    sortable: bool = False,
    cards: bool = False,
) -> str:
    """Returns a table as HTML; columns of numbers are aligned to the right.

    Args:
        columns: The cells of each column by its heading.
        head: The column whose cells are the headings of the rows, or "".
        sortable: Whether the headings are buttons, by which the script sorts the rows.
        cards: Whether a row becomes a card on a phone, where each cell names its column.
    """
    heads, cells = [], []
    for name, column in columns.items():
        texts, title = list(column), html.escape(name)
        kind = "number" if all(map(NUMBER.fullmatch, texts)) else ""
        button = f'<button type="button">{title}</button>' if sortable else title
        heads.append(f'<th scope="col" class="{kind}">{button}</th>')
        of_value = name in ("status", "verdict")  # which the style sheet knows
        label = f' data-label="{title}"' if cards and name != head else ""
        tag, end = ('th scope="row"', "th") if name == head else ("td", "td")
        kinds = zip(texts, texts if of_value else [kind] * len(texts), strict=True)
        cells.append(
            [f'<{tag} class="{k}"{label}>{html.escape(text)}</{end}>' for text, k in kinds]
        )
    top, *rows = (f"<tr>{''.join(row)}</tr>" for row in (heads, *zip(*cells, strict=True)))
    body = "\n".join(rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead>{top}</thead><tbody>\n'
        f"{body}\n</tbody></table></div>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    rows = (
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(text)}</td></tr>'
        for name, text in facts.items()
    )
    return "<table><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"


def summary_columns(runs: pd.DataFrame) -> dict[str, list[str]]:
    """Returns the table of `summarize` as text: the columns by their headings.

    The fields in which the runs differ come first, then the test metrics and the training metrics.
    """
    by = varying(runs)
    results = summarize(runs, by)
    fields = {name: list(map(_text, results[name])) for name in by}
    return fields | _metric_columns(runs, results)


def _metric_columns(runs: pd.DataFrame, results: pd.DataFrame) -> dict[str, list[str]]:
    columns: dict[str, Iterable[str]] = {}
    metrics = primary_metrics(runs)
    for split in SPLITS:
        for metric in metrics:
            if title := _splits(runs, metric).get(split):
                name = f"{split}_{metric.name}"
                means, deviations = results[f"{name}_mean"], results[f"{name}_std"]
                columns[f"{title} {metric.label}"] = map(metric.format, means, deviations)
    columns["seeds"] = map(str, results["seeds"])
    for name in ("unfinished", "diverged"):
        if results[name].any():
            columns[name] = map(str, results[name])
    columns["parameters"] = map(_number, results["parameters"])
    return {name: list(column) for name, column in columns.items()}


def _summary(runs: pd.DataFrame, names: pd.Series) -> str:
    """Returns the page's table of results: settings, test metrics, then everything else."""
    by = varying(runs)
    results = summarize(runs, by)
    columns = {"setting": list(_names_of(results, runs, names))}
    columns |= _metric_columns(runs, results)
    columns |= {name: list(map(_text, results[name])) for name in by}
    shown = {name: column[:MOST_ROWS] for name, column in columns.items()}
    return _table(shown, head="setting") + _more(len(results), "settings", "results.csv")


def _more(count: int, what: str, file: str) -> str:
    """Returns a paragraph that says how many rows a table leaves out; "" for none."""
    if count <= MOST_ROWS:
        return ""
    return f"\n<p>The first {MOST_ROWS} of {count:,} {what} are shown; {file} has all of them.</p>"


def _downloads(claims: Sequence[tuple[str, Claim]], settings: pd.DataFrame) -> str:
    """Returns links to the tables beside the page."""
    files = {
        "results.csv": "results with intervals (CSV)",
        "results.tex": "results for a paper (LaTeX)",
        "runs.csv": "all runs (CSV)",
        "differences.csv": "paired differences (CSV)",
    }
    files |= {"claims.csv": "claims (CSV)"} if claims else {}
    files |= {"settings.csv": "settings of the sweeps (CSV)"} if len(settings) else {}
    links = (f'<a href="{file}" download>{text}</a>' for file, text in files.items())
    return f'<p class="downloads">Download: {", ".join(links)}.</p>'


def _failures(sweeps: Sweeps, runs: pd.DataFrame, names: pd.Series) -> str:
    """Returns a section with the runs that diverged or failed and the reasons; "" without any."""
    rows = list[tuple[str, str, str, str]]()
    for name, run in zip(names, runs.to_dict("records"), strict=True):
        titled, folder = f"{name}, seed {run['seed']}", Path(run["folder"])
        file = folder / "error.json"
        if run["diverged"]:
            step, reason = _number(run["diverged_step"]), _text(run["diverged_reason"])
            rows.append((titled, "diverged", step, reason))
        elif error := find_error(folder) if file.exists() and is_inside(file, folder) else None:
            attempts = f" ({error.attempts} attempts)" if error.attempts > 1 else ""
            rows.append((titled, error.state, "–", f"{error.error}{attempts}"))
    for sweep in sweeps.by_name.values():
        rows += [(name, "failed", "–", reason) for name, reason in failed_before_start(sweep)]
    if not rows:
        return ""
    columns = dict(
        zip(("run", "status", "step", "reason"), map(list, zip(*rows, strict=True)), strict=True)
    )
    shown = {name: cells[:MOST_ROWS] for name, cells in columns.items()}
    return f"""<section id="failures">
<h2>Runs that failed</h2>
<p>These runs are in no mean.</p>
{_table(shown, head="run", cards=True)}{_more(len(rows), "such runs", "runs.csv")}
</section>"""


def _differences(rows: pd.DataFrame, runs: pd.DataFrame) -> str:
    """Returns a section with paired differences of the test metrics; "" without any."""
    by_column = {f"test_{metric.name}": metric for metric in primary_metrics(runs)}
    if rows.empty or (shown := rows[rows["metric"].isin(by_column) & (rows["seeds"] > 0)]).empty:
        return ""
    units = [by_column[name] for name in shown["metric"]]
    fields = set(shown["field"])
    named = {f: dict(zip(runs[f], join_values(runs, [f]), strict=True)) for f in fields}

    def name(field: str, value: Any) -> str:
        return NO_FIELD if pd.isna(value) else named[field][value]

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
        "setting": map(name, shown["field"], shown["value"]),
        "compared with": map(name, shown["field"], shown["baseline"]),
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


def _runs(runs: pd.DataFrame, names: pd.Series) -> str:
    columns: dict[str, Iterable[str]] = {
        "run": (f"{name}, seed {seed}" for name, seed in zip(names, runs["seed"], strict=True))
    }
    metrics = primary_metrics(runs)
    for split in SPLITS:
        for metric in metrics:
            if title := _splits(runs, metric).get(split):
                values = runs[f"{split}_{metric.name}"]
                columns[f"{title} {metric.label}"] = map(metric.format, values)
    columns["status"] = status(runs)
    for metric in metrics:
        columns[f"best test {metric.label}"] = map(metric.format, runs[f"best_test_{metric.name}"])
    columns["at step"] = map(_number, runs["best_test_step"])
    columns["training loss"] = (_number(loss, ".4g") for loss in runs["train_loss"])
    shown = dict.fromkeys(["sweep", *varying(runs), "seed"])
    columns |= {name: map(_text, runs[name]) for name in shown if name in runs}
    columns["seconds"] = map(_number, runs["seconds"])
    columns["images/s"] = map(_number, runs["images_per_second"])
    columns["start"] = map(_text, runs["start"])
    columns["folder"] = runs["folder"]
    first = {name: list(column)[:MOST_ROWS] for name, column in columns.items()}
    return _table(first, head="run", sortable=True) + _more(len(runs), "runs", "runs.csv")


def _layers(parts: Sequence[Part], drawn: Sequence[Drawn], root: Path) -> str:
    """Returns a section with the figures of each diagnostic by layer; "" without any."""
    figures = [
        _figures(_layer_figures(part.tables, _lines(part.tables.runs, [each])), root, part.slug)
        for part, each in zip(parts, drawn, strict=True)
    ]
    if not any(figures):
        return ""
    return f"""<section id="layers">
<h2>Layers</h2>
<p>Each diagnostic is drawn by layer, at the last step with finite values; the curves above have it
by step. Among parameters, only kernels are drawn; layers.jsonl has all of them.</p>
{_titled(parts, figures)}
</section>"""


def _predictions(runs: pd.DataFrame, names: pd.Series) -> str:
    """Returns a section with the predictions of the first run of each setting that has some."""
    shown: dict[str, str] = {}
    for setting, folder in zip(names, map(Path, runs["folder"]), strict=True):
        file = folder / "predictions.png"
        if setting in shown or len(shown) == MOST_PREDICTIONS or not file.exists():
            continue
        if is_inside(file, folder):
            with suppress(OSError):
                shown[setting] = base64.b64encode(file.read_bytes()).decode()
    if not shown:
        return ""
    pictures = (
        f'<figure><img src="data:image/png;base64,{data}" alt="Images with their targets, and what '
        f'is predicted: {html.escape(name)}"><figcaption>{html.escape(name)}</figcaption></figure>'
        for name, data in shown.items()
    )
    return f"""<section id="predictions">
<h2>Predictions</h2>
<p>Test images with their targets (above) and what the last checkpoint predicts (below), for one run
of each setting: the best and the worst of a sample, by the metric of each image alone.</p>
{"".join(pictures)}
</section>"""


@draw.style()
def _layer_figures(tables: Tables, lines: pd.DataFrame) -> dict[str, Figure]:
    layers = tables.layers
    palette = dict(zip(lines["label"], lines["color"], strict=True))
    figures: dict[str, Figure] = {}
    for name in layers.columns.drop(["folder", "step", "layer"]):
        measured = layers.merge(lines, on="folder").dropna(subset=name)
        if measured.empty:
            continue
        kernels = measured["layer"].str.endswith("/kernel")
        if kernels.any():  # beside them, biases and the scales of norms are another matter
            measured = measured[kernels]
        last = measured[measured["step"] == measured.groupby("folder")["step"].transform("max")]
        sizes = measured.loc[measured[name] > 0, name]  # a gradient that is 0 has no logarithm
        log = bool((measured[name] >= 0).all()) and sizes.max() > 10 * sizes.min()
        figures[f"layers_{name}"] = draw.layer_profile(
            last,
            name,
            panel="panel",
            series="label",
            log=log,
            width=draw.TEXT_WIDTH,
            palette=palette,
        )
    return figures


def _config(runs: pd.DataFrame) -> str:
    shared = [str(n) for n in runs if "." in str(n) and runs[n].nunique(dropna=False) == 1]
    values = {name: runs[name].iloc[0] for name in shared}
    # None is NaN in a table in which another sweep lacks the field.
    return _facts({n: "None" if value != value else str(value) for n, value in values.items()})


def _provenance(sweeps: Sweeps, runs: pd.DataFrame) -> str:
    starts = sorted(runs["start"].dropna())
    plans = (read_sweep_json(sweep.folder) for sweep in sweeps.by_name.values())
    commands = [str(plan.get("command", "")) for plan in plans if plan]
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
