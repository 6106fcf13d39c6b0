"""Loads run folders as tables with one row per run, measurement, layer, or group of seeds.

A run folder holds `config.json`, `provenance.json`, `metrics.jsonl`, `layers.jsonl` if the run has
diagnostics and, once the run has finished, `summary.json`. Its folder `measurements` holds what
experiments measured in the finished run. A sweep folder holds runs and a `sweep.json` that lists
the runs of its newest launch. Metrics with the unit "fraction" are fractions in every table; only
reports and figures show them in per cent.
"""

import difflib
import functools
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from resjax.analysis.row_cache import RowCache
from resjax.errors import UserError, first_few
from resjax.run_files import (
    CLASSIFICATION_ERROR,
    DamagedFileError,
    Findings,
    Metric,
    device_changes,
    find_divergence,
    findings_path,
    folder_kind,
    primary_metric,
    read_config,
    read_findings,
    read_json_object,
    read_layers,
    read_measurements,
    read_summary,
    schedule_changes,
)
from resjax.text import user_path

REPEATS = ("data.subset_seed",)
"""Config fields that, like the seed, only distinguish repetitions of the same run."""

NO_EFFECT = (
    "train.checkpoint_every",
    "train.evaluate_train",
    "data.eval_batch_size",
    "data.workers",
    "track",
)
"""Config columns that change no result."""

PRIMARY = ("primary_metric", "lower_is_better", "metric_unit")
"""The columns with the primary metric of each run, in the order of the fields of `Metric`."""

FILES = (
    *("config.json", "provenance.json", "summary.json", "diverged.json"),
    *("metrics.jsonl", "layers.jsonl", "measurements"),
)
"""The files of a run folder that are read, and a folder of such files."""

ROW_FILES = FILES[:5]
"""The files of a run folder that its row comes from."""

ROW = (
    *("folder", "sweep", "seed", "finished", "diverged", "diverged_step", "diverged_reason"),
    *(*PRIMARY, "commit", "start", "device_changes"),
)
"""The columns of a run that come neither from its summary nor, except for the seed, its config."""

Warn = Callable[[str], None]
Result = TypeVar("Result")


class OutsideError(UserError, ValueError):
    """A file of a run is a link that leads out of the folder that is loaded."""


class NoRunsError(UserError, ValueError):
    """A folder from which runs are loaded contains none."""


class NotMeasuredError(UserError, ValueError):
    """No run was measured by an experiment of this name, but by others."""


def load_runs(*paths: str | os.PathLike[str], warn: Warn | None = None) -> pd.DataFrame:
    """Loads one row per run from a run folder, a sweep folder, any folder above, or several.

    If a path has a `sweep.json`, the runs that it lists are loaded in its order. Otherwise every
    run folder at or below the path is loaded, in the natural order of names (8 before 20). Nothing
    outside of the paths is read. A run that several sweeps have, with the same config and seed, is
    one row: that of the first sweep in which it has finished.

    Args:
        paths: Folders.
        warn: Called with what is wrong with a run, which is then left out; by default it is raised.

    Returns:
        A table with the columns

        - `folder`: the path of the run, starting with the path as passed;
        - `sweep`, if the runs are of several sweeps: the name of the run's sweep, as short as is
          unique, such as "degradation" or "digits/degradation"; missing for a run folder by itself;
        - the resolved config under dotted names: `seed`, `model.depth`, ...; beside it
          `train.schedule_change`, if a run went on with a schedule of another number of steps;
        - the summary: `train_NAME` (mean over the last `train.log_every` steps, in training mode
          on images as the config augments them) and `test_NAME` for each metric, with
          `train.evaluate_train` also `train_set_NAME` (of the whole training split, in evaluation
          mode), `best_test_NAME` for the primary metric, `steps`, `parameters`, `seconds`, ...; NaN
          in a run without the value;
        - `finished` and `diverged` (bool): a run diverged if a metric is not finite at its end;
          `diverged_step` and `diverged_reason` say when and why;
        - `primary_metric` (its name), `lower_is_better` (bool) and `metric_unit`;
        - `commit` and `start` (ISO 8601);
        - `device_changes`: the steps at which the run continued on other devices, such as "at step
          10, 1 x cpu to 8 x cpu"; its metrics equal those without a change up to rounding.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if it contains no runs, or a file is damaged (the message names the file).
    """
    return load_sweeps(*paths, warn=warn).runs


