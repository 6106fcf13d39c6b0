"""Pauses processes, so that no result of a test depends on which of two is faster."""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path


def pause(process: int) -> bool:
    """Pauses a process; returns whether it is alive."""
    try:
        os.kill(process, signal.SIGSTOP)
    except ProcessLookupError:
        return False
    return True


def go_on(process: int) -> None:
    """Lets a paused process run, unless it has been killed."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGCONT)


def signalled(process: int) -> bool:
    """Returns whether a signal waits for a paused process, or has let it run or killed it."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True
    waiting = any(int(found, 16) for found in re.findall(r"(?:Shd|Sig)Pnd:\s*(\w+)", status))
    return waiting or not re.search(r"State:\s*T", status)
