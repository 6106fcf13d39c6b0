"""The training loop: one run, from its config to its summary.

The loop only dispatches: it fetches the metrics of one dispatch when the next is under way, so the
device never waits for the host. A run may end at any moment and in any way; the same call goes on
from the newest checkpoint that verifies, and finds what it would have found.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from resjax.config import Config, from_dict, to_dict
from resjax.data.examples import DataError
from resjax.disk import describe_disk_error
from resjax.errors import UserError
from resjax.models.presets import ImpossibleNetworkError
from resjax.run_files import CLASSIFICATION_ERROR, parse_measurement
from resjax.train import init_from_weights, records
from resjax.train.checkpoint_reader import CheckpointReader, Restored
from resjax.train.checkpoints import CheckpointManager
from resjax.train.distributed import is_main_process
from resjax.train.divergence import origin
from resjax.train.identity import require_compatible, require_same_run
from resjax.train.lock import locked
from resjax.train.memory import exhaustion_told, require_room
from resjax.train.progress import Listener, Progress, Warn, print_warning
from resjax.train.signals import Stopped, StopRequest
from resjax.train.sources import Streamed
from resjax.train.step import Compiled, Metrics, Program, State, program
from resjax.transfer.weights import describe_run


def train(
    config: Config,
    workdir: Path,
    on_progress: Listener | None = None,
    announce: Callable[[str], None] | None = None,
    stop: StopRequest | None = None,
    warn: Warn = print_warning,
) -> dict[str, Any]:
    """Trains one network, or goes on where `workdir` left off; a finished run stays as it is.

    Args:
      config: resolved.
      workdir: the run folder; made where it is not there.
      on_progress: is told whenever metrics came in.
      announce: is told before the first step what it will cost.
      stop: asked after every dispatch whether to end here.
      warn: is told of what the run survives: damaged checkpoints, a full disk.

    Returns:
      The summary, as summary.json holds it.

    Raises:
      UserError: `workdir` holds another config's run, or another process trains in it; the dataset
        is not here; pretrained weights do not fit; the batch does not fit into the devices' memory;
        the loss is not finite any more; the end could not be saved.
      Stopped: it was asked to stop, and has saved.
    """
    started = time.monotonic()
    if finished := _finished(config, workdir):
        return finished
    try:
        with exhaustion_told(config), _disk_told(workdir), locked(workdir, warn):
            if finished := _finished(config, workdir):  # by the process that held the lock
                return finished
            run = Run(config, workdir, started, stop or StopRequest(), warn)
            return run.train(on_progress, announce)
    except DataError as error:  # of a stream, in the middle of a run
        raise UserError(str(error)) from error


def _finished(config: Config, workdir: Path) -> dict[str, Any] | None:
    """The summary of a run that has taken all the steps; refuses another config's run."""
    require_same_run(config, workdir)
    summary = records.read_summary(workdir / "summary.json")
    return summary if summary and summary["steps"] >= config.train.steps else None


