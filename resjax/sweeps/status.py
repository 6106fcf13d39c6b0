"""The state of each run of a sweep, and its display."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from resjax.config import Config, from_dict
from resjax.run_files import DamagedFileError, find_divergence
from resjax.text import printable
from resjax.train.lock import HEARTBEAT_SECONDS
from resjax.train.progress import Progress, describe


class State(StrEnum):
    """The state of a run, as its folder says it to anybody who looks."""

    QUEUED = "queued"  # has not begun
    RUNNING = "running"
    MEASURING = "measuring"  # trained; the experiment's `measure` is called
    INTERRUPTED = "interrupted"  # has begun, and no process trains it
    FINISHED = "finished"  # and measured, if the experiment has a `measure`
    FAILED = "failed"
    DIVERGED = "diverged"


COLUMNS = ("run", "state", "step", "metrics", "time")
SILENCE_SECONDS = 2 * HEARTBEAT_SECONDS  # without a beat, which is then worth a word
HELD = "running elsewhere"
TRIED_AGAIN = "failed, tried again"
PENDING = State.QUEUED, HELD, TRIED_AGAIN
RUNNING = State.RUNNING, State.MEASURING
FINISHED_BEFORE = "finished before"  # this launch, which skips it
FINISHED = tuple(
    f"{word}{end}" for word in (State.FINISHED, FINISHED_BEFORE) for end in ("", ", diverged")
)


class Measuring(NamedTuple):
    """Reports that a run is trained, and that the experiment's `measure` is called."""


@dataclass(eq=False)
class RunStatus:
    """One run of a sweep: what it is, where it is, and how far it is."""

    folder: Path
    content: dict[str, Any]  # the config, as `to_dict` returns it
    program: str  # equal for runs that share a compiled program
    state: str = State.QUEUED
    error: str = ""
    progress: Progress | None = None
    started: float | None = None
    ended: float | None = None
    attempts: int = 0  # that failed, as far as this process knows
    failed_before: bool = False  # if so, other runs come first
    retry: bool = False  # if it failed, whether its launch tries it again
    holder: dict[str, Any] | None = None  # of its lock, and the holder's notes
    alive: bool = False  # whether the holder is known to live
    beat_seconds: float | None = None  # since its last beat; None if this process has seen none
    seconds_left: float | None = None

    @property
    def steps(self) -> int | None:
        """The steps of the whole run, or None without a config."""
        return self._field("train", "steps")

    @property
    def batch_size(self) -> int | None:
        """The images per step, or None without a config."""
        return self._field("data", "batch_size")

    def _field(self, section: str, name: str) -> int | None:
        fields = self.content.get(section)
        value = fields.get(name) if isinstance(fields, dict) else None
        return value if type(value) is int else None

    def observe(
        self,
        state: State,
        error: str = "",
        progress: Progress | None = None,
        holder: dict[str, Any] | None = None,
        alive: bool = False,
        beat_seconds: float | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Sets what the folder of the run says; omitted values are unknown."""
        self.state, self.error, self.progress = state, error, progress
        self.holder, self.alive, self.beat_seconds = holder, alive, beat_seconds
        self.seconds_left, self.attempts, self.retry = seconds_left, 0, False

    @cached_property
    def config(self) -> Config:
        """The resolved config."""
        return from_dict(self.content)

    def begin(self) -> None:
        """Starts an attempt."""
        self.state, self.error, self.progress = "running", "", None
        self.started, self.ended = time.monotonic(), None

    def update(self, message: Progress | Measuring) -> None:
        """Updates the progress or the state by a report of the process that trains the run."""
        if isinstance(message, Progress):
            self.progress = message
        else:
            self.state = "measuring"

    def end(self, state: str, error: str = "") -> None:
        """Sets the final state, and why the run failed or when and why it diverged."""
        if self.started is not None:
            self.ended = time.monotonic()
        self.state, self.error = state, error
        with suppress(DamagedFileError, OSError):  # the report names it
            diverged = find_divergence(self.folder)
            if diverged and (
                not state.startswith("failed") or diverged.reason in " ".join(error.split())
            ):
                self.state = "diverged" if state == "failed" else f"{state}, diverged"
                self.error = f"step {diverged.step}: {diverged.reason}"

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts for `COLUMNS`."""
        state = f"{self.state}{self._place}" + (f": {self.error}" if self.error else "")
        step = metrics = seconds = ""
        if self.progress is not None:
            step = f"step {self.progress.step}/{self.progress.steps}"
            metrics = describe(self.progress)
        if self.started is not None:
            seconds = f"{(self.ended or time.monotonic()) - self.started:.0f} s"
        elif self.seconds_left is not None:
            seconds = f"{duration(self.seconds_left)} left"
        return self.folder.name, state, step, metrics, seconds

    @property
    def _place(self) -> str:
        """Where the run is trained, and when its holder last beat, if that may be long ago."""
        if self.holder is None:
            return ""
        place = f" on {self.holder.get('host', 'an unknown host')}"
        if job := self.holder.get("job"):
            place += f" ({job})"
        if self.beat_seconds is not None and self.beat_seconds >= SILENCE_SECONDS:
            return f"{place}, last beat {duration(self.beat_seconds)} ago"
        return place if self.alive else f"{place}, last beat unknown"


def duration(seconds: float) -> str:
    """Returns a time in the unit that suits it: `45 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for unit, length, least, form in (
        ("days", 86_400, 48 * 3600, ".1f"),
        ("h", 3600, 90 * 60, ".1f"),
        ("min", 60, 90, ".0f"),
    ):
        if seconds >= least:
            return f"{seconds / length:{form}} {unit}"
    return f"{seconds:.0f} s"


@contextmanager
def shown(runs: Sequence[RunStatus]) -> Iterator[Callable[[RunStatus], None]]:
    """Shows the runs and yields a function to call when one of them has ended.

    A terminal gets a live table, anything else one line per run that has ended.
    """
    console = Console()
    if console.is_terminal:
        with Live(get_renderable=lambda: _table(runs, console.height - 6), console=console):
            yield lambda run: None
    else:
        yield print_line


def print_line(run: RunStatus) -> None:
    """Prints a run that has ended on one line."""
    # A single write, because the threads of several workers print.
    sys.stdout.write("  ".join(filter(None, run.cells)) + "\n")
    sys.stdout.flush()


def _table(runs: Sequence[RunStatus], height: int) -> Table:
    """Returns a table of `height` runs around the first that is running; of all at the end."""
    ended = [run.state not in (*PENDING, *RUNNING) for run in runs]
    shown = Table(title=f"{sum(ended)} of {len(runs)} runs ended", title_justify="left")
    for column in COLUMNS:
        shown.add_column(column, no_wrap=True, justify="left" if column in COLUMNS[:2] else "right")
    running = next((index for index, run in enumerate(runs) if run.state in RUNNING), 0)
    rows = len(runs) if all(ended) else max(height, 1)
    first = max(0, min(running - rows // 2, len(runs) - rows))
    for run in runs[first : first + rows]:
        shown.add_row(*(Text(printable(cell)) for cell in run.cells))
    return shown
