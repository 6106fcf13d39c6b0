"""Text from strangers (file names, class names, messages of servers) for terminals and files."""

import os
from pathlib import Path

JOINERS = "\u200c\u200d"  # invisible, but part of words and of emoji


def encodable(text: str) -> str:
    r"""Returns text that UTF-8 can encode; file names of other bytes become `\udcff`."""
    return text.encode(errors="backslashreplace").decode()


def printable(text: str) -> str:
    r"""Returns text on one line that cannot control a terminal; others become `\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in JOINERS else each.encode("unicode_escape").decode()
        for each in text
    )


def printable_lines(text: str) -> str:
    """Returns text as `printable` does, but with its line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def csv_cell(text: str) -> str:
    """Returns text for a CSV file on one line, of which no spreadsheet makes a formula."""
    return ("'" if text.startswith(("=", "+", "-", "@")) else "") + printable(text)


def user_path(text: str | os.PathLike[str]) -> Path:
    """Returns the path that a user typed, with `~` as the home folder."""
    return Path(os.path.expanduser(text))
