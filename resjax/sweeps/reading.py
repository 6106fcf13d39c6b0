"""Reads the states of runs from their folders alone, on any machine that shares them.

A reader never waits and writes nothing. It may read while runs are trained, deleted or damaged.
Reading again looks only at runs whose folder has changed, and at the locks of those that are held.
Whether the holder of a lock on another machine lives, a reader learns by watching the lock by its
own clock; until then it says so.
"""

import heapq
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from resjax.errors import UserError
from resjax.run_files import (
    DamagedFileError,
    find_divergence,
    find_error,
    folder_kind,
    is_run_folder,
    parse_measurement,
    primary_metric,
    read_config,
    read_divergence,
    read_json_object,
    read_summary,
)
from resjax.sweeps.measure import Measure, find_measure, needs_measuring
from resjax.sweeps.plan_files import plan_file, read_plan
from resjax.sweeps.status import RunStatus, State
from resjax.train.lock import FILE_NAME, FREE, HELD, Watch
from resjax.train.progress import Progress

SETTLED_SECONDS = 2.0
"""A folder that changed more recently may change again within the resolution of its times."""

TAIL_BYTES = 16_384
"""The last line of a metrics.jsonl lies within so many bytes of its end."""

BEGUN = "config.json", "checkpoints", "metrics.jsonl"
"""A run folder without any of these has nothing of a run yet."""


@dataclass
class SweepStatus:
    """The runs of a sweep, or run folders that belong to none, and their states.

    Attributes:
      folder: the sweep folder, or the folder above the runs.
      experiment: the name of the experiment; None without a sweep.
      launch: the ID of the newest launch, if one is recorded.
      runs: of the newest launch, in the order of its plan.
      other_runs: the number of run folders that belong to earlier launches.
    """

    folder: Path
    experiment: str | None = None
    launch: str | None = None
    runs: list[RunStatus] = field(default_factory=list)
    other_runs: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """The number of runs in each `State`."""
        counts = dict.fromkeys(map(str, State), 0)
        for run in self.runs:
            counts[run.state] += 1
        return counts

    @property
    def working(self) -> int:
        """The number of runs that a worker holds."""
        return sum(run.holder is not None for run in self.runs)

    @property
    def ended(self) -> bool:
        """Whether no run is left to train or measure; a later launch tries failed ones again."""
        final = State.FINISHED, State.DIVERGED, State.FAILED
        return all(run.state in final and not run.retry for run in self.runs)

    @property
    def seconds_left(self) -> float | None:
        """An estimate of the time until all runs have ended, by `estimate`."""
        return estimate(self.runs)


def estimate(runs: Sequence[RunStatus]) -> float | None:
    """Estimates the seconds until all runs have ended, if the number of workers stays the same.

    A run that has not begun is expected to take as long as runs of the same program, or else the
    mean over all known programs. Without a worker, the estimate is for a single one. Runs that have
    failed for good do not count.

    Returns:
      The seconds; None if no time is known yet.
    """
    left, known = list[float | None](), _seconds_per_step(runs)
    held = sorted(_left(run, known) or 0.0 for run in runs if run.holder is not None)
    for run in runs:
        if run.holder is None and (run.state in (State.QUEUED, State.INTERRUPTED) or run.retry):
            left.append(_left(run, known))
    if not known and (left or not any(held)):
        return None if left or held else 0.0
    whole = [known[run.program] * run.steps for run in runs if run.program in known and run.steps]
    mean = sum(whole) / len(whole) if whole else 0.0
    workers = held or [0.0]
    for seconds in left:  # each worker takes the next run when it has ended one
        heapq.heapreplace(workers, workers[0] + (mean if seconds is None else seconds))
    return max(workers)


def _seconds_per_step(runs: Sequence[RunStatus]) -> dict[str, float]:
    """Returns the mean time of a step of each program, from runs that know their rate."""
    times: dict[str, list[float]] = {}
    for run in runs:
        progress = run.progress
        if progress is None:
            continue
        rate, seconds = progress.images_per_second, progress.metrics.get("seconds", math.nan)
        if seconds > 0 and progress.steps:  # of a finished run, with evaluations and compilation
            times.setdefault(run.program, []).append(seconds / progress.steps)
        elif rate > 0 and math.isfinite(rate) and run.batch_size:
            times.setdefault(run.program, []).append(run.batch_size / rate)
    return {program: sum(each) / len(each) for program, each in times.items()}


def _left(run: RunStatus, seconds_per_step: dict[str, float]) -> float | None:
    if run.seconds_left is not None:
        return run.seconds_left
    if run.program not in seconds_per_step or not run.steps:
        return None
    done = run.progress.step if run.progress else 0
    return max(run.steps - done, 0) * seconds_per_step[run.program]


