"""Run folders as tables: a row a run, a row a measurement, a row a set of seeds.

A run folder holds `config.json`, `provenance.json`, `metrics.jsonl` and, once it is finished,
`summary.json`. A sweep folder holds runs and a `sweep.json` that names those of its newest launch.
Errors are fractions everywhere in these tables; per cent is a matter of showing them.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from resjax.run_files import read_config, read_json_object, read_measurements, read_summary

FINAL = ("train_loss", "train_error", "test_loss", "test_error")
"""Values that a run ends with; all four are finite unless the run diverged."""

SUMMARY = (
    "steps",
    *FINAL,
    "best_test_error",
    "best_test_step",
    "parameters",
    "macs",
    "seconds",
    "images_per_second",
)
"""The fields of `summary.json`."""

REPEATS = ("data.subset_seed",)
"""What tells repetitions of a run apart, beside the seed: another draw of its examples."""

CURVE = ("folder", "step", "split", "loss", "error", "learning_rate")
"""The columns that every table of curves has; what else a run logged follows them."""


def load_runs(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Loads one row a run from a run folder, a sweep folder, or any folder above such folders.

    Where `path` has a `sweep.json`, the runs that it names are loaded, in its order; elsewhere
    every run folder at or under `path`, in the natural order of their names (8 before 20).

    Returns:
        A table with the columns `folder` (the path of the run, under `path` as it was given), the
        resolved config with dotted names (`seed`, `model.depth`, ...), the fields of the summary
        (NaN in a run that is not finished, or where a value diverged), `finished` (bool),
        `commit` and `start` (ISO 8601).

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has no runs, or one of the files is damaged (the message names it).
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    rows = [_row(folder) for folder in _run_folders(root)]
    if not rows:
        raise ValueError(f"{root}: no runs here (a run is a folder with a config.json)")
    runs = pd.DataFrame(rows)
    values = pd.DataFrame({name: runs.get(name, np.nan) for name in SUMMARY}, runs.index)
    return pd.concat(
        [runs.drop(columns=list(SUMMARY), errors="ignore"), values.astype(float)], axis=1
    )


def load_curves(source: str | os.PathLike[str] | pd.DataFrame) -> pd.DataFrame:
    """Loads every measurement of the runs in `source`: a path, as for `load_runs`, or its table.

    A run that is being written may end in half a line, which is left out. A run that was stopped
    and resumed may have measured a step twice; the later measurement counts.

    Returns:
        A tidy table: `folder`, `step`, `split` ("train" or "test"), `loss`, `error` (a fraction),
        `learning_rate`, then whatever else the runs logged; NaN where a line has no such value.

    Raises:
        FileNotFoundError, ValueError: as `load_runs`; a damaged line is named by file and number.
    """
    runs = source if isinstance(source, pd.DataFrame) else load_runs(source)
    lines = [
        {"folder": folder, **line}
        for folder in runs["folder"]
        for line in read_measurements(Path(folder) / "metrics.jsonl")
    ]
    further = dict.fromkeys(name for line in lines for name in line if name not in CURVE)
    curves = pd.DataFrame(lines, columns=[*CURVE, *further])
    curves = curves.astype({"step": int, "loss": float, "error": float, "learning_rate": float})
    return curves.drop_duplicates(["folder", "step", "split"], keep="last", ignore_index=True)


def varying(runs: pd.DataFrame) -> list[str]:
    """Returns the config columns in which the runs differ, the seed and REPEATS aside."""
    # Only the config is nested, so only its names have dots.
    columns = [str(name) for name in runs if "." in str(name) and name not in REPEATS]
    return [name for name in columns if runs[name].nunique(dropna=False) > 1]


def describe(runs: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """Returns a short name for every run, made of its values in `by`: "depth 56, shortcut none"."""

    def name(values: tuple[Any, ...]) -> str:
        return ", ".join(
            f"{column.rpartition('.')[2]} {value}"
            for column, value in zip(by, values, strict=True)
            if not _missing(value)
        )

    rows = runs[list(by)].itertuples(index=False, name=None)
    return pd.Series([name(row) or "all runs" for row in rows], runs.index, dtype=str)


def status(runs: pd.DataFrame) -> pd.Series:
    """Returns "finished", "diverged" (finished with a value that is not finite) or "unfinished"."""
    finite = np.isfinite(runs[list(FINAL)]).all(axis=1)
    names = np.where(runs["finished"], np.where(finite, "finished", "diverged"), "unfinished")
    return pd.Series(names, runs.index)


def summarize(runs: pd.DataFrame, by: Sequence[str] | None = None) -> pd.DataFrame:
    """Averages the runs that differ only in their seed, or in their draw of as many examples.

    A run that is not finished or that diverged is counted but not averaged: the mean of a
    result and a failure is neither.

    Args:
        runs: A table of `load_runs`.
        by: The columns whose values tell groups apart; by default those of `varying`.

    Returns:
        One row a group, in the order of the runs: the columns `by`, `seeds` (how many runs the
        means are over), `unfinished`, `diverged`, `parameters`, and `NAME_mean` and `NAME_std`
        (the sample standard deviation; NaN for a single seed) for every NAME of `FINAL`.
    """
    by = varying(runs) if by is None else list(by)
    state = status(runs)
    rows = []
    for key, group in _groups(runs, by):
        kept = group[state[group.index] == "finished"]
        row = dict(zip(by, key, strict=True))
        row["seeds"] = len(kept)
        row["unfinished"] = int((state[group.index] == "unfinished").sum())
        row["diverged"] = int((state[group.index] == "diverged").sum())
        row["parameters"] = group["parameters"].max()
        for name in FINAL:
            row[f"{name}_mean"] = kept[name].mean()
            row[f"{name}_std"] = kept[name].std(ddof=1)
        rows.append(row)
    return pd.DataFrame(rows)


def _groups(
    runs: pd.DataFrame, by: Sequence[str]
) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    if by:
        yield from runs.groupby(list(by), sort=False, dropna=False)
    else:
        yield (), runs


def _run_folders(root: Path) -> list[Path]:
    listed = root / "sweep.json"
    if listed.exists():
        try:
            folders = [root / run["folder"] for run in read_json_object(listed)["runs"]]
        except (KeyError, TypeError):
            raise ValueError(f"{listed}: damaged, no list of runs with folders") from None
        # A run that was planned has no folder until it starts.
        return [folder for folder in folders if (folder / "config.json").exists()]
    return sorted((config.parent for config in root.rglob("config.json")), key=_natural)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    words = re.split(r"(\d+)", str(path))
    return [(word.isdigit(), int(word) if word.isdigit() else 0, word) for word in words]


def _row(folder: Path) -> dict[str, Any]:
    summary = folder / "summary.json"
    provenance = folder / "provenance.json"
    origin = read_json_object(provenance) if provenance.exists() else {}
    return {
        "folder": str(folder),
        **_flatten(read_config(folder / "config.json")),
        **(read_summary(summary) if summary.exists() else {}),
        "finished": summary.exists(),
        **{name: _text(origin.get(name)) for name in ("commit", "start")},
    }


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _hashable(value)
    return flat


def _hashable(value: Any) -> Any:
    """Tuples, unlike JSON's lists, can be compared and grouped by."""
    if isinstance(value, dict):
        return tuple((name, _hashable(item)) for name, item in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))
