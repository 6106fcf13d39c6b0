"""A follower as a process beside a training process.

The follower learns from its standard input that the training has ended: the pipe is closed, also if
the training process is killed. It then gives the tracker what is left and ends by itself. Training
never waits for it; the training process waits before it exits, because a scheduler may kill what it
leaves behind.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import NamedTuple

from resjax.errors import UserError, one_line
from resjax.machine import module_search_path
from resjax.tracking import End, find_tracker, require_tracker
from resjax.tracking.follower import POLL_SECONDS, UNFINISHED, RunFollower, Target

END_SECONDS = 60.0
"""How long a process waits at its end for its followers."""

NICENESS = 10  # a ninth of the share of a core that training gets; at 19 it would get nearly none
LONGEST_REASON = 4000  # characters, which fit into the buffer of a pipe


class Follower(NamedTuple):
    """A follower's process."""

    process: "subprocess.Popen[bytes]"
    tracker: str
    run: Path
    warn: Callable[[str], None]

    def end(self, reason: str) -> None:
        """Tells the follower that the training has ended; does not wait.

        Args:
          reason: why the training failed, or "".
        """
        assert self.process.stdin is not None
        with suppress(BrokenPipeError), self.process.stdin as pipe:
            pipe.write(reason[:LONGEST_REASON].encode(errors="backslashreplace"))

    def has_ended(self, seconds: float) -> bool:
        """Returns whether the process ends within so many seconds; warns if it has failed."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        if code:
            self._warn(f"the follower ended with code {code}")
        return True

    def leave(self) -> None:
        """Warns that the follower goes on without this process."""
        self._warn("the follower is still writing")

    def _warn(self, problem: str) -> None:
        self.warn(
            f"track={self.tracker}: {problem}; `resjax track {self.run} --to={self.tracker}` "
            "writes what is missing"
        )


_ending: list[Follower] = []


@contextmanager
def following(tracker: str, run: Path, warn: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yields a function that starts a follower of a run, which ends after the context does.

    Args:
      tracker: its name; the function does nothing if it is empty.
      run: the run folder.
      warn: called if the follower cannot start or fails.

    Raises:
      UserError: there is no such tracker, or its package is not installed.
    """
    require_tracker(tracker)
    started: list[Follower] = []

    def start() -> None:
        if not tracker:
            return
        try:
            started.append(Follower(_start(tracker, run), tracker, run, warn))
        except OSError as error:
            warn(f"track={tracker}: cannot start a follower ({one_line(error)})")

    reason = ""
    try:
        yield start
    except Exception as error:
        reason = " ".join(str(error).split()) if isinstance(error, UserError) else one_line(error)
        raise
    finally:
        _ending[:] = [follower for follower in _ending if not follower.has_ended(0)]
        for follower in started:
            if not _ending:  # also in processes of multiprocessing, which run no `atexit`
                Finalize(None, wait_for_followers, exitpriority=1)
            follower.end(reason)
            _ending.append(follower)


def wait_for_followers() -> None:
    """Waits until the followers of runs that have ended have written all, or END_SECONDS."""
    deadline = time.monotonic() + END_SECONDS
    while _ending:
        follower = _ending.pop()
        if not follower.has_ended(max(0, deadline - time.monotonic())):
            follower.leave()


def _start(tracker: str, run: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(module_search_path()),
        "PYTHONSAFEPATH": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "resjax.tracking", tracker, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # a terminal's or a scheduler's signals are for the training
    )


def follow_parent(tracker: str, run: Path) -> int:
    """Follows one run until the standard input ends; returns the exit code."""
    os.nice(NICENESS)
    ended = threading.Event()
    received: list[str] = []

    def read() -> None:
        received.append(sys.stdin.read())
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    follower = RunFollower(run, Target(tracker, find_tracker(tracker, "track")))
    while not ended.wait(POLL_SECONDS):
        follower.update()
    left = End("failed", received[0]) if received[0] else UNFINISHED
    deadline = time.monotonic() + END_SECONDS
    follower.update(left)
    while follower.in_use and time.monotonic() < deadline:  # by the follower of a killed training
        time.sleep(POLL_SECONDS)
        follower.update(left)
    if follower.problem:
        print(f"resjax: track={tracker}: {follower.problem}", file=sys.stderr)
    return 1 if follower.problem else 0
