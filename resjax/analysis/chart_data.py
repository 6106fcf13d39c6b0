"""Collects what the interactive chart of a report shows: means with bands, and single runs.

A page must open at once, however many runs it is about. So means and deviations are computed here,
and long curves and many single runs are thinned to a budget of numbers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from resjax.analysis.runs import PRIMARY, primary_metrics
from resjax.run_files import Metric, display_name

MOST_LINES = 60
"""The most settings whose means the chart shows."""

BUDGET = 14_000
"""About the most numbers of all means and bands, and the most of all single runs."""

POINTS = 200
"""The most points of a line."""

FEWEST_POINTS = 20
"""The fewest points to which a longer line is thinned."""

SPLITS = {"test": "test", "train": "training", "train_set": "training-set"}
"""Titles of splits, in the order of columns; a diagnostic of layers has the split ""."""


class Series(NamedTuple):
    """A metric as columns of one table, with a row per run, split and step."""

    key: str
    label: str
    kind: str
    scale: int
    table: pd.DataFrame  # folder, split, step, value
    lower_is_better: bool = True
    always: bool = False  # whether every measurement has the metric, so that one without diverged


def chart_data(
    runs: pd.DataFrame, curves: pd.DataFrame, layers: pd.DataFrame, lines: pd.DataFrame
) -> dict[str, Any]:
    """Returns the data of the chart, as JSON's types, with values as they are printed.

    Args:
        runs: A table of `load_runs`.
        curves: A table of `load_curves`.
        layers: A table of `load_layers`.
        lines: A table of `lines.divide`: the panel and the line of each run.
    """
    names = list(dict.fromkeys(lines["name"]))
    settings, names = len(names), names[:MOST_LINES]
    groups = lines.drop_duplicates("name").set_index("name").loc[names]
    group_of = {name: index for index, name in enumerate(names)}
    lines = lines[lines["name"].isin(names)]
    found = [s for s in (*_logged(runs, curves), *_layers(layers)) if len(s.table)]
    step_ids: dict[tuple[int, ...], int] = {}
    means, outside = _means(found, runs, lines, group_of, step_ids)
    chosen = _chosen(lines, outside, found)
    state = runs.set_index("folder")["diverged"]
    return {
        "panels": list(dict.fromkeys(groups["panel"])),
        "groups": [
            {"name": name, "panel": row["panel"], "label": row["label"], "color": row["color"]}
            for name, row in groups.iterrows()
        ],
        "metrics": [
            {"key": s.key, "label": s.label, "kind": s.kind, "lowerIsBetter": s.lower_is_better}
            for s in found
        ],
        "splits": SPLITS,
        "means": means,
        "runs": [
            {
                "name": Path(folder).name,
                "group": group_of[name],
                "outside": folder in outside,
                "diverged": bool(state[folder]),
            }
            for folder, name in chosen.items()
        ],
        "curves": _curves(found, list(chosen), step_ids),
        "steps": list(step_ids),  # runs of one sweep are measured at the same steps, stored once
        "all": len(runs),
        "settings": settings,
    }


def to_json(content: Mapping[str, Any]) -> str:
    """Returns JSON for a script element, which only "<" could end."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _logged(runs: pd.DataFrame, curves: pd.DataFrame) -> Iterator[Series]:
    """Yields the primary metrics, the loss and everything else that the runs logged."""
    primary = {metric.name: metric for metric in primary_metrics(runs)}
    known = {"folder", "step", "split", "diverged", *PRIMARY}
    others = [name for name in map(str, curves) if name not in known and name not in primary]
    for name in (*primary, *others):
        metric = primary.get(name) or Metric(name)
        columns = curves[["folder", "split", "step"]].assign(value=curves[name].astype(float))
        if name in primary and len(primary) > 1:
            columns = columns[curves["primary_metric"] == name]
        measured = columns.groupby("split")["value"].transform("count") > 0
        always = name == "loss" or name in primary
        table = columns[measured]
        lower = metric.lower_is_better
        yield Series(name, metric.label, "Metrics", metric.scale, table, lower, always)


def _layers(layers: pd.DataFrame) -> Iterator[Series]:
    """Yields each diagnostic as its mean over the layers of each part of the network."""
    for name in layers.columns.drop(["folder", "step", "layer"]):
        measured = layers.dropna(subset=name)
        if measured.empty:
            continue
        parts = by_part(measured, str(name))
        for part, table in parts.groupby("part", sort=False):
            label = f"{display_name(name)}, {part}"
            columns = table[["folder", "step", "value"]].assign(split="")
            yield Series(f"{name}/{part}", label, "Layers", 1, columns)


