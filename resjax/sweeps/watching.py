"""Follows a launch whose workers are on other machines, by reading its sweep folder."""

import time
from collections.abc import Callable

from resjax.sweeps.failures import Retries
from resjax.sweeps.plan_files import StoredPlan
from resjax.sweeps.reading import RunsReader
from resjax.sweeps.settled import settle
from resjax.sweeps.status import FINISHED, FINISHED_BEFORE, RUNNING, RunStatus, State

LOOK_SECONDS = 2.0  # between two looks at the runs
LOOK_COST = 10.0  # the pause after a look is at least this many times as long as the look


class SweepWatch:
    """Follows the runs of a plan that are left."""

    def __init__(self, stored: StoredPlan, retries: Retries, show_end: Callable[[RunStatus], None]):
        """Looks at no run yet.

        Args:
          stored: the plan.
          retries: how often a run that failed is tried again.
          show_end: called with each run that has ended.
        """
        self.left = list(stored.runs)
        self._runs, self._measure = stored.runs, stored.measure
        self._retries, self._show_end = retries, show_end
        self._reader = RunsReader()
        self._state = FINISHED_BEFORE  # given to runs that the first look finds finished
        self._next = 0.0

    @property
    def open(self) -> list[RunStatus]:
        """The runs that are left and that no process held at the last look."""
        return [run for run in self.left if run.state not in RUNNING]

    @property
    def unfinished(self) -> int:
        """The number of runs that are not finished."""
        return sum(run.state not in FINISHED for run in self._runs)

    def held_by(self, job: str) -> list[RunStatus]:
        """Returns the runs that processes of a SLURM or Ray job held at the last look."""
        return [run for run in self.left if run.holder and run.holder.get("job") == job]

    def look(self, again: bool = False) -> None:
        """Updates the state of each run that is left.

        Args:
          again: whether to look even if the last look was just now.
        """
        start = time.monotonic()
        if start < self._next and not again:
            return
        self._reader.read(self.left, self._measure)
        self.left = [run for run in self.left if not self._ended(run)]
        self._state = str(State.FINISHED)
        now = time.monotonic()
        self._next = now + max(LOOK_SECONDS, LOOK_COST * (now - start))

    def _ended(self, run: RunStatus) -> bool:
        if run.state in RUNNING:
            run.started = run.started or time.monotonic()
            return False
        if settle(run, self._measure, self._retries, self._state):
            self._show_end(run)
            return True
        run.state, run.error = State.QUEUED, ""
        return False
