"""Trackers as followers: replays run folders into TensorBoard, W&B, or a tracker of your own.

A run folder is the truth, and a tracker shows a copy of it. Training writes to no tracker; a
follower reads the files that training writes. A tracker receives each run from its first step on
and replaces what it had of that run before. So a replay can be repeated or killed at any time, and
when a resumed run rewinds its metrics to a checkpoint, the tracker follows.
"""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from resjax.config.checks import TRACKERS
from resjax.errors import UserError
from resjax.models.presets import nearest
from resjax.user_code import import_name

__all__ = ["End", "Row", "TrackedRun", "Tracker", "find_tracker", "require_tracker"]


class Row(NamedTuple):
    """All that a run measured at one step.

    Attributes:
      step: the number of steps trained.
      metrics: the values of metrics.jsonl, by names such as `train/loss` and `test/error`.
      layers: the values of layers.jsonl, by diagnostic and layer, in the order of the file.
      time: seconds since the epoch at which metrics.jsonl was last written before the row was read.
    """

    step: int
    metrics: dict[str, float]
    layers: dict[str, dict[str, float]]
    time: float

    @property
    def scalars(self) -> dict[str, float]:
        """Metrics and layers by name; a layer's is `gradient_norm/stage1/block1/Conv_0/kernel`."""
        layers = {
            f"{diagnostic}/{layer}": value
            for diagnostic, values in self.layers.items()
            for layer, value in values.items()
        }
        return self.metrics | layers


class End(NamedTuple):
    """The state of a run that is not being trained.

    Attributes:
      state: "finished", "diverged", "failed", or "unfinished" if it may still go on.
      reason: why it diverged or failed, on one line.
      summary: the content of summary.json, if the run has finished.
    """

    state: str
    reason: str = ""
    summary: Mapping[str, float] = {}

    @property
    def text(self) -> str:
        """The state with its reason, on one line."""
        return f"{self.state}: {self.reason}" if self.reason else self.state


class TrackedRun(NamedTuple):
    """A run as a tracker knows it.

    Attributes:
      id: the digest of its config, which a resumed run keeps.
      name: the name of its folder.
      group: the name of the experiment whose sweep it belongs to, or "".
      project: what the user passed as `--project`, or "".
      folder: where the tracker may write files; no other run writes there.
      config: the resolved config, by section.
      provenance: the content of provenance.json.
    """

    id: str
    name: str
    group: str
    project: str
    folder: Path
    config: dict[str, Any]
    provenance: dict[str, Any]


class Tracker(Protocol):
    """One run in a tracker. Calling the class with a TrackedRun begins the run `run.id` anew.

    The tracker must then replace what it had of this run, if it had anything, because the rows come
    again from the first step on.
    """

    def log(self, row: Row) -> None:
        """Adds a row; steps increase, and no row comes twice."""

    def flush(self) -> None:
        """Makes all rows visible; called after the newest row that is available."""

    def close(self, end: End) -> None:
        """Ends the run. An unfinished run may begin anew later."""


Begin = Callable[[TrackedRun], Tracker]

CLASSES = {"tensorboard": "TensorBoard", "wandb": "WandB"}
"""The classes of `config.checks.TRACKERS`, in the modules of this package of these names."""


def find_tracker(name: str, where: str) -> Begin:
    """Returns the class of a tracker.

    Args:
      name: of `TRACKERS`, or a class of the user's as package.module:Name.
      where: the option or field that holds the name, for messages.

    Raises:
      UserError: there is no such tracker, or the package that it needs is not installed.
    """
    if ":" in name:
        try:
            return import_name(name)
        except ImportError as error:
            raise UserError(f"{where}={name}: cannot be imported: {error}") from error
    if name not in TRACKERS:
        hint = nearest(name, TRACKERS)
        raise UserError(f"{where}={name}: unknown{hint} (or package.module:Name of your own)")
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"{where}={name}: the package {name} is not installed; install it with "
            "pip install 'resjax[tracking]'"
        )
    module = importlib.import_module(f"resjax.tracking.{name}")
    return getattr(module, CLASSES[name])


def require_tracker(field: str) -> None:
    """Raises a UserError unless the value of the config's `track` is empty or names a tracker."""
    if field:
        find_tracker(field, "track")
