"""Standard output and error that outlive their reader, and that any encoding can write.

A terminal, a pipe or a log file may go away while a program works for days: an ssh session is lost,
`tee` dies, a disk fills up. What a program computes does not depend on who reads its messages.
"""

import codecs
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from resjax.errors import UserError

GROUP_SIGNALS = signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
"""Signals that a terminal or a scheduler sends to all processes of a job."""

ASCII = {"±": "+/-", "×": "x", "·": "*", "–": "-", "─": "-", "►": ">"}


@contextmanager
def standard_streams() -> Iterator[Callable[[], None]]:
    """Makes stdout and stderr of this process robust; yields a function `keep_going`.

    Characters that the encoding of a stream lacks are written in ASCII. What cannot be written to
    stderr is dropped, and after `keep_going` to stdout too; `keep_going` also ignores SIGHUP.
    Until then, stdout is the command's product: a reader that is gone raises BrokenPipeError, and
    anything else, such as a full disk, UserError.

    Streams that a caller has replaced, such as a test, stay as they are.
    """
    for number in range(3):
        _fill_closed_descriptor(number)
    codecs.register_error("resjax_ascii", _replace_by_ascii)
    raw = {}
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):
            raw[name] = _Output(number, required=name == "stdout")
    before = {name: getattr(sys, name) for name in raw}
    hangup: Any = signal.getsignal(signal.SIGHUP)

    def keep_going() -> None:
        for output in raw.values():
            output.required = False
        if "stdout" in raw:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    for name, output in raw.items():
        setattr(sys, name, output.as_text(before[name]))
    try:
        yield keep_going
    finally:
        signal.signal(signal.SIGHUP, hangup)
        for name, output in raw.items():
            output.required = False  # what is left of a failed command is dropped
            getattr(sys, name).flush()
            setattr(sys, name, before[name])


@contextmanager
def group_signals_blocked() -> Iterator[None]:
    """Blocks the signals that only the main process handles, here and in processes started here.

    SIGTERM is not among them: it is how the main process ends the others.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Output(io.FileIO):
    """The file descriptor of a standard stream."""

    def __init__(self, number: int, required: bool):
        super().__init__(number, "w", closefd=False)
        self.required = required

    def write(self, content: Any) -> int:
        try:
            return super().write(content) or 0
        except OSError as error:
            if not self.required:
                return len(content)
            if error.errno == errno.EPIPE:
                raise
            raise UserError(f"cannot write to standard output: {error.strerror}") from error

    def as_text(self, like: TextIO | None) -> io.TextIOWrapper:
        """Returns a text stream in the encoding of another; UTF-8 for a stream that was closed."""
        return io.TextIOWrapper(
            io.BufferedWriter(self),
            encoding=like.encoding if like else "utf-8",
            errors="resjax_ascii",
            line_buffering=self.isatty() or self.fileno() == 2,
            write_through=getattr(like, "write_through", False),
        )


def _fill_closed_descriptor(number: int) -> None:
    """Opens a closed descriptor, so that no file of the program gets its number and messages.

    It is opened for reading, so that writing to it fails as it does for a closed one.
    """
    try:
        os.fstat(number)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)  # the lowest one that is closed


def _replace_by_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    escaped = (char.encode("ascii", "backslashreplace").decode() for char in missing)
    text = "".join(ASCII.get(char, code) for char, code in zip(missing, escaped, strict=True))
    return text, error.end
