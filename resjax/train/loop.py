"""The training loop: one run, from its config to its summary.

The loop only dispatches: it fetches the metrics of one dispatch while the next one runs, so the
device never waits for the host. A run can be interrupted at any moment; the same call resumes it
from the newest checkpoint that passes verification, and continues with the same results.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from resjax.config import Config, code_names, from_dict, to_dict
from resjax.disk import report_disk_errors
from resjax.errors import UserError, one_line
from resjax.machine import threads
from resjax.models.layout import first_nonfinite
from resjax.run_files import (
    EVALUATIONS,
    SCHEMA_VERSION,
    DeviceChange,
    device_changes,
    recorded_feed,
    recorded_loop,
    recorded_threads,
    require_kind,
)
from resjax.tracking.process import following
from resjax.train import init_from_weights, records
from resjax.train.checkpoint_reader import CheckpointReader, Restored
from resjax.train.checkpoints import CheckpointManager
from resjax.train.distributed import all_processes, any_process, is_main_process
from resjax.train.divergence import locate_nonfinite
from resjax.train.history import History, NotFiniteError, require_finite_sums
from resjax.train.identity import (
    require_compatible,
    require_same_bn_groups,
    require_same_run,
    require_schedule,
)
from resjax.train.lock import Claim, locked
from resjax.train.memory import report_exhaustion, require_memory
from resjax.train.plan import ends_line, plan
from resjax.train.prediction_sheet import FILE, draws, write_predictions
from resjax.train.progress import Listener, Progress, TimeLeft, Warn, print_warning
from resjax.train.signals import Stopped, StopRequest
from resjax.train.sources import feed
from resjax.train.state import TrainState
from resjax.train.step import Metrics
from resjax.train.trainer import (
    Dispatch,
    Executable,
    InterruptedEvaluationError,
    StepRunner,
    Trainer,
    trainer_for,
)
from resjax.transfer.weights import describe_run
from resjax.user_code import require_trusted
from resjax.xla.target import devices

DIVERGED = "diverged.json"  # says when and why a run ended, if it is not finite


def train(
    config: Config,
    workdir: Path,
    on_progress: Listener | None = None,
    announce: Callable[[str], None] | None = None,
    stop: StopRequest | None = None,
    warn: Warn = print_warning,
    change_schedule: bool = False,
    claim: Claim | None = None,
) -> dict[str, Any]:
    """Trains one network, or resumes it; a finished run is left as it is.

    Args:
      config: resolved.
      workdir: the run folder, which is created if necessary.
      on_progress: called whenever metrics arrive.
      announce: called before training with lines for the user: the data, and what is compiled; then
        parameters, memory and compile time; then, if the run is resumed, its step.
      stop: makes the run save and stop, after some seconds of steps or batches at most.
      warn: called with faults that the run survives: damaged checkpoints, a full disk.
      change_schedule: continue also if another `train.steps` changes the learning rates of steps
        that are trained; provenance.json and tables then say so.
      claim: the lock of `workdir`, if this process holds it already; it then stays held.

    Returns:
      The summary, as summary.json holds it.

    Raises:
      UserError: `workdir` holds a run of another config, or another process trains in it; data,
        pretrained weights or memory do not allow the run; there is no such tracker; the loss is no
        longer finite; the last checkpoint could not be saved.
      Stopped: `stop` was requested, and the run has saved.
    """
    started = time.monotonic()
    if finished := _finished(config, workdir, change_schedule):
        return finished
    tracker = config.track if is_main_process() else ""
    with (
        following(tracker, workdir, warn) as follow,
        report_exhaustion(config),
        report_disk_errors(workdir),
        locked(workdir, warn, claim) as lock,
    ):
        if finished := _finished(config, workdir, change_schedule):  # by whoever held the lock
            return finished
        run = Run(config, workdir, started, stop or StopRequest(), warn, change_schedule, lock)
        follow()
        return run.train(_noting(lock, config, on_progress), announce)


def _noting(lock: Claim | None, config: Config, listener: Listener | None) -> Listener | None:
    """Returns a listener that also notes the progress in the lock, for `resjax status`."""
    if lock is None:
        return listener
    lock.note(state="training", step=None, steps=config.train.steps)
    time_left = TimeLeft()

    def note(progress: Progress) -> None:
        lock.note(
            step=progress.step,
            images_per_second=progress.images_per_second,
            seconds_left=time_left(progress),
        )
        if listener:
            listener(progress)

    return note


def _finished(config: Config, workdir: Path, change_schedule: bool) -> dict[str, Any] | None:
    """Returns the summary of a run that has taken all steps.

    Raises:
      UserError: the folder's run may not continue under the config.
    """
    summary = records.read_summary(workdir / "summary.json")
    if saved := require_same_run(config, workdir):
        trained = [
            *CheckpointReader(workdir / "checkpoints").steps(),
            (summary or {}).get("steps", 0),
        ]
        require_schedule(saved, config, int(max(trained)), workdir, change_schedule)
        if 0 < max(trained) < config.train.steps:
            require_same_bn_groups(saved, config, workdir)
    return summary if summary and summary["steps"] >= config.train.steps else None


class Run:
    """One run in its locked folder."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        started: float,
        stop: StopRequest,
        warn: Warn,
        change_schedule: bool,
        lock: Claim | None,
    ):
        self.config, self.workdir, self._change_schedule = config, workdir, change_schedule
        self._lock = lock
        self.trainer = _trainer_of(config, workdir)
        self._started, self._stop, self._warn = started, stop, warn
        self._seconds_before = 0.0

    def train(
        self, on_progress: Listener | None, announce: Callable[[str], None] | None
    ) -> dict[str, Any]:
        """Trains from the newest checkpoint to the summary, like the function of this name."""
        trainer = self.trainer
        announce = announce or (lambda _: None)
        announce(trainer.source.description)
        to_compile = self._dispatches()
        announce(f"compiling {describe_compilation(trainer, to_compile)} ...")
        state = trainer.start(self.config.seed)
        before = time.monotonic()  # seeds share a trainer; only the first one compiles
        dispatches = compile_programs(trainer, state, to_compile)
        compile_seconds = time.monotonic() - before
        largest = max(dispatches)
        require_memory(trainer, trainer.enter_phase(state, largest.phase), largest)
        primary = trainer.task.primary
        self._checkpoints = CheckpointManager(self.workdir / "checkpoints", primary, self._warn)
        try:
            state, record, layers = self._restore(state)
            announce(describe(trainer, dispatches, compile_seconds))
            step = int(trainer.backend.unreplicate(state.step))
            if step:
                announce(f"continues from step {step:,} of {self.config.train.steps:,}")
            metrics = record.get("metrics", "")
            history = History(trainer, self.workdir, metrics, layers, step, on_progress, self._warn)
            self._history = history
            parts = list(map(records.decode_metrics, record.get("parts", [])))
            try:
                state = self._loop(state, step, parts, record.get("unevaluated", []))
            except BaseException:
                with suppress(OSError):  # the first error says more
                    history.close()
                raise
            history.close()
        finally:
            self._checkpoints.close()
        summary = {
            "steps": self.config.train.steps,
            **history.summary(),
            **trainer.counts._asdict(),
            "compile_seconds": compile_seconds,
            "peak_bytes": dispatches[largest].peak_bytes,
            "skipped_images": trainer.source.skipped,
            "seconds": self._seconds(),
            "images_per_second": history.images_per_second,
        }
        self._require_lock()
        if jax.process_count() == 1 and draws(trainer.task):
            self._draw_predictions(state)
        if is_main_process():
            records.write_json(self.workdir / "summary.json", summary)
        return summary

    def _draw_predictions(self, state: TrainState) -> None:
        """Writes `predictions.png`; a failure is a warning, since the run has been trained."""
        try:
            replica = self.trainer.backend.unreplicate(state)
            write_predictions(self.trainer, replica, self.workdir)
        except Exception as error:
            self._warn(f"{self.workdir / FILE} could not be drawn: {one_line(error)}")

    def _require_lock(self) -> None:
        """Ends a process that was paused and has lost its lock, before it writes anything."""
        if self._lock:
            self._lock.require()

    def _dispatches(self) -> set[Dispatch]:
        """Returns all that is left of the run, and the dispatch that needs most memory."""
        first = max([0, *CheckpointReader(self.workdir / "checkpoints").steps()])
        left = plan(self.trainer, first, within_line=not ends_line(self.trainer, first))
        return {max(plan(self.trainer, 0)), *left}

    def _restore(self, state: TrainState) -> tuple[TrainState, Mapping[str, Any], str]:
        """Restores the newest checkpoint, and brings the files of the folder to its step.

        Returns:
          The state, its record, and the text of layers.jsonl up to it.
        """
        exists = bool(self._checkpoints.steps())
        restored: Restored | None = self._checkpoints.restore_latest(
            self.trainer.checkpoint_template(state)
        )
        record: Mapping[str, Any] = {}
        change = None
        if restored:
            record = restored.record
            saved = require_compatible(record["config"], self.config, self.workdir)
            change = require_schedule(
                saved, self.config, restored.step, self.workdir, self._change_schedule
            )
            state = self.trainer.backend.replicate(restored.state)
            self._warn_of_other_threads()
            self._seconds_before = record["seconds"]
        elif exists:
            self._warn(f"no checkpoint in {self.workdir} is intact; the run starts again")
        layers, step = "", restored.step if restored else 0
        if is_main_process():
            if metrics := record.get("metrics"):
                records.recover_metrics(self.workdir / "metrics.jsonl", metrics, self._warn)
            if record.get("layers"):
                path = self.workdir / "layers.jsonl"
                layers = records.recover_layers(path, record["layers"], step, self._warn)
            for name in ("summary.json", DIVERGED):  # the run goes on
                (self.workdir / name).unlink(missing_ok=True)
            config = {"schema_version": SCHEMA_VERSION, **to_dict(self.config)}
            records.write_json(self.workdir / "config.json", config)
            provenance = {
                "primary_metric": self.trainer.task.primary._asdict(),
                "feed": feed(self.trainer.source),
                "loop": self.trainer.loop,
                **init_from_weights.provenance(self.config, self.trainer.initial_weights),
            }
            path = self.workdir / "provenance.json"
            written = records.write_provenance(path, step, provenance, change)
            self._warn_of_other_devices(step, device_changes(written))
        return state, record, layers

    def _warn_of_other_devices(self, step: int, changes: Sequence[DeviceChange]) -> None:
        for change in changes:
            if change.step == step:
                self._warn(
                    f"{self.workdir} continues from step {step} on {change.after} instead of "
                    f"{change.before}, with the same batches in the same order; its metrics may "
                    "differ in their last digits, and provenance.json lists the change"
                )

    def _warn_of_other_threads(self) -> None:
        began = recorded_threads(self.workdir)
        if jax.default_backend() == "cpu" and began not in (None, threads()):
            self._warn(
                f"{self.workdir} began on {began} threads and goes on with {threads()}, so its "
                f"metrics will differ in their last digits; NPROC={began} in the environment keeps "
                "them"
            )

    def _loop(
        self, state: TrainState, step: int, parts: list[Metrics], unevaluated: list[str]
    ) -> TrainState:
        """Trains from a step on; returns the last state.

        Args:
          state, step: of the run.
          parts: metrics of a line within which the run was stopped.
          unevaluated: splits that a stop request left to evaluate at this step.
        """
        times, trainer, history = self.config.train, self.trainer, self._history
        every = self.config.diagnostics.every
        phase = trainer.phase_at(max(step - 1, 0))
        try:
            if times.nonfinite != "record":
                _require_finite(trainer, state, step)
            with self._stop.graceful(), StepRunner(trainer, self.config.seed, step) as runner:
                if unevaluated:
                    self._evaluate_and_save(state, step, parts, unevaluated)
                for dispatch in plan(trainer, step, within_line=bool(parts)):
                    if dispatch.phase != phase:
                        phase = dispatch.phase
                        state = trainer.enter_phase(state, phase)
                    if every and step == 0:
                        history.add_layers(0, self._diagnose(state, phase, runner))
                    state, metrics = runner.run(state, dispatch)
                    step += dispatch.steps
                    self._require_lock()
                    if not dispatch.part:
                        history.add(step, "train", metrics)
                    else:
                        parts.append(metrics)
                        if ends_line(trainer, step):
                            history.add_parts(step, parts)
                            parts = []
                    if every and step % every == 0:
                        history.add_layers(step, self._diagnose(state, phase, runner))
                    due = step == times.steps or step % times.eval_every == 0
                    splits = trainer.evaluated_splits if due else ()
                    self._evaluate_and_save(state, step, parts, splits)
                    history.fetch(before=step)
                history.fetch()
                return state
        except NotFiniteError as error:
            self._checkpoints.wait()
            steps = self._checkpoints.steps()
            reason = f"{error}: {locate_nonfinite(trainer, state, self.config.seed)}"
            if is_main_process():
                content = {"step": error.step, "reason": reason}
                records.write_json(self.workdir / DIVERGED, content)
            raise UserError(
                f"{reason}; last good checkpoint: "
                f"{f'step {steps[-1]}' if steps else 'none'}. Lower optimizer.learning_rate, or "
                f"set train.nonfinite={'skip or ' * (times.nonfinite == 'stop')}record"
            ) from error

    def _evaluate_and_save(
        self, state: TrainState, step: int, parts: list[Metrics], splits: Sequence[str]
    ) -> None:
        """Evaluates splits, and saves if a checkpoint is due or requested, or if the run ends here.

        Args:
          state, step: of the run.
          parts: metrics of a line that has not ended.
          splits: to evaluate at this step.

        Raises:
          Stopped: a signal has requested the run to stop.
          NotFiniteError: a loss since the last line is not finite.
        """
        times = self.config.train
        unevaluated = self._evaluate(state, step, splits)
        last = step == times.steps
        leave = bool(unevaluated) or (self._stop.requested() and not last)
        regular = times.checkpoint_every and step % times.checkpoint_every == 0
        requested = self._save_requested(step)
        if last or leave or regular or requested or self._checkpoints.retry_due():
            record = self._record(parts, unevaluated)
            saved = self.trainer.backend.unreplicate(state)
            if int(saved.step) < step:  # the losses of a line are not fetched before it ends
                reason = f"the loss is not finite in step {int(saved.step) + 1}"
                raise NotFiniteError(reason, step)
            wait = last or leave
            save = self._checkpoints.save_and_wait if wait else self._checkpoints.save
            save(saved, step, record)
        if leave and self._stop.signal:
            raise Stopped(self._stop.signal, f" at step {step} of {times.steps}, saved")

    def _evaluate(self, state: TrainState, step: int, splits: Sequence[str]) -> list[str]:
        """Evaluates splits in turn; returns those that a stop request leaves unevaluated."""
        for index, split in enumerate(splits):
            try:
                metrics = self.trainer.evaluate(state, split, self._stop.requested)
            except InterruptedEvaluationError:
                return [*splits[index:]]
            self._history.add(step, EVALUATIONS[split], metrics)
        return []

    def _save_requested(self, step: int) -> bool:
        """Returns whether a signal has requested a checkpoint.

        Several processes agree at the ends of lines, because asking all of them takes a moment.
        """
        if jax.process_count() == 1:
            return self._stop.take_save_request()
        return ends_line(self.trainer, step) and any_process(self._stop.take_save_request())

    def _diagnose(self, state: TrainState, phase: int, runner: StepRunner) -> Any:
        return self.trainer.compile_diagnosis(state, phase).call(state, runner.arrays)

    def _record(self, parts: list[Metrics], unevaluated: list[str]) -> dict[str, Any]:
        """Returns the record that a checkpoint holds beside the state."""
        self._history.fetch()  # so that the record holds the lines of every step up to here
        metrics, layers = self._history.sync()
        source = self.trainer.source
        return {
            "config": to_dict(self.config),
            "weights": describe_run(
                self.config,
                self.trainer.statistics,
                source.info.image_shape,
                source.info.class_names,
                streamed=source.streamed,
            ),
            "metrics": metrics,
            "layers": layers,
            "parts": records.encode_metrics(jax.device_get(parts)),
            "unevaluated": unevaluated,
            "seconds": self._seconds(),
        }

    def _seconds(self) -> float:
        """Returns the time of all processes of the run, up to what the checkpoints hold."""
        return self._seconds_before + time.monotonic() - self._started


