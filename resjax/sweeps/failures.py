"""Records failed attempts: `error.txt` of a run folder has the traceback, `error.json` the rest.

Each launch tries a run at most 1 + retries times, however many workers it has and however often
they are lost; another launch has attempts of its own.
"""

from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from resjax.disk import describe_disk_error, write_atomically
from resjax.run_files import RunError, find_error
from resjax.train import records

REPORT, ERROR = "error.txt", "error.json"


class Failure(NamedTuple):
    """Why a run failed, or, in the state "not measured", why the trained run was not measured."""

    error: str  # on one line
    report: str  # with the traceback, if there is one
    state: str = "failed"
    retry: bool = True  # whether another attempt may succeed


class Retries(NamedTuple):
    """How often a launch tries a failed run again.

    Attributes:
      launch: its ID.
      limit: the number of retries.
    """

    launch: str
    limit: int

    def exhausted(self, error: RunError) -> bool:
        """Returns whether the launch will not try a run again after this error."""
        if error.launch == self.launch:
            return not error.retry
        return error.others.get(self.launch, 0) > self.limit

    def record(self, folder: Path, failure: Failure, before: int) -> RunError:
        """Writes a failed attempt to the run folder, and returns what it wrote.

        If the files cannot be written, the returned error says why.

        Args:
          folder: the run folder.
          failure: the failure.
          before: the number of failed attempts that the caller knows of; the folder may lack some.
        """
        others = {}
        if last := find_error(folder):
            others = {**last.others, last.launch: last.attempts}
        attempts = max(others.pop(self.launch, 0), before) + 1
        retry = failure.retry and attempts <= self.limit
        time = datetime.now().astimezone().isoformat(timespec="seconds")
        text, report, state, _ = failure
        error = RunError(self.launch, attempts, retry, text, state, time, others)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / REPORT, report)
            records.write_json(folder / ERROR, error._asdict())
        except OSError as refused:
            return error._replace(error=f"{text}; {REPORT}: {describe_disk_error(refused)}")
        return error


def remove_error(folder: Path) -> str:
    """Removes what earlier attempts wrote to a run folder; returns why the disk refuses, or ""."""
    try:
        for name in (REPORT, ERROR):
            (folder / name).unlink(missing_ok=True)
    except OSError as refused:
        return f"{REPORT}: {describe_disk_error(refused)}"
    return ""
