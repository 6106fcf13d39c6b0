"""A follower as a process beside a training process.

The follower learns from its standard input that the training has ended: the pipe is closed, also if
the training process is killed. It then gives the tracker what is left and ends by itself. The
training process never reads from it and never waits for it before its own work is done.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from resjax.errors import UserError, one_line
from resjax.machine import module_search_path
from resjax.tracking import End, find_tracker, require_tracker
from resjax.tracking.follower import UNFINISHED, RunFollower, Target, track

END_SECONDS = 30.0
"""How long the end of a run waits for the end of its follower."""

NICENESS = 19  # the follower runs when the training leaves a core idle


@contextmanager
def following(name: str, run: Path, warn: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yields a function that starts a follower of a run; waits at the end until it has written all.

    Args:
      name: of the tracker; the function does nothing if it is empty.
      run: the run folder.
      warn: called if the follower cannot start or fails.

    Raises:
      UserError: there is no such tracker, or its package is not installed.
    """
    require_tracker(name)
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        if name:
            try:
                processes.append(_start(name, run))
            except OSError as error:
                why = one_line(error)
                warn(f"track={name}: cannot start a follower ({why}); {_later(name, run)}")

    reason = ""
    try:
        yield start
    except Exception as error:
        reason = " ".join(str(error).split()) if isinstance(error, UserError) else one_line(error)
        raise
    finally:
        for process in processes:
            _end(process, reason, name, run, warn)


def _start(name: str, run: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(module_search_path()),
        "PYTHONSAFEPATH": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "resjax.tracking", name, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # a terminal's or a scheduler's signals are for the training
    )


def _end(
    process: subprocess.Popen[bytes],
    reason: str,
    name: str,
    run: Path,
    warn: Callable[[str], None],
) -> None:
    """Closes the follower's input, and waits for its end."""
    with suppress(subprocess.TimeoutExpired):
        process.communicate(reason.encode(errors="backslashreplace"), END_SECONDS)
    if process.returncode is None:
        warn(f"track={name}: the follower goes on writing; {_later(name, run)} if it does not end")
    elif process.returncode:
        warn(
            f"track={name}: the follower ended with code {process.returncode}; {_later(name, run)}"
        )


def _later(name: str, run: Path) -> str:
    return f"`resjax track {run} --to={name}` writes what is missing"


def follow_parent(name: str, run: Path) -> int:
    """Follows one run until the standard input ends; returns the exit code."""
    os.nice(NICENESS)
    ended = threading.Event()
    received: list[str] = []

    def read() -> None:
        received.append(sys.stdin.read())
        ended.set()

    threading.Thread(target=read, daemon=True).start()

    def wait(seconds: float) -> End | None:
        if not ended.wait(seconds):
            return None
        return End("failed", received[0]) if received[0] else UNFINISHED

    problems: list[str] = []

    def report(follower: RunFollower, _: Path) -> None:
        problems[:] = filter(None, [follower.problem])

    track(run, Target(name, find_tracker(name, "track")), report, wait)
    for problem in problems:
        print(f"resjax: track={name}: {problem}", file=sys.stderr)
    return 1 if problems else 0