def _require_finite(trainer: Trainer, state: TrainState, step: int) -> None:
    """Raises a NotFiniteError that names the first variable of a state that is not finite."""
    state = trainer.backend.unreplicate(state)
    name = first_nonfinite(state.variables | ({"ema": state.ema} if state.ema else {}))
    if not all_processes(name is None):
        which = name or "an array of another process"
        raise NotFiniteError(f"{which} is not finite at step {step}", step)


def evaluate(
    workdir: Path, which: str = "last", warn: Warn = print_warning, split: str = "test"
) -> dict[str, Any]:
    """Evaluates one of a run's checkpoints on a whole split.

    Args:
      workdir: the run folder.
      which: `last`, `best` (by the primary metric, of those that were saved), or a step.
      warn: called for damaged checkpoints, which are skipped.
      split: "test", or "train" for the training images without augmentation.

    Returns:
      The step, and `test_<metric>` or `train_set_<metric>` for each metric.

    Raises:
      UserError: there is no run in `workdir`, or no such intact checkpoint, or it is not finite.
    """
    trainer, restored = restore_run(workdir, which, warn)
    state = trainer.backend.replicate(restored.state)
    try:
        _require_finite(trainer, state, restored.step)
        metrics = trainer.evaluate(state, split)
        require_finite_sums(metrics, restored.step, split)
    except NotFiniteError as error:
        raise UserError(f"{workdir}: {error}") from error
    values = trainer.metric_values(metrics)
    name = EVALUATIONS[split]
    return {"step": restored.step, **{f"{name}_{metric}": x for metric, x in values.items()}}


