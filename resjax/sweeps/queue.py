"""A queue of the runs that are left in a sweep; workers take one run after the other from it.

The queue is the sweep folder: a run is finished, or claimed by the process that holds the lock in
its folder, or left. So any number of launchers, on any number of machines that share the folder,
work on one sweep at the same time. A worker looks at a run when its turn comes, never at all runs.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from resjax.run_files import RunError, find_error
from resjax.sweeps.attempts import Attempt, Finished, Held, Job, Outcome
from resjax.sweeps.failures import Failure, Retries, remove_error
from resjax.sweeps.measure import Measure
from resjax.sweeps.settled import settle
from resjax.sweeps.status import HELD, TRIED_AGAIN, RunStatus, State
from resjax.train import lock
from resjax.train.signals import StopRequest

POLL_SECONDS = 1.0  # between two looks at runs that other processes hold


class RunQueue:
    """The runs that wait for training; the threads of several workers share it."""

    def __init__(
        self,
        runs: Sequence[RunStatus],
        measure: Measure | None,
        retries: Retries,
        show_end: Callable[[RunStatus], None],
        stop: StopRequest,
        wait: bool = True,
    ):
        """Looks at no run yet.

        Args:
          runs: all runs of the sweep, in its order.
          measure: the experiment's `measure`, if it has one.
          retries: how often a run that failed is tried again.
          show_end: called with each run that has ended.
          stop: a request to stop, after which no run is taken.
          wait: whether to wait for runs that other processes hold, and to take them over if their
            process dies; otherwise those runs are left to their processes.
        """
        self._measure, self._retries, self._show_end = measure, retries, show_end
        self._stop, self._wait = stop, wait
        self._runs, self._waiting = runs, _by_program(runs)
        self._later = deque[RunStatus]()  # runs that have failed before
        self._held = deque[RunStatus]()  # by other processes
        self._shown = set[RunStatus]()  # as held
        self._begun = set[str]()  # programs that some worker has compiled
        self._watch = lock.Watch()
        self._lock = threading.Lock()

    def skip_settled(self) -> bool:
        """Ends the runs that need no training; returns whether others are left."""
        left = [run for run in self._runs if not self._settle(run)]
        self._waiting = _by_program(left)
        return bool(left)

    def train(self, attempt: Attempt) -> None:
        """Trains and measures one run after the other until none is left."""
        program = ""
        while run := self._take(program):
            program = run.program
            self._conclude(run, attempt(self._job(run), run.update))

    def _job(self, run: RunStatus) -> Job:
        dead = self._watch.dead_token(run.folder)
        return Job(run.content, run.folder, self._measure, self._retries, run.attempts, dead)

    def _take(self, program: str) -> RunStatus | None:
        """Returns the next run; waits while other processes hold all that are left."""
        while not self._stop.signal:
            with self._lock:
                if run := self._next(program):
                    run.begin()
                    return run
                if not self._held:
                    break
                self._show_held()
            time.sleep(POLL_SECONDS)
        return None

    def _next(self, program: str) -> RunStatus | None:
        while run := self._pop(program):
            if self._is_open(run):
                return run
        for _ in range(len(self._held)):
            if self._is_open(run := self._held.popleft()):
                return run
        return None

    def _pop(self, program: str) -> RunStatus | None:
        """Removes a run of this program, else of a program that no worker has begun, else any."""
        if program not in self._waiting:
            new = (each for each in self._waiting if each not in self._begun)
            program = next(new, next(iter(self._waiting), ""))
        if not (runs := self._waiting.get(program)):
            return self._later.popleft() if self._later else None
        run = runs.popleft()
        if not runs:
            del self._waiting[program]
        self._begun.add(program)
        return run

    def _is_open(self, run: RunStatus) -> bool:
        """Returns whether to train a run now; one that is held, or has failed, comes later."""
        if self._is_held(run) or self._settle(run):
            return False
        if not run.failed_before and find_error(run.folder):
            run.failed_before = True
            self._later.append(run)
            return False
        return True

    def _is_held(self, run: RunStatus) -> bool:
        if self._watch.state(run.folder) != lock.HELD:
            return False
        run.state, run.error = HELD, lock.holder_name(self._watch.holder(run.folder) or {})
        # A worker that does not wait leaves the run to a holder that lives.
        if self._wait or not self._watch.beating(run.folder):
            self._held.append(run)
        return True

    def _show_held(self) -> None:
        """Shows each run for which the queue waits, once."""
        for run in {*self._held} - self._shown:
            self._shown.add(run)
            self._show_end(run)

    def _settle(self, run: RunStatus) -> bool:
        settled = settle(run, self._measure, self._retries)
        if settled:
            self._show_end(run)
        return settled

    def _conclude(self, run: RunStatus, outcome: Outcome) -> None:
        match outcome:
            case None:
                run.end(State.FINISHED, remove_error(run.folder))
                self._show_end(run)
            case Failure():
                self._fail(run, self._retries.record(run.folder, outcome, run.attempts))
            case RunError():
                self._fail(run, outcome)
            case _:
                self._leave(run, outcome)

    def _fail(self, run: RunStatus, error: RunError) -> None:
        run.attempts, run.failed_before = error.attempts, True
        run.end(TRIED_AGAIN if error.retry else error.state, error.error)
        self._show_end(run)
        if error.retry:
            run.started = None
            with self._lock:
                self._later.append(run)

    def _leave(self, run: RunStatus, outcome: Outcome) -> None:
        """Ends a run that another process has finished, or puts back one that it holds."""
        run.started = None
        if isinstance(outcome, Finished) and self._settle(run):
            return
        with self._lock:
            run.state, run.error = HELD, outcome.holder if isinstance(outcome, Held) else ""
            self._held.append(run)


def _by_program(runs: Iterable[RunStatus]) -> dict[str, deque[RunStatus]]:
    programs: dict[str, deque[RunStatus]] = {}
    for run in runs:
        programs.setdefault(run.program, deque()).append(run)
    return programs
