"""Names the settings of runs as people do.

A field of the config has the value "none" or 56; a reader of a table or a chart looks for "plain,
56 layers".
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from resjax.analysis.runs import describe, varying

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
}
"""How the values of fields are written; others as the name of the field and the value."""


def setting_names(runs: pd.DataFrame, by: Sequence[str] | None = None) -> pd.Series:
    """Returns a readable name for each run's setting: "plain, 56 layers".

    Runs of different settings have different names, and those of one setting the same name.

    Args:
        runs: A table of runs.
        by: The columns that make up a setting; by default those in which the runs differ.
    """
    fields = varying(runs) if by is None else list(by)
    names = join_values(runs, distinguishing(runs) if by is None else fields)
    settings = describe(runs, fields)
    pairs = pd.DataFrame({"name": names, "setting": settings}).drop_duplicates()
    return settings if pairs["name"].duplicated().any() else names


def describe_setting(where: Mapping[str, Any]) -> str:
    """Returns "residual (pad), 56 layers" for column values as in `statistics.select`."""
    texts = []
    for name in sorted(where, key=_place):
        value = where[name]
        ordered = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        values = ordered if isinstance(ordered, list | range) else [value]
        texts.append(" and ".join(value_name(name, each) for each in values))
    return ", ".join(filter(None, texts)) or ALL


def distinguishing(runs: pd.DataFrame) -> list[str]:
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


def join_values(runs: pd.DataFrame, by: Iterable[str]) -> pd.Series:
    """Returns the names of each run's values in `by`, joined by commas."""
    residual = "residual"
    shortcuts = set(runs["model.shortcut"]) - {"none"} if "model.shortcut" in runs else set()
    parts = [
        [
            residual
            if name == "model.shortcut" and value in shortcuts and len(shortcuts) == 1
            else value_name(name, value)
            for value in runs[name]
        ]
        for name in sorted(by, key=_place)
    ]
    texts = [", ".join(filter(None, each)) for each in zip(*parts, strict=True)]
    return pd.Series(texts or ALL, runs.index, dtype=str).replace("", ALL)


def _place(field: str) -> int:
    """Orders fields: the shortcut comes first and the depth last, as in "plain, BN, 56 layers"."""
    return {"sweep": -2, "model.shortcut": -1, "model.depth": 1}.get(field, 0)


def value_name(field: str, value: Any) -> str:
    """Returns the words for a value of a column; "" for one that another sweep lacks."""
    words = field.rpartition(".")[2].replace("_", " ")
    if value is None:
        return f"no {words}"
    if value != value:
        return ""
    if isinstance(value, bool | np.bool_):
        return words if value else f"no {words}"
    if (known := WORDS.get(field, {}).get(value)) if isinstance(value, str) else None:
        return str(known)
    if isinstance(value, str) and "." not in field:
        return value  # no field of the config, but a name that an experiment made up
    short = isinstance(value, float) and float(f"{value:g}") == value
    text = f"{value:g}" if short else str(value)
    if field == "model.block":
        text = text.replace("_", " ")
    return FORMS.get(field, f"{words} {{}}").format(text)
