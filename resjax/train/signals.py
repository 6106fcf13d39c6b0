"""SIGTERM and Ctrl-C: training saves before it ends, and the exit code names the signal.

Python runs a signal handler only when the main thread returns from C code, which takes minutes
while XLA compiles. The interpreter also writes each signal's number to a socket; a thread reads it
there, so a process that has nothing to save ends at once.
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
    """A run was stopped by a signal and has saved its state."""

    def __init__(self, number: int, details: str):
        super().__init__(f"stopped by {signal.Signals(number).name}{details}")
        self.code = 128 + number  # as a shell reports a process that a signal ended


class StopRequest:
    """Whether a signal has requested this process to stop."""

    def __init__(self, notify: Callable[[str], None] = lambda _: None):
        """Creates a request that no signal has made yet; `notify` receives what a signal does."""
        self.signal: int | None = None
        self._notify = notify
        self._graceful = False
        self._calls = 0

    def requested(self) -> bool:
        """Returns whether to stop now; several processes agree on the same call."""
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
        """A context whose code calls `requested` and saves; elsewhere a signal ends the process."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    def receive(self, number: int) -> None:
        """Handles a signal: the first requests a stop, a second Ctrl-C ends the process."""
        name = signal.Signals(number).name
        if not self._graceful or (self.signal is not None and number == signal.SIGINT):
            self._notify(f"{name}: exits at once")
            os._exit(128 + number)
        if self.signal is None:
            self.signal = number
            self._notify(f"{name}: saves after this dispatch; Ctrl-C exits at once")


@contextmanager
def stop_on_signals(
    signals: tuple[int, ...] = SIGNALS,
    together: bool = False,
    notify: Callable[[str], None] = lambda _: None,
) -> Iterator[StopRequest]:
    """Handles SIGTERM and Ctrl-C in a command or worker process; call it in the main thread.

    Args:
      signals: to handle.
      together: whether several processes train together. JAX then handles SIGTERM, to agree on a
        step at which all stop, and Ctrl-C is passed on as SIGTERM.
      notify: receives a line about what a signal does.
    """
    stop = StopRequest(notify)
    handled = [each for each in signals if each == signal.SIGINT or not together]
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def receive_all() -> None:
        while received := reader.recv(1):
            if received[0] in handled:
                stop.receive(received[0])
                if together:
                    os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=receive_all, daemon=True)
    thread.start()
    old_handlers: dict[int, Any] = {each: signal.signal(each, lambda *_: None) for each in handled}
    old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(old_fd)
        for each, handler in old_handlers.items():
            signal.signal(each, handler)
        writer.close()
        thread.join()
        reader.close()
