"""The local launcher: runs a plan on this machine, one run after the other or several at once.

A run is what its config says, so launching again skips what is finished and resumes what is not.
Runs that differ only in seed follow each other, because they share one compiled program. A run that
fails is told and leaves its traceback in `error.txt`; the others go on.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table

from resjax.config import Config, digest, to_dict
from resjax.data import datasets
from resjax.disk import write_atomically
from resjax.errors import UserError
from resjax.sweeps.experiment import Plan, Run
from resjax.sweeps.workers import Failure, Worker, attempt, fastest_workers, places
from resjax.train import records
from resjax.train.lock import locked
from resjax.train.progress import Listener, Progress, print_warning
from resjax.train.signals import Stopped, StopRequest


def launch(
    plan: Plan,
    workdir: Path,
    command: str,
    workers: int | None = None,
    stop: StopRequest | None = None,
) -> int:
    """Runs what of `plan` is not finished in `workdir` yet, and returns how many runs failed.

    Writes `sweep.json`, a copy of the experiment file, so that `workdir` explains itself, and the
    run folders under `runs/`.

    Args:
      plan: the runs, resolved.
      workdir: the sweep folder.
      command: what the user typed, for the record.
      workers: processes that train at the same time, each on its share of the machine; 1 trains in
        this process. None: as many as were measured to be fastest.
      stop: asked now and then whether to end here.

    Raises:
      UserError: a dataset is not on this machine, or another launch is under way in `workdir`.
      Stopped: it was asked to stop; the runs that were under way have saved.
    """
    _require_data(plan)
    with locked(workdir, print_warning):
        _record(plan, workdir, command)
        return _launch(plan, workdir, workers, stop or StopRequest())


def _launch(plan: Plan, workdir: Path, workers: int | None, stop: StopRequest) -> int:
    rows = {digest(run.config): Row(run.name) for run in plan.runs}
    waiting: list[Job] = []
    with _board(list(rows.values())) as ended:
        for run in _seeds_together(plan):
            job = Job(run, workdir / "runs" / run.name, rows[digest(run.config)])
            if summary := _summary(job.folder, run.config):
                job.row.skip(summary)
                ended(job.row)
            else:
                waiting.append(job)
        several = min(fastest_workers() if workers is None else workers, len(waiting))
        if several > 1:
            _train_at_once(waiting, several, workdir / "compiled", ended, stop)
        elif waiting:
            from resjax.train.step import keep_compiled  # JAX takes a second, and workers have it

            keep_compiled(workdir / "compiled")
            for job in waiting:
                _train(job, partial(attempt, stop=stop))
                ended(job.row)
    return sum(row.status == "failed" for row in rows.values())


@dataclass
class Row:
    """What a launch tells of one run."""

    name: str
    status: str = "waiting"
    progress: Progress | None = None
    error: str = ""
    started: float | None = None
    ended: float | None = None

    def follow(self, progress: Progress) -> None:
        self.progress = progress

    def skip(self, summary: dict[str, Any]) -> None:
        self.status = "skipped"
        steps, rate = summary["steps"], summary["images_per_second"]
        self.progress = Progress(steps, steps, summary, rate)

    @property
    def cells(self) -> tuple[str, ...]:
        """Name, status, step, train error, test error, images/s and time, as text."""
        status = f"{self.status}: {self.error}" if self.error else self.status
        if self.started is None:
            seconds = ""
        else:
            seconds = f"{(self.ended or time.monotonic()) - self.started:.0f} s"
        if self.progress is None:
            return self.name, status, "", "", "", "", seconds
        step, steps, metrics, rate = self.progress
        errors = (_percent(metrics.get(f"{split}_error")) for split in ("train", "test"))
        return self.name, status, f"{step}/{steps}", *errors, f"{rate:,.0f}", seconds


class Job(NamedTuple):
    """A run that is to be trained, where, and the row that tells of it."""

    run: Run
    folder: Path
    row: Row

    @property
    def program(self) -> str:
        """The same for runs that share a compiled program."""
        return digest(dataclasses.replace(self.run.config, seed=0))


LOOKS = 0.2  # seconds between two looks at what the workers do
COLUMNS = ("run", "status", "step", "train error", "test error", "images/s", "time")


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f} %"


def _train_at_once(
    jobs: list[Job],
    workers: int,
    compiled: Path,
    ended: Callable[[Row], None],
    stop: StopRequest,
) -> None:
    """Keeps every worker busy: with what it has compiled already, else with what nobody has."""
    lock = threading.Lock()
    begun: set[str] = set()

    def take(program: str) -> Job | None:
        with lock:
            own = (job for job in jobs if job.program == program)
            new = (job for job in jobs if job.program not in begun)
            chosen = next(chain(own, new, jobs), None)
            if chosen:
                jobs.remove(chosen)
                begun.add(chosen.program)
            return chosen

    def serve(worker: Worker) -> None:
        program = ""
        while job := take(program):
            program = job.program
            _train(job, worker.attempt)
            with lock:
                ended(job.row)

    made = [Worker(place, compiled) for place in places(workers)]
    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in made]
    with stop.graceful():
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                if stop.signal:
                    raise Stopped(stop.signal, "; the runs under way have saved")
                time.sleep(LOOKS)
        finally:
            for worker in made:
                worker.stop()
            for worker in made:
                worker.join()


def _train(job: Job, attempt: Callable[[Config, Path, Listener], Failure | None]) -> None:
    row, report = job.row, job.folder / "error.txt"
    row.status, row.started = "running", time.monotonic()
    report.unlink(missing_ok=True)
    if failure := attempt(job.run.config, job.folder, row.follow):
        row.status, row.error = "failed", failure.error
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(report, failure.report)
    else:
        row.status = "done"
    row.ended = time.monotonic()


def _seeds_together(plan: Plan) -> list[Run]:
    """The plan's runs; those that differ only in seed follow the first of them."""
    groups: dict[str, list[Run]] = {}
    for run in plan.runs:
        groups.setdefault(digest(dataclasses.replace(run.config, seed=0)), []).append(run)
    return [run for group in groups.values() for run in group]