def restore_run(workdir: Path, which: str, warn: Warn) -> tuple[Trainer, Restored]:
    """Returns a run's trainer and one of its checkpoints; see `evaluate`."""
    content = records.read_json(workdir / "config.json")
    if content is None:
        require_kind(workdir, "run")
        raise UserError(f"{workdir} is not a run folder: it has no config.json")
    config = from_dict(content)
    require_trusted(code_names(config), str(workdir))
    if not (folder := workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir} has no checkpoint yet; train it with `resjax train`")
    trainer = _trainer_of(config, workdir)
    template = trainer.checkpoint_template(trainer.init(config.seed))
    reader = CheckpointReader(folder, warn)
    restored = reader.restore_selected(which, template, trainer.task.primary)
    require_compatible(restored.record["config"], config, workdir)
    return trainer, restored


def _trainer_of(config: Config, workdir: Path) -> Trainer:
    """Returns the trainer of a run, with the feed and the layout with which the run began.

    With `data.feed=auto` the feed depends on the number of devices and their memory, and the
    statistics that normalize images depend on the feed. Earlier versions of resjax scanned every
    network on CPU with `model.loop=auto`, and their checkpoints have that layout.
    """
    trainer, kept = trainer_for(config), config
    began = recorded_feed(workdir)
    if config.data.feed == "auto" and began not in (None, feed(trainer.source)):
        kept = replace(kept, data=replace(config.data, feed=began))
    loop = recorded_loop(workdir)
    if config.model.loop == "auto" and loop not in (None, trainer.loop):
        kept = replace(kept, model=replace(config.model, loop=loop))
    return trainer if kept is config else trainer_for(kept)


