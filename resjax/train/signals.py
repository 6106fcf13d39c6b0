"""Signals: training saves before it ends, and the exit code names the signal.

Ctrl-C, SIGTERM, and SIGUSR1 and SIGUSR2, by which schedulers warn of the time limit, save and end.
SIGHUP, from a terminal that is gone, saves and goes on. `--save-on` changes the last three.

Python runs a signal handler only when the main thread returns from C code, which takes minutes
while XLA compiles. The interpreter also writes each signal's number to a socket; a thread reads it
there, so a process that has nothing to save ends at once.
"""

import argparse
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from resjax.terminal import GROUP_SIGNALS

SIGNALS = signal.SIGTERM, *GROUP_SIGNALS
SAVE_ON = (signal.SIGHUP,)


def signal_names(text: str) -> tuple[int, ...]:
    """Parses a list of signal names such as HUP,USR1, as a type of argparse; "" has no signals."""
    names = [name.strip().upper().removeprefix("SIG") for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in ("HUP", "USR1", "USR2")]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not HUP, USR1 or USR2")
    return tuple(signal.Signals[f"SIG{name}"] for name in names)


class Stopped(BaseException):
    """A run was stopped by a signal and has saved its state."""

    def __init__(self, number: int, details: str):
        super().__init__(f"stopped by {signal.Signals(number).name}{details}")
        self.code = 128 + number  # as a shell reports a process that a signal ended


class StopRequest:
    """Whether a signal has requested this process to stop."""

    def __init__(
        self,
        notify: Callable[[str], None] = lambda _: None,
        save_on: tuple[int, ...] = SAVE_ON,
    ):
        """Creates a request that no signal has made yet.

        Args:
          notify: receives a line about what a signal does.
          save_on: the signals after which a run saves and goes on; the others end it.
        """
        self.signal: int | None = None
        self.save_on = save_on
        self._notify = notify
        self._save = False
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

    def take_save_request(self) -> bool:
        """Returns whether a signal has requested a checkpoint since the last call."""
        taken, self._save = self._save, False
        return taken

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
        if number in self.save_on:
            self._save = self._graceful
            when = (
                "saves after the current steps and" if self._graceful else "has nothing to save and"
            )
            self._notify(f"{name}: {when} goes on")
            return
        if not self._graceful or (self.signal is not None and number == signal.SIGINT):
            self._notify(f"{name}: exits at once")
            os._exit(128 + number)
        if self.signal is None:
            self.signal = number
            self._notify(f"{name}: saves after the current steps; Ctrl-C exits at once")


@contextmanager
def stop_on_signals(
    signals: tuple[int, ...] = SIGNALS,
    together: bool = False,
    notify: Callable[[str], None] = lambda _: None,
    save_on: tuple[int, ...] = SAVE_ON,
) -> Iterator[StopRequest]:
    """Handles signals in a command or worker process; call it in the main thread.

    Args:
      signals: to handle.
      together: whether several processes train together. JAX then handles SIGTERM, to agree on a
        step at which all stop, and other signals that end a run are passed on as SIGTERM.
      notify: receives a line about what a signal does.
      save_on: the signals after which a run saves and goes on; the others end it.
    """
    stop = StopRequest(notify, save_on)
    handled = [each for each in signals if each != signal.SIGTERM or not together]
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def receive_all() -> None:
        while received := reader.recv(1):
            number = received[0]
            if number in handled:
                stop.receive(number)
                if together and number not in save_on:
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
