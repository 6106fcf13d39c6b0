"""Checks what is on disk: of runs every checkpoint and every file, of weights folders the seal.

A checkpoint is read whole and its digests are compared. The newest that verifies remembers the
config and the metrics, so that these files are checked against what was written, and not only for
being JSON.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resjax import run_files
from resjax.disk import DamagedError, verify_checksums
from resjax.errors import UserError
from resjax.train import records
from resjax.train.checkpoint_reader import CheckpointReader, Restored, read_checkpoint
from resjax.train.identity import config_differences
from resjax.transfer.weights import is_weights_folder

MARKS = ("config.json", "metrics.jsonl", "summary.json", "checkpoints")


class Finding(NamedTuple):
    """What was found at a path."""

    path: Path
    message: str
    damaged: bool = True


def verify(root: Path) -> list[Finding]:
    """Checks every run and weights folder at or under a folder.

    Returns:
      For each what is damaged of it, or in one line what is there.

    Raises:
      UserError: there is no such folder, or nothing of the kind in it.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    folders = sorted((root, *(each for each in root.rglob("*") if each.is_dir())))
    weights = [folder for folder in folders if is_weights_folder(folder)]
    runs = [
        folder
        for folder in folders
        if any((folder / mark).exists() for mark in MARKS) and "damaged" not in folder.parts
    ]
    if not runs and not weights:
        raise UserError(f"{root}: no runs here (a run is a folder with a config.json), nor weights")
    of_runs = [finding for run in runs for finding in _verify_run(run)]
    return [*of_runs, *map(_verify_weights, weights)]


def _verify_weights(folder: Path) -> Finding:
    try:
        verify_checksums(folder)
    except DamagedError as error:
        return Finding(folder, f"damaged: {error}")
    return Finding(folder, "whole: weights", damaged=False)


def _verify_run(run: Path) -> Iterator[Finding]:
    findings: list[Finding] = []
    whole = []
    for step, restored in _checkpoints((run / "checkpoints").resolve()):
        if isinstance(restored, DamagedError):
            findings.append(Finding(run / "checkpoints" / str(step), f"damaged: {restored}"))
        else:
            whole.append(restored)
    newest = whole[-1].record if whole else None
    findings += _verify_json(run, newest)
    lines = _metrics(run / "metrics.jsonl", newest, findings)
    findings += _verify_summary(run / "summary.json", lines, whole)
    steps = ", ".join(str(each.step) for each in whole) or "none"
    yield from findings or [
        Finding(run, f"whole: {len(lines)} lines; checkpoints: {steps}", damaged=False)
    ]


def _checkpoints(folder: Path) -> Iterator[tuple[int, Restored | DamagedError]]:
    """Every checkpoint of a folder: what it holds, arrays aside, or what is wrong with it."""
    for step in CheckpointReader(folder).steps():
        try:
            _, record = read_checkpoint(folder / str(step))
            yield step, Restored(step, None, record)
        except DamagedError as error:
            yield step, error


def _verify_json(run: Path, newest: dict[str, Any] | None) -> Iterator[Finding]:
    for name in ("config.json", "provenance.json"):
        try:
            content = records.read_json(run / name)
        except UserError:
            yield Finding(run / name, "damaged: not a JSON object")
            continue
        if content is None:
            yield Finding(run / name, "missing")
        elif newest and name == "config.json" and config_differences(newest["config"], content):
            yield Finding(run / name, "damaged: the newest checkpoint has another config")


def _metrics(
    path: Path, newest: dict[str, Any] | None, findings: list[Finding]
) -> list[dict[str, Any]]:
    """The lines of a metrics file; adds to the findings what is wrong with them."""
    try:
        lines = run_files.read_measurements(path)
    except ValueError as error:
        findings.append(Finding(path, str(error).removeprefix(f"{path}").lstrip(",: ")))
        return []
    if newest and not path.exists():
        findings.append(Finding(path, "missing"))
    elif newest and not path.read_bytes().startswith(newest["metrics"].encode()):
        findings.append(Finding(path, "damaged: the newest checkpoint remembers other lines"))
    seen = [(line["step"], line["split"]) for line in lines]
    if len(set(seen)) < len(seen) or seen != sorted(seen, key=lambda each: each[0]):
        findings.append(Finding(path, "damaged: steps repeat, or go back"))
    return lines


def _verify_summary(
    path: Path, lines: list[dict[str, Any]], whole: list[Restored]
) -> Iterator[Finding]:
    try:
        summary = records.read_summary(path)
    except UserError:
        yield Finding(path, "damaged: no summary")
        return
    if summary is None:
        return
    if summary["steps"] not in [each.step for each in whole]:
        yield Finding(path, f"says {summary['steps']} steps, of which there is no whole checkpoint")
    for split in ("train", "test"):
        last = next((line for line in reversed(lines) if line["split"] == split), None)
        for name in ("loss", "error"):
            told = summary.get(f"{split}_{name}", math.inf)
            if last and not np.array_equal(told, last.get(name, math.inf), equal_nan=True):
                yield Finding(path, f"damaged: {split}_{name} is not that of the last line")