def by_part(layers: pd.DataFrame, name: str) -> pd.DataFrame:
    """Returns the means of a diagnostic over the layers of each part: stem, stages and head.

    Among parameters only kernels count, because biases and the scales of norms are another matter.

    Returns:
        The columns `folder`, `part`, `step` and `value`.
    """
    kernels = layers["layer"].str.endswith("/kernel")
    shown = layers[kernels] if kernels.any() else layers
    # The activation after the last norm of a pre-activation network stands beside that norm.
    part = shown["layer"].str.partition("/")[0].replace("relu_0", "norm")
    table = shown.assign(part=part, value=shown[name])
    keys = ["folder", "part", "step"]
    return table.groupby(keys, sort=False)["value"].mean().reset_index()


def _means(
    found: Sequence[Series],
    runs: pd.DataFrame,
    lines: pd.DataFrame,
    group_of: Mapping[str, int],
    step_ids: dict[tuple[int, ...], int],
) -> tuple[list[dict[str, Any]], set[str]]:
    """Returns the means of each setting, and the runs that some mean leaves out.

    Like `figures.average_curves`, it averages only runs that reach the last step.
    """
    diverged = set(runs.loc[runs["diverged"], "folder"])
    averaged, outside = list[tuple[Series, str, str, pd.DataFrame]](), set(diverged)
    for series in found:
        table = series.table.merge(lines[["folder", "name"]], on="folder")
        finite = np.isfinite(table["value"])
        gone = diverged | set(table.loc[~finite, "folder"]) if series.always else diverged
        table = table[finite | table["folder"].isin(gone)]
        last = table.groupby(["name", "split", "folder"])["step"].transform("max")
        whole = last == table.groupby(["name", "split"])["step"].transform("max")
        complete = table[whole & ~table["folder"].isin(gone)]
        outside |= set(table["folder"]) - set(complete["folder"])
        points = complete.groupby(["name", "split", "step"])["value"].agg(["mean", "std", "count"])
        most = points.groupby(["name", "split"])["count"].transform("max")
        for (name, split), line in points[points["count"] == most].groupby(["name", "split"]):
            averaged.append((series, name, split, line.reset_index("step")))
    most = max(FEWEST_POINTS, min(POINTS, BUDGET // (2 * max(len(averaged), 1))))
    means = []
    for series, name, split, line in averaged:
        line = line.iloc[_thinned(len(line), most)]
        means.append(
            {
                "metric": series.key,
                "split": split,
                "group": group_of[name],
                "seeds": int(line["count"].iloc[0]),
                "steps": _step_id(line["step"], step_ids),
                "mean": _numbers(series.scale * line["mean"]),
                "std": _numbers(series.scale * line["std"]) if line["std"].notna().any() else None,
            }
        )
    return means, outside


def _chosen(lines: pd.DataFrame, outside: set[str], found: Sequence[Series]) -> dict[str, str]:
    """Returns the names of the settings of the runs that the chart can show one by one.

    The runs outside of the means are the first ones, then the first of each setting, and so on.
    """
    each = max(sum(series.table["split"].nunique() for series in found), 1)
    rank = lines.groupby("name").cumcount().where(~lines["folder"].isin(outside), -1)
    ordered = lines.iloc[np.argsort(rank, kind="stable")]
    ordered = ordered.head(BUDGET // (FEWEST_POINTS * each)).sort_index()
    return dict(zip(ordered["folder"], ordered["name"], strict=True))


def _curves(
    found: Sequence[Series], folders: Sequence[str], step_ids: dict[tuple[int, ...], int]
) -> list[dict[str, Any]]:
    index = {folder: number for number, folder in enumerate(folders)}
    tables = [
        (series, folder, split, line)
        for series in found
        for (folder, split), line in series.table.groupby(["folder", "split"], sort=False)
        if folder in index
    ]
    most = max(FEWEST_POINTS, min(POINTS, BUDGET // max(len(tables), 1)))
    curves = []
    for series, folder, split, line in tables:
        line = line.iloc[_thinned(len(line), most)]
        curves.append(
            {
                "run": index[folder],
                "metric": series.key,
                "split": split,
                "steps": _step_id(line["step"], step_ids),
                "values": _numbers(series.scale * line["value"]),
            }
        )
    return curves


def _thinned(count: int, most: int) -> NDArray[np.int64]:
    """Returns the indices of at most `most` of `count` points, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _step_id(steps: pd.Series, ids: dict[tuple[int, ...], int]) -> int:
    return ids.setdefault(tuple(steps.tolist()), len(ids))


def _numbers(values: pd.Series) -> list[float | None]:
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]
