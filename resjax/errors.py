"""Errors that the user can fix, reported in one line with exit code 2."""


class UserError(Exception):
    """A user's mistake; the message says what is wrong, where, and how to fix it."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """Returns an error's type and message on one line of at most `limit` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
