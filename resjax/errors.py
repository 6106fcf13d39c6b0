"""Errors that the user can fix, reported in one line with exit code 2."""

import re
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake; the message says what is wrong, where, and how to fix it."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """Returns an error's type and message on one line, without the addresses of objects in it."""
    message = re.sub(r"<\w[^>]* object at 0x\w+>", "", str(error))
    text = " ".join(f"{type(error).__name__}: {message}".split()).removesuffix(":")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def first_few(items: Iterable[str], shown: int = 5, separator: str = ", ") -> str:
    """Returns the first items as one line of a message, and how many more there are."""
    items = list(items)
    more = [f"and {len(items) - shown:,} more"] if len(items) > shown else []
    return separator.join([*items[:shown], *more])
