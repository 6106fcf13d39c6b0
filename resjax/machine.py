"""What this machine offers to a process."""

import os


def available_cores() -> int:
    """Returns the number of cores this process may use.

    macOS has no `os.sched_getaffinity`; there it is the number of cores of the machine.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