def describe_compilation(trainer: Trainer, dispatches: Iterable[Dispatch]) -> str:
    """Returns a description of what `compile_programs` compiles for these dispatches."""
    model, data = trainer.config.model, trainer.config.data
    steps = " or ".join(str(each.steps) for each in sorted(dispatches))
    parts = [f"dispatches of {steps} training steps" if steps != "1" else "a training step"]
    parts += ["diagnostics"] * bool(trainer.config.diagnostics.every)
    return (
        f"{model.depth} layers ({model.family}) for batches of {data.batch_size} "
        f"{' x '.join(map(str, trainer.image_shape))} images: {', '.join(parts)} and evaluation"
    )


def compile_programs(
    trainer: Trainer, state: TrainState, dispatches: Iterable[Dispatch]
) -> dict[Dispatch, Executable]:
    """Compiles the dispatches, their diagnostics and the evaluations.

    Returns the executable of each dispatch; the trainer keeps the others.
    """
    compiled = {}
    for dispatch in dispatches:
        entered = trainer.enter_phase(state, dispatch.phase)
        if trainer.config.diagnostics.every:  # first, since it may refuse diagnostics
            trainer.compile_diagnosis(entered, dispatch.phase)
        compiled[dispatch] = trainer.compile_dispatch(entered, dispatch)
    for split in trainer.evaluated_splits:
        trainer.compile_evaluation(state, split)
    return compiled


