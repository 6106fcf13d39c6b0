"""What the sweep folder says about the runs of a launch whose workers are elsewhere."""

import time
from collections.abc import Callable
from typing import Any

from resjax.sweeps.failures import Retries
from resjax.sweeps.plan_files import StoredPlan
from resjax.sweeps.settled import settle
from resjax.sweeps.status import FINISHED, FINISHED_BEFORE, RUNNING, RunStatus, State
from resjax.train.lock import HELD, Watch
from resjax.train.progress import Progress

LOOK_SECONDS = 2.0  # between two looks at the runs
LOOK_COST = 10.0  # a look takes at most the tenth part of the time, however many runs there are


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
        self._locks = Watch()
        self._state = FINISHED_BEFORE  # of a run that the first look finds finished
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
        return [run for run in self.left if self._holder(run).get("job") == job]

    def look(self) -> None:
        """Updates the state of each run that is left, unless the last look was just now."""
        start = time.monotonic()
        if start < self._next:
            return
        self.left = [run for run in self.left if not self._ended(run)]
        self._state = str(State.FINISHED)
        now = time.monotonic()
        self._next = now + max(LOOK_SECONDS, LOOK_COST * (now - start))

    def _ended(self, run: RunStatus) -> bool:
        if settle(run, self._measure, self._retries, self._state):
            self._show_end(run)
            return True
        if self._locks.state(run.folder) != HELD:
            run.state = State.QUEUED
            return False
        if run.state not in RUNNING:
            run.begin()
        _read_note(run, self._holder(run))
        return False

    def _holder(self, run: RunStatus) -> dict[str, Any]:
        return self._locks.holder(run.folder) or {}


def _read_note(run: RunStatus, holder: dict[str, Any]) -> None:
    """Shows what the holder of a run says about it."""
    run.state = "measuring" if holder.get("state") == "measuring" else "running"
    step, steps = holder.get("step"), holder.get("steps")
    if isinstance(step, int) and isinstance(steps, int):
        run.progress = Progress(step, steps, {}, holder.get("images_per_second", 0.0))
