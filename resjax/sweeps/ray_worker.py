"""A worker of a sweep that ends with the Ray task that has started it; see `ray_task`."""

import os
import signal
import sys
import threading

from resjax.sweeps import worker


def main() -> int:
    """Works on the sweep that the arguments name, until the task ends; returns the exit code."""
    threading.Thread(target=_end_with_task, daemon=True).start()
    return worker.main()


def _end_with_task() -> None:
    """Saves and ends when the process of the task is killed, which closes this one's stdin."""
    while os.read(0, 1):  # not sys.stdin, whose lock this thread would hold at the end
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