class Sweep(NamedTuple):
    """A sweep folder, or a folder with run folders, and a table of all its runs."""

    folder: Path
    runs: pd.DataFrame


class Sweeps(NamedTuple):
    """The table of `load_runs`, and the sweeps by name, each with all its runs."""

    runs: pd.DataFrame
    by_name: dict[str, Sweep]  # without run folders that were passed by themselves


def load_sweeps(*paths: str | os.PathLike[str], warn: Warn | None = None) -> Sweeps:
    """Loads runs as `load_runs` does, also by sweep."""
    # A run below two of the paths has one row.
    folders: dict[str, tuple[Path, Path | None, RowCache]] = {}
    caches, sweep_above = [], functools.cache(_sweep_above)
    for root in map(user_path, paths):
        if not root.exists():
            raise FileNotFoundError(f"{root}: no such folder")
        found = _run_folders(root, warn)
        if not found:
            kind = folder_kind(root)
            what = f"is a {kind} folder with no runs" if kind else "no runs here"
            raise NoRunsError(f"{root}: {what} (a run is a folder with a config.json)")
        caches.append(RowCache(root, ROW_FILES, _row, len(found)))
        for folder, real_path in found:
            sweep = sweep_above(folder.parent, root)
            folders.setdefault(real_path, (folder, sweep, caches[-1]))
    names = _short_names(dict.fromkeys(sweep for _, sweep, _ in folders.values() if sweep))
    rows = [
        {"folder": str(folder), "sweep": sweep and names[sweep], **row}
        for folder, sweep, cache in folders.values()
        for row in _read(cache.row, folder, warn)
    ]
    for cache in caches:
        cache.save()
    if not rows:
        raise NoRunsError(f"{', '.join(map(str, paths))}: no run can be read")
    by_name = {}
    for path, name in names.items():
        if of_sweep := [row for row in rows if row["sweep"] == name]:
            by_name[name] = Sweep(path, _table(of_sweep).drop(columns="sweep"))
        elif warn is not None:
            warn(f"{path}: no run can be read")
    if len({row["sweep"] for row in rows}) == 1:
        [table] = [sweep.runs for sweep in by_name.values()] or [_table(rows).drop(columns="sweep")]
        return Sweeps(table, by_name)
    return Sweeps(_table(_once(rows, warn)), by_name)


def _sweep_above(folder: Path, root: Path) -> Path | None:
    """Returns the nearest sweep folder from `folder` up to `root`, else the root.

    None if `folder` lies above the root.
    """
    above = [each for each in (folder, *folder.parents) if each.is_relative_to(root)]
    sweeps = (each for each in above if (each / "sweep.json").is_file())
    return next((each.resolve() for each in sweeps), root.resolve() if above else None)


def _short_names(folders: Iterable[Path]) -> dict[Path, str]:
    """Returns the last part of each path, or as many of its last parts as distinguish them all."""
    folders = list(folders)
    for count in itertools.count(1):
        names = {folder: "/".join(folder.parts[-count:]) for folder in folders}
        if len({*names.values()}) == len(folders):
            return names
    raise AssertionError("paths that differ have parts that differ")


def _once(rows: Sequence[dict[str, Any]], warn: Warn | None) -> list[dict[str, Any]]:
    """Returns each run of several sweeps once: that of the first sweep in which it finished."""
    counted: dict[Any, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: not row["finished"]):  # stable
        counted.setdefault(_identity(row), row)
    kept, pairs = list[dict[str, Any]](), dict[tuple[Any, Any], list[bool]]()
    for row in rows:
        first = counted[_identity(row)]
        if first["sweep"] == row["sweep"]:
            kept.append(row)
        else:
            pairs.setdefault((row["sweep"], first["sweep"]), []).append(_end(first) == _end(row))
    if warn is not None and pairs:
        texts = (
            f"{len(equal)} of {sweep or 'no sweep'} (in {other or 'no sweep'})"
            for (sweep, other), equal in pairs.items()
        )
        same = [each for equal in pairs.values() for each in equal]
        differ = f"; {same.count(False)} of them ended otherwise there" * (not all(same))
        count = f"{len(same)} run{'s' * (len(same) > 1)}"
        warn(
            f"{count} that another sweep has too, with the same config and seed: "
            f"{', '.join(texts)}{differ}"
        )
    return kept


