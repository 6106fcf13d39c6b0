"""Names the settings of runs as people do, and divides them among panels and lines of a chart.

A field of the config has the value "none" or 56; a reader of a chart looks for "plain, 56 layers".
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from resjax.analysis.palette import colors
from resjax.analysis.runs import describe, varying

MOST_PANELS = 6
"""The most panels of a chart without an experiment; more settings share one panel."""

ALL = "all runs"

WORDS = {
    "model.shortcut": {"none": "plain"},
    "model.norm": {"none": "no norm", "batch": "BN", "group": "group norm"},
}
"""Names of values that need no name of their field."""

FORMS = {
    "model.depth": "{} layers",
    "model.shortcut": "residual ({})",
    "model.block": "{} blocks",
    "model.norm": "{} norm",
    "data.name": "{}",
    "task.name": "{}",
    "optimizer.name": "{}",
    "sweep": "{}",
}
"""How the values of fields are written; others as the name of the field and the value."""


def setting_names(runs: pd.DataFrame) -> pd.Series:
    """Returns a readable name for each run's setting: "plain, 56 layers".

    Runs of different settings have different names, and those of one setting the same name.
    """
    names, settings = _names(runs, _telling(runs)), describe(runs, varying(runs))
    pairs = pd.DataFrame({"name": names, "setting": settings}).drop_duplicates()
    return settings if pairs["name"].duplicated().any() else names


def divide(runs: pd.DataFrame) -> pd.DataFrame:
    """Divides runs among the panels and lines of a chart.

    A number that the runs differ in, preferably the depth, distinguishes the lines of a panel, and
    everything else the panels; without such a number all lines share a panel.

    Returns:
        A row per run: `folder`, the title of the `panel`, the `label` and `color` of the line, and
        its `name` in the whole chart. The colors are ordered if a number distinguishes the lines.
    """
    by = _telling(runs)
    along = _numeric(runs, by)
    panel = _names(runs, [name for name in by if name != along]) if along else None
    if panel is None or panel.nunique() > MOST_PANELS:
        panel = pd.Series(ALL, runs.index)
        label, values = setting_names(runs), setting_names(runs)
    else:
        label, values = _names(runs, [str(along)]), runs[along]
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


def _telling(runs: pd.DataFrame) -> list[str]:
    """Returns the fields in which the runs differ, without those that the others determine."""
    by = varying(runs)
    settings = runs[by].astype(str).drop_duplicates()
    for name in reversed(by):
        others = [each for each in by if each != name]
        plain = name == "model.shortcut" and "none" in set(runs[name])
        kept = plain or name in ("sweep", "model.depth")
        if others and not kept and not settings.duplicated(others).any():
            by = others
    return by


def _numeric(runs: pd.DataFrame, by: Sequence[str]) -> str | None:
    """Returns the field whose numbers distinguish the lines of a panel; None without one."""
    found = [name for name in by if all(map(_is_number, runs[name]))]
    return "model.depth" if "model.depth" in found else next(iter(found), None)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool | np.bool_)
    return number and math.isfinite(value)


def _names(runs: pd.DataFrame, by: Iterable[str]) -> pd.Series:
    names = list(by)
    # The shortcut comes first and the depth last, as in "plain, BN, 56 layers".
    names.sort(key=lambda name: {"sweep": -2, "model.shortcut": -1, "model.depth": 1}.get(name, 0))
    residual = "residual"
    shortcuts = set(runs["model.shortcut"]) - {"none"} if "model.shortcut" in runs else set()
    parts = [
        [
            residual
            if name == "model.shortcut" and value in shortcuts and len(shortcuts) == 1
            else _word(name, value)
            for value in runs[name]
        ]
        for name in names
    ]
    texts = [", ".join(filter(None, each)) for each in zip(*parts, strict=True)]
    return pd.Series(texts or ALL, runs.index, dtype=str).replace("", ALL)


def _word(field: str, value: Any) -> str:
    """Returns the words for a value; "" for one that another sweep lacks."""
    words = field.rpartition(".")[2].replace("_", " ")
    if value is None:
        return f"no {words}"
    if value != value:
        return ""
    if isinstance(value, bool | np.bool_):
        return words if value else f"no {words}"
    if (known := WORDS.get(field, {}).get(value)) if isinstance(value, str) else None:
        return str(known)
    short = isinstance(value, float) and float(f"{value:g}") == value
    text = f"{value:g}" if short else str(value)
    if field == "model.block":
        text = text.replace("_", " ")
    return FORMS.get(field, f"{words} {{}}").format(text)
