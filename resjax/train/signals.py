"""SIGTERM and Ctrl-C: finish what is under way, save, and leave with a code that says so.

A run that is asked to stop ends between two dispatches. Python runs a handler only when the main
thread comes back from C, which while XLA compiles takes minutes; so the bytes that the interpreter
writes on a signal are read by a thread of their own, and what has nothing to save ends at once.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = signal.SIGINT, signal.SIGTERM


class Stopped(BaseException):
    """A run ended early because it was asked to; it has saved where it is."""

    def __init__(self, by: int, what: str):
        super().__init__(f"stopped by {signal.Signals(by).name}{what}")
        self.code = 128 + by  # what a shell says of a process that a signal ended


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self, notify: Callable[[str], None] = lambda _: None):
        """Nobody has asked yet; `notify` is told what comes of a signal."""
        self.signal: int | None = None
        self._notify = notify
        self._saves = False
        self._calls = 0

    def requested(self) -> bool:
        """Whether to stop here; several processes agree, and stop at the same call."""
        import jax

        if jax.process_count() == 1:
            return self.signal is not None
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        self._calls += 1
        if reached_preemption_sync_point(self._calls):
            self.signal = self.signal or signal.SIGTERM
            return True
        return False

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """Within it somebody looks at `asked` and saves; elsewhere a signal ends the process."""
        self._saves = True
        try:
            yield
        finally:
            self._saves = False

    def receive(self, number: int) -> None:
        """A signal came."""
        if not self._saves or (self.signal is not None and number == signal.SIGINT):
            self._notify(f"{_name(number)}: left at once")
            os._exit(128 + number)
        if self.signal is None:
            self.signal = number
            self._notify(f"{_name(number)}: saving after this dispatch; Ctrl-C leaves at once")


@contextmanager
def stop_on_signals(
    ours: tuple[int, ...] = SIGNALS,
    together: bool = False,
    notify: Callable[[str], None] = lambda _: None,
) -> Iterator[StopRequest]:
    """Takes SIGTERM and Ctrl-C over, for a command or a worker process; from its main thread.

    Args:
      ours: the signals.
      together: whether processes train together: then JAX keeps SIGTERM, to agree on when to stop,
        and Ctrl-C becomes one.
      notify: is told what comes of a signal.
    """
    stop = StopRequest(notify)
    ours = tuple(each for each in ours if each == signal.SIGINT or not together)
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def read() -> None:
        while received := reading.recv(1):
            if received[0] not in ours:
                continue
            stop.receive(received[0])
            if together:
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    before: dict[int, Any] = {each: signal.signal(each, lambda *_: None) for each in ours}
    before_fd = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(before_fd)
        for each, handler in before.items():
            signal.signal(each, handler)
        writing.close()
        thread.join()
        reading.close()


def _name(number: int) -> str:
    return signal.Signals(number).name