def _require_data(plan: Plan) -> None:
    for name in {run.config.data.name for run in plan.runs}:
        datasets.open_dataset(name)


def _record(plan: Plan, workdir: Path, command: str) -> None:
    (workdir / "runs").mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "experiment.py", plan.experiment.read_text())
    runs = [{"folder": f"runs/{run.name}", "overrides": run.overrides} for run in plan.runs]
    content = {"experiment": plan.experiment.stem, "command": command, "runs": runs}
    records.write_json(workdir / "sweep.json", content)


def _summary(folder: Path, config: Config) -> dict[str, Any] | None:
    """The summary of a run that an earlier launch finished with the same config."""
    with suppress(UserError):  # damaged: training the run will say so
        if records.read_json(folder / "config.json") == to_dict(config):
            return records.read_summary(folder / "summary.json")
    return None


@contextmanager
def _board(rows: list[Row]) -> Iterator[Callable[[Row], None]]:
    """Shows the runs, and gives what is to be told when one has ended.

    On a terminal they are a live table, elsewhere a plain line as each ends.
    """
    console = Console()
    if console.is_terminal:
        with Live(get_renderable=lambda: _table(rows, console.height - 6), console=console):
            yield lambda row: None
    else:
        yield lambda row: print(*filter(None, _labelled(row)), sep="  ", flush=True)


def _labelled(row: Row) -> list[str]:
    name, status, step, train, test, rate, seconds = row.cells
    return [
        name,
        status,
        step and f"step {step}",
        train and f"train error {train}",
        test and f"test error {test}",
        rate and f"{rate} images/s",
        seconds,
    ]


def _table(rows: list[Row], height: int) -> Table:
    """The runs around the one that is running, as many as fit; at the end all of them."""
    ended = [row.status in ("done", "skipped", "failed") for row in rows]
    table = Table(title=f"{sum(ended)} of {len(rows)} runs ended", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, no_wrap=True, justify="left" if column in COLUMNS[:2] else "right")
    running = next((at for at, row in enumerate(rows) if row.status == "running"), 0)
    shown = len(rows) if all(ended) else max(height, 1)
    first = max(0, min(running - shown // 2, len(rows) - shown))
    for row in rows[first : first + shown]:
        table.add_row(*row.cells)
    return table
