"""Divides runs among the panels and lines of a chart."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from resjax.analysis.palette import colors
from resjax.analysis.runs import describe, varying
from resjax.analysis.setting_names import ALL, distinguishing, join_values, setting_names

MOST_PANELS = 6
"""The most panels of a chart without an experiment; more settings share one panel."""


def divide(runs: pd.DataFrame) -> pd.DataFrame:
    """Divides runs among the panels and lines of a chart.

    A number that the runs differ in, preferably the depth, distinguishes the lines of a panel, and
    everything else the panels; without such a number all lines share a panel.

    Returns:
        A row per run: `folder`, the title of the `panel`, the `label` and `color` of the line, and
        its `name` in the whole chart. The colors are ordered if a number distinguishes the lines.
    """
    by = distinguishing(runs)
    along = _numeric(runs, by)
    panel = join_values(runs, [name for name in by if name != along]) if along else None
    if panel is None or panel.nunique() > MOST_PANELS:
        panel = pd.Series(ALL, runs.index)
        label, values = setting_names(runs), setting_names(runs)
    else:
        label, values = join_values(runs, [str(along)]), runs[along]
    ordered = values.map(colors(values))
    table = pd.DataFrame(
        {"folder": runs["folder"], "panel": panel, "label": label, "color": ordered}
    )
    return with_names(table)


def with_names(lines: pd.DataFrame) -> pd.DataFrame:
    """Adds the column `name`: the panel and the label, or what says more than the other."""
    several = lines["panel"].nunique() > 1
    names = lines["panel"] + ", " + lines["label"] if several else lines["label"]
    names = names.where(lines["panel"] != lines["label"], lines["label"])
    return lines.assign(name=names)


def extend(lines: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame | None:
    """Adds runs that a figure could not draw, because they measured nothing, to its lines.

    Such a run is in the line of the runs with the same setting.

    Args:
        lines: A table of `figures.lines`.
        runs: A table of `load_runs`.

    Returns:
        The lines of all runs in their order; None if the setting of a run is in none or in two.
    """
    settings = describe(runs, varying(runs))
    columns = ["panel", "label", "color"]
    known = runs[["folder"]].assign(setting=settings).merge(lines, on="folder")
    by_setting = known[["setting", *columns]].drop_duplicates()
    if by_setting["setting"].duplicated().any() or set(settings) - set(by_setting["setting"]):
        return None
    found = runs[["folder"]].assign(setting=settings).merge(by_setting, on="setting", how="left")
    if by_setting.duplicated(["panel", "label"]).any():
        return None  # a line is the mean of several settings
    return with_names(found[["folder", *columns]])


def _numeric(runs: pd.DataFrame, by: Sequence[str]) -> str | None:
    """Returns the field whose numbers distinguish the lines of a panel; None without one."""
    found = [name for name in by if all(map(_is_number, runs[name]))]
    return "model.depth" if "model.depth" in found else next(iter(found), None)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool | np.bool_)
    return number and math.isfinite(value)
