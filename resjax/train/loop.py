"""The training loop: one run, from its config to its summary.

The loop only dispatches: it fetches the metrics of one dispatch when the next is under way, so the
device never waits for the host.
"""

import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from resjax.config import Config, UserError, from_dict, to_dict
from resjax.data.examples import DataError
from resjax.models.presets import ImpossibleNetworkError
from resjax.train import records
from resjax.train.checkpoints import Checkpoints
from resjax.train.distributed import leads
from resjax.train.memory import exhaustion_told, require_room
from resjax.train.progress import Listener, Progress
from resjax.train.step import Metrics, Program, program


def train(
    config: Config,
    workdir: Path,
    on_progress: Listener | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Trains one network, or goes on where `workdir` left off; a finished run stays as it is.

    Args:
      config: resolved.
      workdir: the run folder; made where it is not there.
      on_progress: is told whenever metrics came in.
      announce: is told before the first step what it will cost.

    Returns:
      The summary, as summary.json holds it.

    Raises:
      UserError: `workdir` holds another config's run, the dataset is not here, or the batch does
        not fit into the devices' memory.
    """
    started = time.monotonic()
    refuse_another_run(config, workdir)
    if finished := records.read_summary(workdir / "summary.json"):
        return finished
    try:
        with exhaustion_told(config):
            return _train(config, workdir, started, on_progress, announce)
    except DataError as error:  # of a stream, in the middle of a run
        raise UserError(str(error)) from error


def _train(
    config: Config,
    workdir: Path,
    started: float,
    on_progress: Listener | None,
    announce: Callable[[str], None] | None,
) -> dict[str, Any]:
    compiled, times = require_program(config), config.train
    state = compiled.init(config.seed)
    before = time.monotonic()  # seeds share a program, so all but the first find it compiled
    dispatch = compiled.compiled(state, min(times.log_every, times.steps))
    compiled.compiled_evaluation(state)
    compile_seconds = time.monotonic() - before
    require_room(compiled, state, min(times.log_every, times.steps))
    workdir.mkdir(parents=True, exist_ok=True)
    if leads():
        records.write_json(workdir / "config.json", to_dict(config))
        records.write_json(workdir / "provenance.json", records.provenance())
    checkpoints, backend = Checkpoints(workdir / "checkpoints"), compiled.backend
    if (saved := checkpoints.restore(backend.one(state))) is not None:
        state = backend.spread(saved)
    step = int(backend.one(state.step))
    if announce:
        announce(describe(compiled, dispatch.peak_bytes, compile_seconds))
    history = History(config, workdir / "metrics.jsonl", step, on_progress)
    feed = compiled.feed(config.seed, step)
    try:
        while step < times.steps:
            taken = min(times.log_every, times.steps - step)
            state, metrics = feed.steps(state, taken)
            step += taken
            history.add(step, "train", metrics)
            last = step == times.steps
            if last or step % times.eval_every == 0:
                history.add(step, "test", compiled.evaluate(state))
            if last or (times.checkpoint_every and step % times.checkpoint_every == 0):
                history.fetch()  # a resumed run must find the lines of every step behind it
                checkpoints.save(backend.one(state), step)
            history.fetch(before=step)
        history.fetch()
    finally:
        feed.close()
        history.close()
        checkpoints.close()
    summary = {
        "steps": step,
        **history.summary(),
        **compiled.counts._asdict(),
        "compile_seconds": compile_seconds,
        "peak_bytes": dispatch.peak_bytes,
        "skipped_images": compiled.source.skipped,
        "seconds": time.monotonic() - started,
        "images_per_second": history.images_per_second,
    }
    if leads():
        records.write_json(workdir / "summary.json", summary)
    return summary


def evaluate(workdir: Path) -> dict[str, Any]:
    """Loss and error of a run's last checkpoint over the whole test set.

    Raises:
      UserError: there is no run in `workdir`, or it has no checkpoint yet.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is no run folder: it has no config.json")
    config = from_dict(json.loads(path.read_text()))
    if not (folder := workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir} has no checkpoint yet; train it with `resjax train`")
    compiled = require_program(config)
    checkpoints, backend = Checkpoints(folder), compiled.backend
    state = checkpoints.restore(backend.one(compiled.init(config.seed)))
    checkpoints.close()
    if state is None:
        raise UserError(f"{workdir} has no checkpoint yet; train it with `resjax train`")
    metrics = jax.device_get(compiled.evaluate(backend.spread(state)))
    return {"step": int(state.step), **{f"test_{k}": float(v) for k, v in metrics.items()}}


def describe(compiled: Program, peak_bytes: int | None, compile_seconds: float) -> str:
    """What is about to be trained, where, and what compiling it said and took."""
    backend, counts = compiled.config.parallel.backend, compiled.counts
    peak = "" if peak_bytes is None else f", {peak_bytes / 2**20:,.0f} MiB a device"
    return (
        f"{counts.parameters:,} parameters, {counts.macs / 1e6:,.1f} M multiply-adds an image; "
        f"{backend} on {compiled.backend.devices} x {jax.devices()[0].device_kind}{peak}; "
        f"compiled in {compile_seconds:.1f} s"
    )


def refuse_another_run(config: Config, workdir: Path) -> None:
    """A run folder belongs to one config; a UserError names what differs."""
    path = workdir / "config.json"
    if not path.is_file():
        return
    there, here = _flat(json.loads(path.read_text())), _flat(to_dict(config))
    differing = [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(differing)}); "
            "choose another --workdir"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= nested if nested is not None else {prefix + key: value}
    return flat


