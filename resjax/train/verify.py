"""Verifies runs and weights folders on disk: every checkpoint and every other file.

All arrays of each checkpoint are read and compared with their digests. The newest intact checkpoint
holds the config and the metrics, so these files are compared with what was written. The run may be
in training meanwhile.
"""

import math
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resjax.disk import DamagedError, verify_checksums
from resjax.errors import UserError
from resjax.run_files import (
    DamagedFileError,
    folder_kind,
    read_divergence,
    read_layers,
    read_measurements,
)
from resjax.train import records
from resjax.train.checkpoint_reader import CheckpointReader, read_checkpoint
from resjax.train.identity import config_differences, of_today
from resjax.transfer.weights import describe_fault, flatten, is_weights_folder, load

RUN_FILES = ("config.json", "metrics.jsonl", "summary.json", "checkpoints")  # each marks a run


class Finding(NamedTuple):
    """A fault of a file or folder, or the content of an intact folder."""

    path: Path
    message: str
    damaged: bool = True


def verify(root: Path) -> list[Finding]:
    """Verifies all runs and weights folders at or below a folder.

    Returns:
      For each folder its damages, or one finding that says what it holds.

    Raises:
      UserError: the folder does not exist, or there is no run and no weights folder in it.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    # Unlike Path.rglob, os.walk bears that a run in training deletes folders meanwhile.
    folders = sorted(Path(folder) for folder, _, _ in os.walk(root))
    weights = [folder for folder in folders if is_weights_folder(folder)]
    runs = [
        folder
        for folder in folders
        if any((folder / name).exists() for name in RUN_FILES) and "damaged" not in folder.parts
    ]
    if not runs and not weights:
        kind = folder_kind(root)
        what = f"is a {kind} folder; it contains" if kind else "contains"
        raise UserError(
            f"{root}: {what} no runs (folders with a config.json) and no weights folders"
        )
    found = [finding for run in runs for finding in _verify_run(run)]
    return [*found, *map(_verify_weights, weights)]


def _verify_weights(folder: Path) -> Finding:
    try:
        verify_checksums(folder)
        fault = describe_fault(flatten(load(folder).variables))
    except (DamagedError, UserError) as error:
        return Finding(folder, f"damaged: {error}")
    if fault:
        return Finding(folder, f"unusable: {fault}")
    return Finding(folder, "intact: weights", damaged=False)


def _verify_run(run: Path) -> list[Finding]:
    findings: list[Finding] = []
    notes: list[Finding] = []
    intact: dict[int, dict[str, Any]] = {}  # records by step
    checkpoints = (run / "checkpoints").resolve()
    finished = (run / "summary.json").exists()  # before the rest is read, as it is written last
    for step in CheckpointReader(checkpoints).steps():
        try:
            arrays, intact[step] = read_checkpoint(checkpoints / str(step))
        except DamagedError as error:
            if (checkpoints / str(step)).is_dir():  # a run in training deletes old ones
                findings.append(Finding(run / "checkpoints" / str(step), f"damaged: {error}"))
            continue
        network = {name: arrays[name] for name in arrays if not name.startswith("opt_state/")}
        if fault := describe_fault(network):  # as saved: the run diverged
            path = run / "checkpoints" / str(step)
            notes.append(Finding(path, f"intact, but {fault}", damaged=False))
    newest = intact[max(intact)] if intact else None
    findings += _verify_json(run, newest)
    mark = newest and newest.get("layers")
    findings += _verify_lines(run / "layers.jsonl", read_layers, mark)[1]
    mark = newest and records.text_mark(newest["metrics"])
    lines, damages = _verify_lines(run / "metrics.jsonl", read_measurements, mark)
    findings += damages
    if finished:
        findings += _verify_summary(run / "summary.json", lines, intact)
    steps = ", ".join(map(str, intact)) or "none"
    held = f"intact: {len(lines)} lines of metrics; checkpoints: {steps}"
    return [*notes, *(findings or [Finding(run, held, damaged=False)])]


def _verify_json(run: Path, newest: dict[str, Any] | None) -> Iterator[Finding]:
    for name in ("config.json", "provenance.json"):
        try:
            content = records.read_json(run / name)
        except DamagedFileError as error:
            yield Finding(run / name, f"damaged: {error.damage}")
            continue
        if content is None:
            yield Finding(run / name, "missing")
        elif (
            newest
            and name == "config.json"
            and config_differences(of_today(newest["config"]), of_today(content))
        ):
            yield Finding(run / name, "damaged: the newest checkpoint has another config")
    try:
        read_divergence(run)
    except DamagedFileError as error:
        yield Finding(run / "diverged.json", f"damaged: {error.damage}")


def _verify_lines(
    path: Path, read: Callable[[Path], list[dict[str, Any]]], mark: dict[str, Any] | None
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Returns the lines of a .jsonl file, whose beginning a checkpoint marks, and its damages."""
    try:
        lines = read(path)
    except DamagedFileError as error:
        return [], [Finding(path, f"damaged: {error.damage}")]
    findings = []
    if mark and mark["bytes"] and not path.exists():
        findings.append(Finding(path, "missing"))
    elif mark and records.read_marked(path, mark) is None:
        findings.append(Finding(path, "damaged: the newest checkpoint has other lines"))
    steps = [line["step"] for line in lines]
    keys = {(line["step"], line.get("split", line.get("layer")), *line) for line in lines}
    if len(keys) < len(lines) or steps != sorted(steps):
        findings.append(Finding(path, "damaged: steps repeat or decrease"))
    return lines, findings


def _verify_summary(
    path: Path, lines: list[dict[str, Any]], checkpoints: Collection[int]
) -> Iterator[Finding]:
    try:
        summary = records.read_summary(path)
    except DamagedFileError as error:
        yield Finding(path, f"damaged: {error.damage}")
        return
    if summary is None:
        return
    if summary["steps"] not in checkpoints:
        yield Finding(path, f"there is no intact checkpoint of its last step, {summary['steps']}")
    last = {line["split"]: line for line in lines}
    for field, value in summary.items():
        split, _, name = field.partition("_")
        if split in last and not np.array_equal(
            value, last[split].get(name, math.inf), equal_nan=True
        ):
            yield Finding(path, f"damaged: {field} is not that of the last line of metrics.jsonl")