class Run:
    """One run in its folder, which is locked."""

    def __init__(
        self, config: Config, workdir: Path, started: float, stop: StopRequest, warn: Warn
    ):
        self.config, self.workdir = config, workdir
        self._started, self._stop, self._warn = started, stop, warn
        self._seconds_before = 0.0

    def train(
        self, on_progress: Listener | None, announce: Callable[[str], None] | None
    ) -> dict[str, Any]:
        """From the newest checkpoint to the summary; as the function of that name."""
        times = self.config.train
        compiled = require_program(self.config)
        state = compiled.start(self.config.seed)
        before = time.monotonic()  # seeds share a program, so all but the first find it compiled
        saved = CheckpointReader(self.workdir / "checkpoints").steps()
        largest = max(plan(compiled, 0))
        dispatches = {
            each: compiled.compiled(compiled.thawed(state, each.phase), each.steps)
            for each in {largest, *plan(compiled, saved[-1] if saved else 0)}
        }
        compiled.compiled_evaluation(state)
        compile_seconds = time.monotonic() - before
        require_room(compiled, compiled.thawed(state, largest.phase), largest.steps)
        checkpoints = CheckpointManager(
            self.workdir / "checkpoints", CLASSIFICATION_ERROR, self._warn
        )
        try:
            state, metrics = self._resumed(compiled, checkpoints, state)
            if announce:
                announce(describe(compiled, dispatches, compile_seconds))
            path = self.workdir / "metrics.jsonl" if is_main_process() else None
            file = records.JsonLinesFile(path, metrics, self._warn)
            step = int(compiled.backend.one(state.step))
            history = History(self.config, file, step, on_progress)
            try:
                self._loop(compiled, checkpoints, history, state)
            except BaseException:
                with suppress(OSError):  # the other says more
                    history.close()
                raise
            history.close()
        finally:
            checkpoints.close()
        summary = {
            "steps": times.steps,
            **history.summary(),
            **compiled.counts._asdict(),
            "compile_seconds": compile_seconds,
            "peak_bytes": dispatches[largest].peak_bytes,
            "skipped_images": compiled.source.skipped,
            "seconds": self._seconds(),
            "images_per_second": history.images_per_second,
        }
        if is_main_process():
            records.write_json(self.workdir / "summary.json", summary)
        return summary

    def _resumed(
        self, compiled: Program, checkpoints: CheckpointManager, state: State
    ) -> tuple[State, str]:
        """The state to go on from, and the text of metrics.jsonl up to it; the folder fits both."""
        backend, there = compiled.backend, bool(checkpoints.steps())
        restored: Restored | None = checkpoints.restore_latest(compiled.saved(state))
        if restored:
            require_compatible(restored.record["config"], self.config, self.workdir)
            state = backend.spread(restored.state)
            self._seconds_before = restored.record["seconds"]
        elif there:
            self._warn(f"no checkpoint in {self.workdir} is whole; the run begins anew")
        metrics = restored.record["metrics"] if restored else ""
        if is_main_process():
            records.recover_metrics(self.workdir / "metrics.jsonl", metrics, self._warn)
            (self.workdir / "summary.json").unlink(missing_ok=True)  # it goes on
            records.write_json(self.workdir / "config.json", to_dict(self.config))
            records.write_provenance(
                self.workdir / "provenance.json",
                restored.step if restored else 0,
                init_from_weights.provenance(self.config, compiled.initial_weights),
            )
        return state, metrics

    def _loop(
        self, compiled: Program, checkpoints: CheckpointManager, history: "History", state: State
    ) -> None:
        times, backend = self.config.train, compiled.backend
        step = int(backend.one(state.step))
        feed = compiled.feed(self.config.seed, step)
        try:
            with self._stop.graceful():
                for dispatch in plan(compiled, step):
                    state = compiled.thawed(state, dispatch.phase)
                    state, metrics = feed.steps(state, dispatch.steps)
                    step += dispatch.steps
                    history.add(step, "train", metrics)
                    last = step == times.steps
                    if last or step % times.eval_every == 0:
                        history.add(step, "test", compiled.evaluate(state))
                    leave = self._stop.requested() and not last
                    due = times.checkpoint_every and step % times.checkpoint_every == 0
                    if last or leave or due or checkpoints.retry_due():
                        history.fetch()  # a resumed run must find the lines of every step behind it
                        save = checkpoints.save_and_wait if last or leave else checkpoints.save
                        save(backend.one(state), step, self._record(compiled, history))
                    if leave and self._stop.signal:
                        raise Stopped(self._stop.signal, f" at step {step} of {times.steps}, saved")
                    history.fetch(before=step)
                history.fetch()
        except NotFiniteError as error:
            raise UserError(self._diagnosis(compiled, checkpoints, state, error)) from error
        finally:
            feed.close()

    def _record(self, compiled: Program, history: "History") -> dict[str, Any]:
        """What a checkpoint holds beside the state."""
        return {
            "config": to_dict(self.config),
            "weights": describe_run(
                self.config,
                compiled.statistics,
                compiled.image_shape,
                compiled.source.class_names,
                streamed=isinstance(compiled.source, Streamed),
            ),
            "metrics": history.synced(),
            "seconds": self._seconds(),
        }

    def _seconds(self) -> float:
        """Of all the run's processes, up to the checkpoint from which the next went on."""
        return self._seconds_before + time.monotonic() - self._started

    def _diagnosis(
        self,
        compiled: Program,
        checkpoints: CheckpointManager,
        state: State,
        error: "NotFiniteError",
    ) -> str:
        checkpoints.wait()
        steps = checkpoints.steps()
        last = f"that of step {steps[-1]}" if steps else "none"
        return (
            f"{error}: {origin(compiled, state, self.config.seed)}; last good checkpoint: {last}. "
            "Lower optimizer.learning_rate, or set train.nonfinite=skip or record"
        )


@contextmanager
def _disk_told(workdir: Path) -> Iterator[None]:
    """What a disk refuses is one line; checkpoints that are there stay."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{workdir}: cannot write there: {describe_disk_error(error)}; mend that and launch "
            "the same command again"
        ) from error


def evaluate(workdir: Path, which: str = "last", warn: Warn = print_warning) -> dict[str, Any]:
    """Loss and error over the whole test set, of one of a run's checkpoints.

    Args:
      workdir: the run folder.
      which: `last`, `best` (of the least test error among those that are kept), or a step's number.
      warn: is told of damaged checkpoints, which are passed over.

    Raises:
      UserError: there is no run in `workdir`, or no such checkpoint that verifies.
    """
    compiled, restored = restored_run(workdir, which, warn)
    metrics = jax.device_get(compiled.evaluate(compiled.backend.spread(restored.state)))
    return {"step": restored.step, **{f"test_{k}": float(v) for k, v in metrics.items()}}


def restored_run(workdir: Path, which: str, warn: Warn) -> tuple[Program, Restored]:
    """A run's program and one of its checkpoints; arguments and errors as of `evaluate`."""
    content = records.read_json(workdir / "config.json")
    if content is None:
        raise UserError(f"{workdir} is no run folder: it has no config.json")
    config = from_dict(content)
    if not (folder := workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir} has no checkpoint yet; train it with `resjax train`")
    compiled = require_program(config)
    like = compiled.saved(compiled.init(config.seed))
    restored = CheckpointReader(folder, warn).restore_selected(which, like, CLASSIFICATION_ERROR)
    require_compatible(restored.record["config"], config, workdir)
    return compiled, restored


