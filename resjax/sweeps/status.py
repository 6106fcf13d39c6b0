"""The state of each run of a sweep while it is trained, and its display."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table

from resjax.config import Config, from_dict
from resjax.run_files import DamagedFileError, find_divergence
from resjax.train.progress import Progress, describe

COLUMNS = ("run", "state", "step", "metrics", "time")
HELD = "held"
TRIED_AGAIN = "failed, tried again"
PENDING = "waiting", HELD, TRIED_AGAIN
RUNNING = "running", "measuring"
FINISHED = "done", "skipped", "done, diverged", "skipped, diverged"


class Measuring(NamedTuple):
    """Reports that a run is trained, and that the experiment's `measure` is called."""


@dataclass(eq=False)
class RunStatus:
    """One run of a sweep: what it is, where it is, and how far it is."""

    folder: Path
    content: dict[str, Any]  # the config, as `to_dict` returns it
    program: str  # equal for runs that share a compiled program
    state: str = "waiting"
    error: str = ""
    progress: Progress | None = None
    started: float | None = None
    ended: float | None = None
    attempts: int = 0  # that failed, as far as this process knows
    failed_before: bool = False  # if so, other runs come first

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
        state = f"{self.state}: {self.error}" if self.error else self.state
        step = metrics = seconds = ""
        if self.progress is not None:
            step = f"step {self.progress.step}/{self.progress.steps}"
            metrics = describe(self.progress)
        if self.started is not None:
            seconds = f"{(self.ended or time.monotonic()) - self.started:.0f} s"
        return self.folder.name, state, step, metrics, seconds


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
    table = Table(title=f"{sum(ended)} of {len(runs)} runs ended", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, no_wrap=True, justify="left" if column in COLUMNS[:2] else "right")
    running = next((index for index, run in enumerate(runs) if run.state in RUNNING), 0)
    rows = len(runs) if all(ended) else max(height, 1)
    first = max(0, min(running - rows // 2, len(runs) - rows))
    for run in runs[first : first + rows]:
        table.add_row(*run.cells)
    return table
