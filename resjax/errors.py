"""Errors that the user can fix, reported in one line with exit code 2."""

import re
import traceback
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A user's mistake; the message says what is wrong, where, and how to fix it."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """Returns an error's type and message on one line, without the addresses of objects in it."""
    message = re.sub(r"<\w[^>]* object at 0x\w+>", "", str(error))
    text = " ".join(f"{type(error).__name__}: {message}".split()).removesuffix(":")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def error_in(file: Path, error: Exception) -> str:
    """Returns an error of the user's code in `file`, on one line with the file and the line."""
    if isinstance(error, SyntaxError):
        where = file if error.filename in (str(file), str(file.absolute())) else error.filename
        return f"{where}:{error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    numbers = [f.lineno for f in frames if Path(f.filename).absolute() == file.absolute()]
    line = f":{numbers[-1]}" if numbers else ""
    return f"{file}{line}: {error if isinstance(error, UserError) else one_line(error)}"


def first_few(items: Iterable[str], shown: int = 5, separator: str = ", ") -> str:
    """Returns the first items as one line of a message, and how many more there are."""
    items = list(items)
    more = [f"and {len(items) - shown:,} more"] if len(items) > shown else []
    return separator.join([*items[:shown], *more])