def _identity(row: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    """Returns the fields of a run that can change its results, with the seed."""
    fields = {name: value for name, value in row.items() if name == "seed" or _matters(name)}
    return frozenset(fields.items())


def _end(row: Mapping[str, Any]) -> dict[str, str]:
    names = ("train_loss", "test_loss", "diverged")
    return {name: repr(row.get(name)) for name in names}


def _matters(name: str) -> bool:
    """Returns whether a column is a config field that can change results."""
    # Only the config is nested, so only its names contain dots.
    return "." in name and name not in NO_EFFECT and not name.startswith("diagnostics.")


def _table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    runs = pd.DataFrame(rows)
    kinds, metrics = ("train", "test", "best_test"), primary_metrics(runs)
    names = ["steps", "train_loss", "test_loss", "best_test_step"]
    names += [f"{kind}_{metric.name}" for metric in metrics for kind in kinds]
    names += ["parameters", "macs", "seconds", "images_per_second", "diverged_step"]
    columns = list(dict.fromkeys([*runs, *names]))
    return runs.reindex(columns=columns).astype(dict.fromkeys(names, float))


def load_curves(
    source: str | os.PathLike[str] | pd.DataFrame, warn: Warn | None = None
) -> pd.DataFrame:
    """Loads all measurements of the runs in `source`, a path or a table of `load_runs`.

    An incomplete last line, which a run may be writing, is ignored. A run that was interrupted and
    resumed may have measured a step twice; the later measurement counts.

    Args:
        source: The runs.
        warn: As for `load_runs`.

    Returns:
        A tidy table: `folder`, `step`, `split` ("train", "test", and with `train.evaluate_train`
        "train_set"), `loss`, the primary metrics of the runs, `learning_rate`, all other values
        that the runs logged, and `diverged` and the primary metric of each run in the columns of
        `load_runs`. A value that a line lacks is NaN.

    Raises:
        FileNotFoundError, ValueError: as `load_runs`; a damaged line is named by file and number.
    """
    runs = source if isinstance(source, pd.DataFrame) else load_runs(source, warn=warn)
    lines = [
        {"folder": folder, **line}
        for folder in runs["folder"]
        for read in _read(_measurements, Path(folder), warn)
        for line in read
    ]
    names = [metric.name for metric in primary_metrics(runs)]
    first = ["folder", "step", "split", "loss", *names, "learning_rate"]
    further = dict.fromkeys(name for line in lines for name in line if name not in first)
    curves = pd.DataFrame(lines, columns=[*first, *further])
    floats = dict.fromkeys(["loss", *names, "learning_rate"], float)
    curves = curves.astype({"step": int, **floats})
    curves = curves.drop_duplicates(["folder", "step", "split"], keep="last")
    described = runs[["folder", *(name for name in (*PRIMARY, "diverged") if name in runs)]]
    return curves.merge(described, on="folder")


def load_layers(
    source: str | os.PathLike[str] | pd.DataFrame, warn: Warn | None = None
) -> pd.DataFrame:
    """Loads what diagnostics measured in the layers of the runs in `source`, as `load_curves` does.

    Returns:
        A tidy table: `folder`, `step`, `layer` ("stage1/block2/Conv_0/kernel"), and one column per
        diagnostic. The layers of a step are in the order of the network. A value is NaN if it was
        not finite or not measured; the table is empty if no run has diagnostics.

    Raises:
        FileNotFoundError, ValueError: as `load_curves`.
    """
    runs = source if isinstance(source, pd.DataFrame) else load_runs(source, warn=warn)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for folder in runs["folder"]:
        for line in itertools.chain(*_read(_layers, Path(folder), warn)):
            # Diagnostics may have a line each, and a resumed run may repeat a step: later counts.
            row = rows.setdefault((folder, line["step"], line["layer"]), {"folder": folder})
            row.update(line)
    first = ["folder", "step", "layer"]
    values = dict.fromkeys(name for row in rows.values() for name in row if name not in first)
    layers = pd.DataFrame(list(rows.values()), columns=[*first, *values])
    return layers.astype({"step": int, **dict.fromkeys(values, float)})


def load_measurements(
    source: str | os.PathLike[str] | pd.DataFrame, experiment: str, warn: Warn | None = None
) -> pd.DataFrame:
    """Loads the rows that an experiment's `measure` returned for the runs in `source`.

    Measurements of an earlier step, made before the run was trained further, are left out.

    Args:
        source: A path, or a table of `load_runs`.
        experiment: The name of the experiment: that of its file, without ".py".
        warn: As for `load_runs`.

    Returns:
        A table with one row for each one that `measure` returned: `folder`, then the values by the
        names that it gave them. A value that is not finite, or that a row lacks, is NaN. The table
        is empty if no experiment has measured a run.

    Raises:
        FileNotFoundError, ValueError: as `load_runs`; a damaged file is named.
        NotMeasuredError: experiments have measured the runs, but none of this name.
    """
    runs = source if isinstance(source, pd.DataFrame) else load_runs(source, warn=warn)
    paths = [findings_path(Path(folder), experiment) for folder in runs["folder"]]
    _require_measured(paths, experiment)
    rows = [
        {"folder": folder, **row}
        for folder, path, steps in zip(runs["folder"], paths, runs["steps"], strict=True)
        if path.exists()
        for found in _read(_findings, path, warn)
        if found.step == steps
        for row in found.rows
    ]
    return pd.DataFrame(rows, columns=list(dict.fromkeys(["folder", *itertools.chain(*rows)])))


def _require_measured(paths: Sequence[Path], experiment: str) -> None:
    """Raises a NotMeasuredError if none of the files of an experiment exists, but others do."""
    if any(path.exists() for path in paths):
        return
    if names := sorted({other.stem for path in paths for other in path.parent.glob("*.json")}):
        near = difflib.get_close_matches(experiment, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"they were measured by {first_few(names)}"
        raise NotMeasuredError(f"{experiment!r} has measured none of these runs; {hint}")


def primary_metrics(table: pd.DataFrame) -> list[Metric]:
    """Returns the distinct primary metrics of the runs in a table of runs or curves, in order."""
    if "primary_metric" not in table:
        return [CLASSIFICATION_ERROR]
    rows = table[list(PRIMARY)].drop_duplicates("primary_metric")
    return [Metric(*row) for row in rows.itertuples(index=False, name=None)]


def training_column(runs: pd.DataFrame, metric: str) -> str:
    """Returns the column with the training metric: of the whole training split if all runs have it.

    Without `train.evaluate_train` it is the mean over the last steps, in training mode on images as
    the config augments them.
    """
    whole = f"train_set_{metric}"
    ended = runs[runs["finished"] & ~runs["diverged"]]
    measured = whole in runs and len(ended) > 0 and bool(ended[whole].notna().all())
    return whole if measured else f"train_{metric}"


def varying(runs: pd.DataFrame) -> list[str]:
    """Returns the config columns in which the runs differ and that can change their results.

    The seed and `REPEATS` are not among them, nor are `NO_EFFECT` and the diagnostics. If several
    columns differ between sweeps but not within any, "sweep" stands for them.
    """
    names = [str(name) for name in runs if _matters(str(name)) and name not in REPEATS]
    names = [name for name in names if runs[name].nunique(dropna=False) > 1]
    if "sweep" not in runs or runs["sweep"].nunique(dropna=False) == 1:
        return names
    within = runs.groupby("sweep", dropna=False)[names].nunique(dropna=False).max()
    between = [name for name in names if within[name] == 1]
    settings = runs[["sweep", *between]].drop_duplicates()
    if len(between) < 2 or settings.duplicated(between).any():
        return names  # two sweeps may have runs of the same setting
    return ["sweep", *(name for name in names if name not in between)]


def field_heads(names: Sequence[str]) -> dict[str, str]:
    """Returns the last part of each field's name, or all of it if that is no word or not unique."""
    last = [name.rpartition(".")[2] for name in names]
    return {
        name: part if part.isidentifier() and last.count(part) == 1 else name
        for name, part in zip(names, last, strict=True)
    }


def describe(runs: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """Returns a short name for each run from its values in `by`: "depth 56, shortcut none"."""
    names = [
        ", ".join(
            str(value) if column == "sweep" else f"{column.rpartition('.')[2]} {value}"
            for column, value in zip(by, row, strict=True)
            if value is not None and value == value
        )
        for row in runs[list(by)].itertuples(index=False, name=None)
    ]
    return pd.Series([name or "all runs" for name in names], runs.index, dtype=str)


def name_settings(runs: pd.DataFrame, settings: Mapping[str, Mapping[str, Any]]) -> pd.Series:
    """Returns the name of each run's setting: the first all of whose fields have the run's values.

    Args:
        runs: A table of `load_runs`.
        settings: By name, config fields and their values, as a sweep overrides them.

    Returns:
        The names; a run of no setting is described by the fields in which the runs differ.
    """
    names = describe(runs, varying(runs))
    for name, fields in reversed([*settings.items()]):
        present = all(field in runs for field in fields)
        chosen = [
            present and all(row[field] == value for field, value in fields.items())
            for _, row in runs.iterrows()
        ]
        names = names.mask(pd.Series(chosen, runs.index, dtype=bool), name)
    return names


def status(runs: pd.DataFrame) -> pd.Series:
    """Returns "finished", "diverged" or "unfinished" for each run; see `load_runs`."""
    finished = np.where(runs["finished"], "finished", "unfinished")
    return pd.Series(np.where(runs["diverged"], "diverged", finished), runs.index)


def summarize(runs: pd.DataFrame, by: Sequence[str] | None = None) -> pd.DataFrame:
    """Averages the runs that differ only in their seed or in `REPEATS`.

    Unfinished and diverged runs are counted but not averaged, because the mean of a result and a
    failure is neither.

    Args:
        runs: A table of `load_runs`.
        by: The columns whose values distinguish groups; those of `varying` by default.

    Returns:
        One row per group, in the order of the runs (of several sweeps, groups with the same value
        of the first column stand together): the columns `by`, `seeds` (the number of runs
        averaged), `unfinished`, `diverged`, `parameters`, and the mean `NAME_mean` and sample
        standard deviation `NAME_std` (NaN for a single run) of every `train_` and `test_` column.
    """
    by = varying(runs) if by is None else list(by)
    groups = runs.groupby(by, sort=False, dropna=False) if by else [((), runs)]
    metrics = [str(name) for name in runs if str(name).startswith(("train_", "test_"))]
    rows = []
    for key, group in groups:
        state = status(group)
        averaged = group[state == "finished"]
        row: dict[str, Any] = dict(zip(by, key, strict=True))
        row["seeds"] = len(averaged)
        row["unfinished"] = int((state == "unfinished").sum())
        row["diverged"] = int((state == "diverged").sum())
        row["parameters"] = group["parameters"].max()
        for name in metrics:
            row[f"{name}_mean"] = averaged[name].mean()
            row[f"{name}_std"] = averaged[name].std(ddof=1)
        rows.append(row)
    table = pd.DataFrame(rows)
    if by and "sweep" in runs:
        first = pd.factorize(table[by[0]])[0]
        return table.iloc[np.argsort(first, kind="stable")].reset_index(drop=True)
    return table


def _run_folders(root: Path, warn: Warn | None) -> list[tuple[Path, str]]:
    """Returns the run folders below a folder, in order, and their paths without links."""
    plan = root / "sweep.json"
    require_inside = _require_inside(root)
    if plan.exists() and is_inside(plan, root):
        for planned in _read(_planned_folders, plan, warn):
            # A planned run has no folder until it starts.
            listed = [each for each in planned if (each / "config.json").exists() or each.is_file()]
            return [(each, real) for each in listed for real in _read(require_inside, each, warn)]
    found = sorted(_walk(root), key=_natural_order)
    return [(each, real) for each in found for real in _read(require_inside, each, warn)]


def _walk(root: Path) -> Iterator[Path]:
    """Yields the run folders at or below a folder."""
    # Unlike Path.rglob, os.walk bears that a run in training deletes folders meanwhile.
    for folder, folders, files in os.walk(root):
        if "config.json" in files:
            yield Path(folder)
            if "checkpoints" in folders:  # many folders, and no run
                folders.remove("checkpoints")


def _planned_folders(plan: Path) -> list[Path]:
    try:
        return [plan.parent / run["folder"] for run in read_json_object(plan)["runs"]]
    except (KeyError, TypeError):
        raise DamagedFileError(plan, "no list of runs with folders") from None


def _require_inside(root: Path) -> Callable[[Path], str]:
    """Returns a function that refuses a run if one of its files lies outside of `root`.

    It returns the run's path without links.
    """
    real_root = root.resolve()

    def require(folder: Path) -> str:
        if folder.is_file():
            raise DamagedFileError(folder, "a file and not a run folder")
        real_path = os.path.realpath(folder)
        links = [name for name in FILES if os.path.islink(f"{real_path}/{name}")]
        for path in (folder, *(folder / name for name in links)):
            if not path.resolve().is_relative_to(real_root):
                raise OutsideError(
                    f"{path} is in {path.resolve().parent}, outside of {root}, and is not read; "
                    "load that folder itself"
                )
        return real_path

    return require


def is_inside(path: Path, root: Path) -> bool:
    """Returns whether a path leads, through all links, to a place in the folder `root`."""
    return path.resolve().is_relative_to(root.resolve())


def _read(read: Callable[[Path], Result], path: Path, warn: Warn | None) -> Iterator[Result]:
    """Yields what a function reads; warns and yields nothing if the files are damaged.

    Without `warn`, raises instead.
    """
    try:
        yield read(path)
    except UserError as error:
        if warn is None:
            raise
        warn(str(error))
    except OSError as error:
        if warn is None:
            raise
        warn(f"{error.filename or path}: {error.strerror}")


def _natural_order(path: Path) -> list[Any]:
    # Words and numbers alternate, so that each is compared with its like.
    return [int(word) if word.isdecimal() else word for word in re.split(r"(\d+)", str(path))]


def _row(folder: Path) -> dict[str, Any]:
    files = {name: folder / f"{name}.json" for name in ("provenance", "summary")}
    provenance = read_json_object(files["provenance"]) if files["provenance"].exists() else {}
    summary = read_summary(files["summary"]) if files["summary"].exists() else {}
    divergence = find_divergence(folder)
    config = _flatten(read_config(folder / "config.json"))
    _require_no_columns(files["summary"], summary, {*config, *ROW})
    texts = {name: provenance.get(name) for name in ("commit", "start")}
    texts["device_changes"] = "; ".join(map(str, device_changes(provenance))) or None
    if changes := schedule_changes(provenance):  # such a run is not one of its number of steps
        texts_of = (f"at step {step}, {a} to {b} steps" for step, (a, b) in changes)
        config["train.schedule_change"] = "; ".join(texts_of)
    return {
        **{name: _hashable(value) for name, value in config.items()},
        **summary,
        "finished": files["summary"].exists(),
        "diverged": divergence is not None,
        "diverged_step": divergence and divergence.step,
        "diverged_reason": divergence and divergence.reason,
        **dict(zip(PRIMARY, primary_metric(provenance, files["provenance"]), strict=True)),
        **{name: text if isinstance(text, str) else None for name, text in texts.items()},
    }


def _measurements(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = read_measurements(path)
    _require_no_columns(path, itertools.chain(*lines), {"folder", "diverged", *PRIMARY})
    return lines


def _layers(folder: Path) -> list[dict[str, Any]]:
    path = folder / "layers.jsonl"
    lines = read_layers(path)
    _require_no_columns(path, itertools.chain(*lines), {"folder"})
    return lines


def _findings(path: Path) -> Findings:
    folder = path.parents[1]
    if not is_inside(path, folder):
        raise OutsideError(f"{path} is a link out of {folder}, and is not read")
    found = read_findings(path)
    _require_no_columns(path, itertools.chain(*found.rows), {"folder"})
    return found


def _require_no_columns(path: Path, names: Iterable[str], columns: Collection[str]) -> None:
    """Raises DamagedFileError if a value has the name of another column of its table."""
    if twice := next((name for name in names if name in columns), None):
        raise DamagedFileError(path, f"a value is named {twice}, which is another column")


def _flatten(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested values under dotted names, after those that are not nested."""
    flat = {name: value for name, value in content.items() if not isinstance(value, dict)}
    for name, value in content.items():
        if isinstance(value, dict):
            flat |= _with_prefix(value, f"{name}.")
    return flat


def _with_prefix(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _with_prefix(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _hashable(value: Any) -> Any:
    """Returns JSON's lists and objects as tuples, which can be compared and grouped by."""
    if isinstance(value, dict):
        return tuple((name, _hashable(item)) for name, item in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
