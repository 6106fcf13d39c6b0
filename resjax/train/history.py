"""A run's metrics and diagnostics, from the device to metrics.jsonl and layers.jsonl."""

import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from resjax.diagnostics import layer_patterns, per_layer
from resjax.models.layout import natural_order
from resjax.run_files import SPLITS, parse_measurement
from resjax.train.distributed import is_main_process
from resjax.train.progress import Listener, Progress, Warn
from resjax.train.records import JsonLinesFile
from resjax.train.step import Metrics
from resjax.train.trainer import Trainer


class NotFiniteError(Exception):
    """A loss, a metric or a parameter is not finite at a step, and the config does not allow it."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Pending(NamedTuple):
    """Metrics or diagnostics on the device, perhaps not computed yet."""

    step: int
    split: str  # of `run_files.SPLITS`, or "layers"
    values: Any


class History:
    """The lines of a run's metrics.jsonl and layers.jsonl, in the order of its steps."""

    def __init__(
        self,
        trainer: Trainer,
        workdir: Path,
        metrics: str,
        layers: str,
        first_step: int,
        listener: Listener | None,
        warn: Warn,
    ):
        """Opens the files; process 0 writes them.

        Args:
          trainer: of the run.
          workdir: the run folder.
          metrics, layers: the text of the files up to `first_step`.
          first_step: from which the run continues.
          listener: called whenever metrics arrive.
          warn: called if a file cannot be written.
        """
        self._trainer, self._listener = trainer, listener
        self._metrics = _open(workdir / "metrics.jsonl", metrics, warn)
        self._layers: JsonLinesFile | None = None
        if trainer.config.diagnostics.every or layers:
            self._layers = _open(workdir / "layers.jsonl", layers, warn)
        self._lines = [line for text in metrics.splitlines() if (line := parse_measurement(text))]
        self._pending: deque[Pending] = deque()
        self._clock = first_step, time.monotonic()  # the rate is measured from here
        self._trained_to = first_step
        self.images_per_second = 0.0

    def add(self, step: int, split: str, metrics: Metrics) -> None:
        """Adds the metrics of an evaluation, or the means over the steps since the last line."""
        self._pending.append(Pending(step, split, metrics))

    def add_parts(self, step: int, parts: list[Metrics]) -> None:
        """Adds the metrics of each step since the last line, from all parts of a line."""
        self._pending.append(Pending(step, "train", parts))

    def add_layers(self, step: int, diagnostics: Any) -> None:
        """Adds diagnostics, of the parameters after a step."""
        self._pending.append(Pending(step, "layers", diagnostics))

    def fetch(self, before: int | None = None) -> None:
        """Writes pending lines: all of them, or those of steps below `before`.

        Raises:
          NotFiniteError: a training loss or a sum of test metrics is not finite, and the config
            does not allow that.
        """
        while self._pending and (before is None or self._pending[0].step < before):
            step, split, values = self._pending.popleft()
            if split == "layers":
                self._write_layers(step, values)
                continue
            if isinstance(values, list):
                values = self._trainer.join_parts(values)
            line = {"step": step, "split": split, **self._trainer.metric_values(values)}
            self._lines.append(line)
            self._metrics.write(line)
            if split == "train":
                self._measure_rate(step)
                self._require_finite(line)
                self._trained_to = step
            elif self._trainer.config.train.nonfinite != "record":
                require_finite_sums(values, step, split)
            if self._listener:
                self._listener(self.progress(step))

    def sync(self) -> tuple[str, dict[str, Any] | None]:
        """Flushes both files to the disk.

        Returns:
          The text of metrics.jsonl, and the mark of layers.jsonl, None without one.
        """
        self._metrics.sync()
        if self._layers is None:
            return self._metrics.text, None
        self._layers.sync()
        return self._metrics.text, self._layers.mark

    def progress(self, step: int) -> Progress:
        """Returns the run's progress, with the latest metrics of each split."""
        metrics = {
            f"{split}_{name}": value
            for split in SPLITS
            for name, value in self._last(split).items()
        }
        steps, primary = self._trainer.config.train.steps, self._trainer.task.primary
        tests = (line["step"] for line in reversed(self._lines) if line["split"] == "test")
        rate = self.images_per_second
        return Progress(step, steps, metrics, rate, primary, next(tests, None))

    def summary(self) -> dict[str, Any]:
        """Returns final metrics, and beside them, never instead, the best on the test split.

        Training metrics are means over the steps of the last line, in training mode on augmented
        batches.
        """
        primary = self._trainer.task.primary
        tests = [line for line in self._lines if line["split"] == "test"]
        sign = 1 if primary.lower_is_better else -1
        best = min(tests, key=lambda line: _rank(sign * line[primary.name]))
        return {
            **self.progress(self._trainer.config.train.steps).metrics,
            f"best_test_{primary.name}": best[primary.name],
            "best_test_step": best["step"],
        }

    def close(self) -> None:
        self._metrics.close()
        if self._layers is not None:
            self._layers.close()

    def _write_layers(self, step: int, diagnostics: Any) -> None:
        assert self._layers is not None
        patterns = layer_patterns(self._trainer.config.diagnostics)
        table: dict[str, dict[str, float]] = {}
        for name, values in jax.device_get(diagnostics).items():
            for layer, value in per_layer(values, patterns).items():
                table.setdefault(layer, {})[name] = value
        for layer in sorted(table, key=natural_order):
            self._layers.write({"step": step, "layer": layer, **table[layer]})

    def _require_finite(self, line: dict[str, Any]) -> None:
        config = self._trainer.config.train
        skips = config.nonfinite == "skip" and line.get("skipped") == 1  # nothing was counted
        if config.nonfinite != "record" and not skips and not np.isfinite(line["loss"]):
            first, last = self._trained_to + 1, line["step"]
            where = f"steps {first} to {last}" if first < last else f"step {last}"
            raise NotFiniteError(f"the loss is not finite in {where}", last)

    def _measure_rate(self, step: int) -> None:
        since, start = self._clock
        if step > since:
            images = (step - since) * self._trainer.config.data.batch_size
            self.images_per_second = images / (time.monotonic() - start)

    def _last(self, split: str) -> dict[str, float]:
        """Returns the latest metrics of a split, without what describes the step."""
        lines = (line for line in reversed(self._lines) if line["split"] == split)
        line: dict[str, Any] = next(lines, {})
        left_out = ("step", "split", "learning_rate", "skipped")
        return {name: value for name, value in line.items() if name not in left_out}


def require_finite_sums(metrics: Metrics, step: int, split: str = "test") -> None:
    """Raises a NotFiniteError if a sum of the metrics of an evaluation is not finite."""
    for kind, sums in metrics.items():
        for name, (total, _) in sums.items():
            if not np.isfinite(jax.device_get(total)).all():
                which = f"{kind.removesuffix('sums')}{name}"
                raise NotFiniteError(f"the {split} {which} is not finite at step {step}", step)


def _open(path: Path, text: str, warn: Warn) -> JsonLinesFile:
    return JsonLinesFile(path if is_main_process() else None, text, warn)


def _rank(value: float) -> float:
    """Returns the value, or infinity if it is not finite: such an evaluation is never the best."""
    return value if np.isfinite(value) else np.inf