def require_program(config: Config) -> Program:
    """The config's program, or a UserError where its data or devices do not allow it."""
    try:
        return program(config)
    except (DataError, ImpossibleNetworkError) as error:
        raise UserError(str(error)) from error


class Pending(NamedTuple):
    step: int
    split: str
    metrics: Metrics  # on the device, perhaps not computed yet


class History:
    """A run's metrics: pending on the device, then in metrics.jsonl."""

    def __init__(self, config: Config, path: Path, first_step: int, listener: Listener | None):
        self._config, self._listener = config, listener
        self._lines = [line for line in records.read_metrics(path) if line["step"] <= first_step]
        self._file = records.MetricsFile(path, self._lines) if leads() else None
        self._pending: deque[Pending] = deque()
        self._clock = first_step, time.monotonic()  # the rate counts from here
        self.images_per_second = 0.0

    def add(self, step: int, split: str, metrics: Metrics) -> None:
        self._pending.append(Pending(step, split, metrics))

    def fetch(self, before: int | None = None) -> None:
        """Writes what is pending, up to what was added at the step `before`."""
        while self._pending and (before is None or self._pending[0].step < before):
            pending = self._pending.popleft()
            fetched = jax.device_get(pending.metrics)
            line = {
                "step": pending.step,
                "split": pending.split,
                **{name: float(value) for name, value in fetched.items()},
            }
            self._lines.append(line)
            if self._file:
                self._file.write(line)
            if pending.split == "train":
                self._rate(pending.step)
            if self._listener:
                self._listener(self.progress(pending.step))

    def _rate(self, step: int) -> None:
        since, start = self._clock
        if step > since:
            images = (step - since) * self._config.data.batch_size
            self.images_per_second = images / (time.monotonic() - start)

    def progress(self, step: int) -> Progress:
        metrics = {
            f"{split}_{name}": line[name]
            for split in ("train", "test")
            if (line := self._last(split))
            for name in ("loss", "error")
        }
        return Progress(step, self._config.train.steps, metrics, self.images_per_second)

    def summary(self) -> dict[str, Any]:
        """Final and best; the best test error is told beside the final one, never instead."""
        tests = [line for line in self._lines if line["split"] == "test"]
        best = min(tests, key=lambda line: line["error"])
        return {
            **self.progress(self._config.train.steps).metrics,
            "best_test_error": best["error"],
            "best_test_step": best["step"],
        }

    def _last(self, split: str) -> dict[str, Any] | None:
        return next((line for line in reversed(self._lines) if line["split"] == split), None)

    def close(self) -> None:
        if self._file:
            self._file.close()