class StatusReader:
    """Reads the states of all runs at or below a folder, again and again."""

    def __init__(self, root: Path):
        """Reads nothing yet.

        Args:
          root: a sweep folder, a run folder, or a folder above several of them.
        """
        self._root = root
        self._sweeps: dict[Path, _Sweep] = {}

    def read(self) -> list[SweepStatus]:
        """Returns the sweeps, in the order of their paths, then run folders outside of sweeps.

        Raises:
          UserError: there is neither a sweep nor a run.
        """
        sweeps, alone = list[SweepStatus](), list[Path]()
        for folder in _find(self._root):
            if (folder / "sweep.json").is_file():
                sweep = self._sweeps.setdefault(folder, _Sweep(folder))
                sweeps.append(sweep.read())
            else:
                alone.append(folder)
        if alone:
            known = self._sweeps.setdefault(self._root, _Sweep(self._root))
            sweeps.append(known.of_folders(alone))
        if not sweeps:
            kind = folder_kind(self._root)
            what = f"is a {kind} folder" if kind else "no sweep and no run here"
            raise UserError(f"{self._root}: {what}; name a sweep folder, a run folder or one above")
        return sweeps


def _find(root: Path) -> Iterator[Path]:
    """Yields the sweep folders, and run folders outside of sweeps, at or below a folder."""
    for name, folders, files in os.walk(root):
        folder = Path(name)
        if {"sweep.json", FILE_NAME} & {*files} or is_run_folder(folder):
            yield folder
            folders.clear()  # they belong to the sweep or to the run
        folders.sort()