def describe(
    trainer: Trainer, dispatches: Mapping[Dispatch, Executable], compile_seconds: float
) -> str:
    """Returns a summary of what is trained: size, devices, memory, compile time, phases."""
    backend, counts = trainer.config.parallel.backend, trainer.counts
    macs = f"{counts.macs / 1e6:,.1f} M" if counts.macs >= 1e6 else f"{counts.macs:,}"
    lines = [
        f"{counts.parameters:,} parameters, {macs} multiply-adds per image; "
        f"{backend} on {trainer.backend.devices} x {devices()[0].device_kind}"
        f"{_peak_memory(dispatches.values())}; compiled in {compile_seconds:.1f} s"
    ]
    if trainer.trainable_parameters(0) < counts.parameters:
        lines += [
            f"from step {trainer.phases[phase].first_step:,}: "
            f"{trainer.trainable_parameters(phase):,} parameters train"
            f"{_peak_memory(made for each, made in dispatches.items() if each.phase == phase)}"
            for phase in sorted({each.phase for each in dispatches})
        ]
    return "\n".join(lines)


def _peak_memory(dispatches: Iterable[Executable]) -> str:
    """Returns the peak memory over dispatches as text, empty if the compiler does not say."""
    peaks = [made.peak_bytes for made in dispatches if made.peak_bytes is not None]
    return f", {max(peaks) / 2**20:,.0f} MiB per device" if peaks else ""
