"""Prints tables and values to standard output, and notices to standard error."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from resjax.errors import first_few
from resjax.text import printable, printable_lines


def print_table(
    header: Sequence[str], rows: Iterable[Sequence[str | int]], out: TextIO | None = None
) -> None:
    """Prints a table: the first column aligned to the left, the others to the right."""
    lines = [
        header,
        *([f"{x:,}" if isinstance(x, int) else printable(x) for x in row] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join((first.ljust(widths[0]), *right)).rstrip(), file=out)


def print_values(values: dict[str, Any], out: TextIO | None = None) -> None:
    """Prints one named value per line."""
    for name, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
        print(f"{name:20}{text}", file=out)


def notify(text: str) -> None:
    """Prints a notice to standard error."""
    print(printable_lines(f"resjax: {text}"), file=sys.stderr, flush=True)


def notify_skipped(images: Sequence[object]) -> None:
    """Names the images that were skipped because they cannot be decoded, at most ten."""
    if images:
        names = first_few(map(str, images), 10)
        notify(f"skipped images that cannot be decoded ({len(images)}): {names}")
