"""Errors that the user can fix, reported in one line with exit code 2."""


class UserError(Exception):
    """A user's mistake; the message says what is wrong, where, and how to fix it."""