class Dispatch(NamedTuple):
    """Steps that are taken together; a larger one trains more parameters, or takes more steps."""

    phase: int
    steps: int


def plan(compiled: Program, first: int) -> list[Dispatch]:
    """A run's dispatches from a step on.

    They end at the multiples of `train.log_every` and with the run; and before a thaw, because each
    is of one phase.
    """
    times = compiled.config.train
    every = range(first - first % times.log_every, times.steps, times.log_every)
    cuts = {*every, *(phase.first_step for phase in compiled.phases), times.steps}
    ends = sorted(cut for cut in cuts if first < cut <= times.steps)
    return [
        Dispatch(compiled.phase_at(begin), end - begin) for begin, end in pairwise([first, *ends])
    ]


def describe(
    compiled: Program, dispatches: Mapping[Dispatch, Compiled], compile_seconds: float
) -> str:
    """What is about to be trained, where, and what compiling it said and took."""
    backend, counts = compiled.config.parallel.backend, compiled.counts
    lines = [
        f"{counts.parameters:,} parameters, {counts.macs / 1e6:,.1f} M multiply-adds an image; "
        f"{backend} on {compiled.backend.devices} x {jax.devices()[0].device_kind}"
        f"{_peak(dispatches.values())}; compiled in {compile_seconds:.1f} s"
    ]
    if compiled.trainable(0) < counts.parameters:
        lines += [
            f"from step {compiled.phases[phase].first_step:,}: "
            f"{compiled.trainable(phase):,} parameters train"
            f"{_peak(made for each, made in dispatches.items() if each.phase == phase)}"
            for phase in sorted({each.phase for each in dispatches})
        ]
    return "\n".join(lines)


def _peak(dispatches: Iterable[Compiled]) -> str:
    """The memory that the one of them needs that needs most, where the compiler says it."""
    peaks = [made.peak_bytes for made in dispatches if made.peak_bytes is not None]
    return f", {max(peaks) / 2**20:,.0f} MiB a device" if peaks else ""


def require_program(config: Config) -> Program:
    """The config's program, or a UserError where its data or devices do not allow it."""
    try:
        return program(config)
    except (DataError, ImpossibleNetworkError) as error:
        raise UserError(str(error)) from error


class NotFiniteError(Exception):
    """The training loss is no finite number."""


class Pending(NamedTuple):
    step: int
    split: str
    metrics: Metrics  # on the device, perhaps not computed yet


class History:
    """A run's metrics: pending on the device, then in metrics.jsonl."""

    def __init__(
        self,
        config: Config,
        file: records.JsonLinesFile,
        first_step: int,
        listener: Listener | None,
    ):
        self._config, self._file, self._listener = config, file, listener
        self._lines = [line for text in file.text.splitlines() if (line := parse_measurement(text))]
        self._pending: deque[Pending] = deque()
        self._clock = first_step, time.monotonic()  # the rate counts from here
        self.images_per_second = 0.0

    def add(self, step: int, split: str, metrics: Metrics) -> None:
        self._pending.append(Pending(step, split, metrics))

    def fetch(self, before: int | None = None) -> None:
        """Writes what is pending, up to what was added at the step `before`.

        Raises:
          NotFiniteError: a training loss is not finite, and the config does not allow that.
        """
        while self._pending and (before is None or self._pending[0].step < before):
            pending = self._pending.popleft()
            fetched = jax.device_get(pending.metrics)
            line = {
                "step": pending.step,
                "split": pending.split,
                **{name: float(value) for name, value in fetched.items()},
            }
            self._lines.append(line)
            self._file.write(line)
            if pending.split == "train":
                self._rate(pending.step)
                self._require_finite(line)
            if self._listener:
                self._listener(self.progress(pending.step))

    def _require_finite(self, line: dict[str, Any]) -> None:
        if self._config.train.nonfinite != "record" and not np.isfinite(line["loss"]):
            first = line["step"] - self._config.train.log_every + 1
            raise NotFiniteError(f"the loss is not finite in steps {first} to {line['step']}")

    def synced(self) -> str:
        """The text of metrics.jsonl, after it has reached the disk."""
        self._file.sync()
        return self._file.text

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
        self._file.close()
