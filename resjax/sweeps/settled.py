"""Finds the runs of a sweep that need no training, by what their folders contain."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from resjax.config import from_dict
from resjax.errors import UserError
from resjax.run_files import DamagedFileError, find_error, primary_metric, read_divergence
from resjax.sweeps.failures import Retries
from resjax.sweeps.measure import Measure, needs_measuring
from resjax.sweeps.status import FINISHED_BEFORE, RunStatus, State
from resjax.train import records
from resjax.train.progress import Progress


class Settled(NamedTuple):
    """The end of a run that needs no training, as its folder says."""

    state: str  # "" if the run is finished
    error: str = ""
    progress: Progress | None = None


def settle(
    run: RunStatus, measure: Measure | None, retries: Retries, state: str = FINISHED_BEFORE
) -> bool:
    """Ends a run that is finished, has diverged, or was tried often enough by this launch.

    Args:
      run: the run, whose folder is read.
      measure: the experiment's `measure`, if it has one; a run without it is not finished.
      retries: how often this launch tries a run.
      state: the state that a finished run gets.

    Returns:
      Whether the run has ended.
    """
    if not (end := settled(run.content, run.folder, measure, retries)):
        return False
    run.progress = end.progress or run.progress
    run.end(end.state or state, end.error)
    return True


def settled(
    content: dict[str, Any], folder: Path, measure: Measure | None, retries: Retries
) -> Settled | None:
    """Returns the end of a run as `settle` would set it; `content` is the config by `to_dict`."""
    if not folder.exists():
        return None
    if progress := finished(content, folder, measure):
        return Settled("", progress=progress)
    if reason := _diverged(content, folder):
        return Settled(State.FAILED, reason)
    if (error := find_error(folder)) and retries.exhausted(error):
        return Settled(error.state, error.error)
    return None


def _diverged(content: dict[str, Any], folder: Path) -> str:
    """Returns why training of a run has ended for good, or ""."""
    with suppress(DamagedFileError, OSError):  # which is reported when the run is trained
        divergence = read_divergence(folder)
        if divergence and has_config(folder, content):
            return divergence.reason
    return ""


def finished(content: dict[str, Any], folder: Path, measure: Measure | None) -> Progress | None:
    """Returns the end of a run that is trained, and measured if need be; None if it is not.

    Args:
      content: the config of the run, as `to_dict` returns it.
      folder: the run folder.
      measure: the experiment's `measure`, if it has one.
    """
    provenance = folder / "provenance.json"
    # A damaged file is reported when the run is trained.
    with suppress(UserError, ValueError, OSError):
        if not (summary := records.read_summary(folder / "summary.json")):
            return None
        if not has_config(folder, content) or (measure and needs_measuring(measure, folder)):
            return None
        steps, rate = int(summary["steps"]), summary.get("images_per_second", math.nan)
        primary = primary_metric(records.read_json(provenance) or {}, provenance)
        return Progress(steps, steps, summary, rate, primary)
    return None


def has_config(folder: Path, content: dict[str, Any]) -> bool:
    """Returns whether the config.json of a run folder is this config."""
    if (saved := records.read_json(folder / "config.json")) is None:
        return False
    # Configs that an earlier version wrote lack fields.
    return saved == {**saved, **content} or from_dict(saved) == from_dict(content)
