"""The local launcher: trains the runs of a plan on this machine, one or several at a time.

A run is identified by its config, so launching again skips finished runs and resumes the others.
If the experiment has a `measure`, each run is measured by the process that has trained it, and a
finished run that is not measured yet by the next launch. A run that fails leaves its traceback in
`error.txt`; the other runs go on.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

from resjax.config import Config, from_dict
from resjax.disk import describe_disk_error, report_disk_errors, write_atomically
from resjax.errors import UserError
from resjax.machine import threads
from resjax.run_files import experiment_name, primary_metric, recorded_threads
from resjax.sweeps.experiment import Plan
from resjax.sweeps.measure import Measure, find_measure, needs_measuring
from resjax.sweeps.status import FINISHED, RunStatus, shown
from resjax.sweeps.workers import (
    Failure,
    Report,
    Worker,
    attempt,
    default_workers,
    divide_machine,
)
from resjax.train import records
from resjax.train.lock import locked
from resjax.train.progress import Progress, print_warning
from resjax.train.signals import Stopped, StopRequest

POLL_SECONDS = 0.2  # between two checks whether the workers have ended or a stop is requested


def launch(
    plan: Plan,
    workdir: Path,
    command: str,
    workers: int | None = None,
    stop: StopRequest | None = None,
) -> int:
    """Trains and measures the runs of `plan` in `workdir`; returns how many are still not finished.

    A run that is trained but not measured counts as not finished. Writes `sweep.json` and a copy of
    the experiment file, which say what `workdir` holds, and the run folders under `runs/`.

    Args:
      plan: the resolved runs.
      workdir: the sweep folder.
      command: the command line, for `sweep.json`.
      workers: processes that train at the same time, each on its share of the machine; 1 trains in
        this process. None: the number that was measured to be fastest.
      stop: a request to stop, which is checked between dispatches.

    Raises:
      UserError: another launch is running in `workdir`, or it cannot be written.
      Stopped: stopping was requested; says how many of the runs under way have saved.
    """
    with report_disk_errors(workdir), locked(workdir, print_warning):
        _write_sweep(plan, workdir, command)
        return _launch(plan, workdir, workers, stop or StopRequest())


def _launch(plan: Plan, workdir: Path, workers: int | None, stop: StopRequest) -> int:
    runs = [RunStatus(run.config, workdir / "runs" / run.name) for run in plan.runs]
    measure = find_measure(plan.experiment)
    with shown(runs) as show_end:
        for run in runs:
            run.progress = _finished(run)
            if run.progress and not (measure and needs_measuring(measure, run.folder)):
                run.end("skipped")
                show_end(run)
        waiting = [run for run in runs if run.state == "waiting"]
        queue = RunQueue(waiting, measure, show_end)
        # The number of cores per run must not depend on how many runs are waiting.
        workers = min(default_workers() if workers is None else workers, len(runs))
        began = {recorded_threads(run.folder) for run in waiting}
        if waiting and (workers > 1 or began - {None, threads()}):
            saved = _train_in_workers(queue, workers, stop)
            if stop.signal and (left := sum(run.state == "running" for run in runs)):
                raise Stopped(stop.signal, f"; {saved} of {left} runs under way have saved")
        elif waiting:
            queue.train(partial(attempt, stop=stop))
    return sum(run.state not in FINISHED for run in runs)


class RunQueue:
    """The runs that wait for training; the threads of several workers share it."""

    def __init__(
        self,
        runs: Sequence[RunStatus],
        measure: Measure | None,
        show_end: Callable[[RunStatus], None],
    ):
        self._runs, self._measure, self._show_end = list(runs), measure, show_end
        self._compiled: set[str] = set()
        self._lock = threading.Lock()

    def train(
        self, attempt: Callable[[Config, Path, Report, Measure | None], Failure | None]
    ) -> None:
        """Trains and measures one run after the other until the queue is empty."""
        program = ""
        while run := self._take(program):
            program = run.program
            run.state, run.started = "running", time.monotonic()
            failure = attempt(run.config, run.folder, run.update, self._measure)
            error = failure.error if failure else ""
            try:
                _write_error(run.folder / "error.txt", failure)
            except OSError as unwritten:
                error = f"{error}; error.txt: {describe_disk_error(unwritten)}".lstrip("; ")
            run.end(failure.state if failure else "done", error)
            self._show_end(run)

    def _take(self, program: str) -> RunStatus | None:
        """Removes a run of this program; else one of a program that nobody has; else any."""
        with self._lock:
            same = (run for run in self._runs if run.program == program)
            new = (run for run in self._runs if run.program not in self._compiled)
            if chosen := next(chain(same, new, self._runs), None):
                self._runs.remove(chosen)
                self._compiled.add(chosen.program)
            return chosen


def _write_error(path: Path, failure: Failure | None) -> None:
    """Writes the traceback of a failure, or removes that of an earlier launch."""
    if failure is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, failure.report)


def _train_in_workers(queue: RunQueue, number: int, stop: StopRequest) -> int:
    """Trains in worker processes until the queue is empty or a stop is requested.

    Returns:
      The number of runs that were stopped and have saved.
    """
    workers = [Worker(resources, stop.save_on) for resources in divide_machine(number)]
    faults: list[BaseException] = []

    def train(worker: Worker) -> None:
        try:
            queue.train(worker.attempt)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=train, args=(worker,), daemon=True) for worker in workers]
    with stop.graceful():
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and not stop.signal:
                if stop.take_save_request():
                    for worker in workers:
                        worker.save()
                time.sleep(POLL_SECONDS)
        finally:
            for worker in workers:
                worker.stop()
            for thread in threads:
                thread.join()
            for worker in workers:
                worker.join()
    if faults:  # a fault of ours; the other threads have trained all other runs
        raise faults[0]
    return sum(worker.saved for worker in workers)


def _write_sweep(plan: Plan, workdir: Path, command: str) -> None:
    (workdir / "runs").mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "experiment.py", plan.experiment.read_bytes())
    runs = [{"folder": f"runs/{run.name}", "overrides": run.overrides} for run in plan.runs]
    content = {
        "experiment": experiment_name(plan.experiment),
        "file": str(plan.experiment),
        "command": command,
        "runs": runs,
    }
    records.write_json(workdir / "sweep.json", content)


def _finished(run: RunStatus) -> Progress | None:
    """Returns the end of a run that an earlier launch finished with the same config."""
    provenance = run.folder / "provenance.json"
    # A damaged file is reported when the run is trained.
    with suppress(UserError, ValueError, OSError):
        saved = records.read_json(run.folder / "config.json")
        same = saved is not None and from_dict(saved) == run.config
        if same and (summary := records.read_summary(run.folder / "summary.json")):
            steps, rate = summary["steps"], summary.get("images_per_second", math.nan)
            primary = primary_metric(records.read_json(provenance) or {}, provenance)
            return Progress(steps, steps, summary, rate, primary)
    return None