class _Sweep:
    """One sweep folder: its plan, and what is known of its runs."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._plan: tuple[Any, ...] = ()  # the signature of the sweep.json that was read
        self._status = SweepStatus(folder)
        self._measure: Measure | None = None
        self._runs = RunsReader()

    def read(self) -> SweepStatus:
        """Returns the sweep with the current states.

        Raises:
          DamagedFileError: sweep.json is damaged.
        """
        self._read_plan()
        self._runs.read(self._status.runs, self._measure)
        others = _folders_in(self._folder / "runs")
        self._status.other_runs = len(others - {run.folder for run in self._status.runs})
        return self._status

    def of_folders(self, folders: Sequence[Path]) -> SweepStatus:
        """Returns run folders that belong to no sweep."""
        known = {run.folder: run for run in self._status.runs}
        self._status.runs = [known.get(each) or RunStatus(each, {}, "") for each in folders]
        self._runs.read(self._status.runs, None)
        return self._status

    def _read_plan(self) -> None:
        path = self._folder / "sweep.json"
        try:
            seen = _signature(path)
            if seen == self._plan:
                return
            content = read_json_object(path)
        except OSError:  # the folder has just been removed
            self._status.runs = []
            return
        self._plan = seen
        self._status.experiment = str(content.get("experiment"))
        launch = content.get("launch")
        self._status.launch = launch if isinstance(launch, str) else None
        self._measure, runs = None, None
        digest = content.get("plan")
        with suppress(UserError, OSError):  # without a plan, runs have no config before they begin
            if isinstance(digest, str) and plan_file(self._folder, digest).exists():
                stored = read_plan(self._folder, digest)
                self._measure, runs = stored.measure, stored.runs
        if runs is None:
            runs = [RunStatus(folder, {}, "") for folder in _listed(path, content)]
            with suppress(UserError, OSError, SyntaxError, ValueError):
                self._measure = find_measure(self._folder / "experiment.py")
        self._status.runs = runs
        self._runs.forget()


def _listed(path: Path, content: dict[str, Any]) -> list[Path]:
    try:
        names = [PurePath(run["folder"]) for run in content["runs"]]
    except (KeyError, TypeError):
        raise DamagedFileError(path, "no list of runs with folders") from None
    if outside := next((name for name in names if name.is_absolute() or ".." in name.parts), None):
        raise DamagedFileError(path, f"it lists {outside}, which is outside of the sweep")
    return [path.parent / name for name in names]


class RunsReader:
    """Reads the states of runs from their folders; only those that changed are read again."""

    def __init__(self) -> None:
        self._watch = Watch()
        self._seen: dict[Path, tuple[Any, ...]] = {}
        self._beats: dict[Path, tuple[Any, float | None]] = {}

    def read(self, runs: Sequence[RunStatus], measure: Measure | None) -> None:
        """Updates the states of runs."""
        for run in runs:
            try:
                self._look(run, measure)
            except FileNotFoundError:  # it has not begun, or has just been removed
                self._seen.pop(run.folder, None)
                run.observe(State.QUEUED)
            except OSError as error:
                self._seen.pop(run.folder, None)
                run.observe(State.INTERRUPTED, f"{error.filename}: {error.strerror}")

    def forget(self) -> None:
        """Makes the next `read` look at all runs again."""
        self._seen.clear()

    def _look(self, run: RunStatus, measure: Measure | None) -> None:
        folder = run.folder
        if (seen := _signature(folder)) == self._seen.get(folder):
            return
        names = {*os.listdir(folder)}
        lock = self._watch.state(folder) if FILE_NAME in names else FREE
        if lock == HELD:
            self._seen.pop(folder, None)
            self._observe_holder(run)
            return
        self._beats.pop(folder, None)
        _judge(run, names, lock, measure)
        settled = time.time_ns() - max(seen[:2]) > SETTLED_SECONDS * 1e9
        if settled and lock == FREE:
            self._seen[folder] = seen

    def _observe_holder(self, run: RunStatus) -> None:
        holder = self._watch.holder(run.folder) or {}
        now, beat = time.monotonic(), (holder.get("token"), holder.get("beats"))
        before = self._beats.get(run.folder)
        if before is None:
            self._beats[run.folder] = beat, None  # the time of this beat is unknown
        elif before[0] != beat:
            self._beats[run.folder] = beat, now
        last = self._beats[run.folder][1]
        state = State.MEASURING if holder.get("state") == "measuring" else State.RUNNING
        _read_content(run)
        steps, step = _number(holder, "steps") or run.steps, _number(holder, "step")
        rate = _number(holder, "images_per_second")
        progress = None
        if steps:
            step = steps if state == State.MEASURING else step
            progress = Progress(int(step or 0), int(steps), {}, math.nan if rate is None else rate)
        run.observe(
            state,
            progress=progress,
            holder=holder,
            alive=self._watch.beating(run.folder),
            beat_seconds=None if last is None else now - last,
            seconds_left=None if state == State.MEASURING else _number(holder, "seconds_left"),
        )


def _judge(run: RunStatus, names: set[str], lock: str, measure: Measure | None) -> None:
    """Sets the state of a run that no process holds."""
    folder, progress, error = run.folder, None, ""
    state = State.INTERRUPTED if names & {*BEGUN} else State.QUEUED
    if state == State.INTERRUPTED:
        _read_content(run)
        if run.steps and (step := _last_step(folder / "metrics.jsonl")) is not None:
            progress = Progress(step, run.steps, {}, math.nan)
    failure = find_error(folder) if "error.json" in names else None
    try:
        if "summary.json" in names:
            progress = _finished(folder)
            state = State.FINISHED
            if divergence := find_divergence(folder):
                state, error = State.DIVERGED, f"step {divergence.step}: {divergence.reason}"
            elif measure and needs_measuring(measure, folder, warn=lambda _: None):
                state, error = State.INTERRUPTED, "not measured yet"
        elif "diverged.json" in names and (divergence := read_divergence(folder)):
            state, error = State.DIVERGED, f"step {divergence.step}: {divergence.reason}"
    except DamagedFileError as damaged:
        state, error = State.INTERRUPTED, str(damaged)
    if failure and lock == FREE and state in (State.INTERRUPTED, State.QUEUED):
        state, error = State.FAILED, failure.error
        if failure.state != "failed":
            error = f"{failure.state}: {error}"
    run.observe(state, error=error, progress=progress)
    run.attempts = failure.attempts if failure else 0
    run.retry = state == State.FAILED and failure is not None and failure.retry


def _finished(folder: Path) -> Progress:
    summary = read_summary(folder / "summary.json")
    path, metric = folder / "provenance.json", {}
    with suppress(OSError):
        metric = read_json_object(path)
    steps, rate = int(summary["steps"]), summary.get("images_per_second", math.nan)
    return Progress(steps, steps, summary, rate, primary_metric(metric, path))


def _read_content(run: RunStatus) -> None:
    """Reads the config of a run that no plan describes."""
    if not run.content:
        with suppress(UserError, OSError):
            run.content = read_config(run.folder / "config.json")


def _last_step(path: Path) -> int | None:
    """Returns the step of the last line of a metrics.jsonl, or None without an intact one."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
        for text in reversed(file.read().split(b"\n")):
            if line := parse_measurement(text):
                return int(line["step"])
    return None


def _folders_in(parent: Path) -> set[Path]:
    with suppress(OSError), os.scandir(parent) as entries:
        return {parent / entry.name for entry in entries if entry.is_dir()}
    return set()


def _signature(path: Path) -> tuple[int, ...]:
    """Returns what changes with a file, or with the entries of a folder."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev


def _number(content: dict[str, Any], name: str) -> float | None:
    value = content.get(name)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if fits else None
