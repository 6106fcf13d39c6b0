"""Follows run folders: brings a tracker up to date with them, once or repeatedly.

Nothing that a tracker has written is read back. Beside it lies a journal with the digests of the
files that it shows; a run whose files have these digests is left alone, and any other is replayed
from its first step on.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from resjax import disk
from resjax.config import digest, from_dict, to_dict
from resjax.errors import UserError, one_line
from resjax.run_files import (
    find_divergence,
    find_error,
    is_run_folder,
    read_divergence,
    read_json_object,
    read_summary,
)
from resjax.tracking import Begin, End, TrackedRun, Tracker
from resjax.tracking.rows import RewoundError, RowReader

POLL_SECONDS = 1.0  # between two looks at the runs; more if a look takes long

FOLDER = "tracking"
"""The folder in a run folder to which trackers write by default."""

SHOWN = ("config.json", "metrics.jsonl", "layers.jsonl", "summary.json", "diverged.json")
FAILED = ("error.json", "error.txt")
LOCK = "lock"  # exists while a process trains the run

UNFINISHED = End("unfinished")


class Target(NamedTuple):
    """A tracker and the place to which it writes runs.

    Attributes:
      name: of the tracker, as the user typed it.
      begin: its class.
      out: the folder with one folder for each run, or None for a folder in each run folder.
      project: for trackers that have projects, or "".
    """

    name: str
    begin: Begin
    out: Path | None = None
    project: str = ""

    def folder(self, run: Path, run_id: str) -> Path:
        """Returns the folder in which the tracker writes a run."""
        if self.out is None:
            return run / FOLDER
        return self.out / (run.name if run.name.endswith(run_id) else f"{run.name}-{run_id}")


class RunFollower:
    """Brings a tracker up to date with one run folder at each call of `update`."""

    def __init__(self, run: Path, target: Target, owners: dict[str, Path] | None = None):
        """Reads nothing yet.

        Args:
          run: the run folder.
          target: the tracker.
          owners: the run folder of each id, over all followers of the tracker.
        """
        self.end: End | None = None  # None while the run goes on
        self.steps = 0
        self.unchanged = False
        self.problem = ""
        self.in_use = False  # by another process
        self._run, self._target = run, target
        self._owners = {} if owners is None else owners
        self._reader = RowReader(run)
        self._tracker: Tracker | None = None
        self._lock: int | None = None
        self._seen: Any = None

    def update(self, left: End | None = None) -> bool:
        """Gives the tracker what is new; returns whether there was a change.

        Args:
          left: the state of a run whose files record no other end, once no process trains it;
            None while a process may.
        """
        seen: Any = (left, *map(_signature, (self._run / name for name in (*SHOWN, *FAILED, LOCK))))
        if seen == self._seen or not (self._run / "config.json").exists():
            return False
        try:
            self._catch_up(read_end(self._run, left))
            self._seen, self.problem, self.in_use = seen, "", False
        except RewoundError:
            self.close()
            return self.update(left)
        except (UserError, OSError) as error:
            self.close()
            text = str(error) if isinstance(error, UserError) else _disk_problem(self._run, error)
            self.in_use, changed = isinstance(error, _InUseError), text != self.problem
            self._seen, self.problem = None if self.in_use else seen, text
            return changed
        return True

    def _catch_up(self, end: End | None) -> None:
        """Gives the tracker the new rows, and the end of the run unless it goes on."""
        self.end = end
        before = None if end is None else self._fingerprint()
        run = self._describe()
        journal = run.folder / f"{self._target.name.rpartition(':')[2]}.json"
        if self._lock is None:
            self.unchanged = before is not None and _read_journal(journal) == before
            if self.unchanged:
                return
            run.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(journal.with_suffix(".lock"), self._run)
        rows = self._reader.read(everything=end is not None)
        if self._tracker is None:
            if not rows and end is None:
                return
            journal.unlink(missing_ok=True)  # until the tracker shows all
            self._tracker, self.steps = self._target.begin(run), 0
        for row in rows:
            self._tracker.log(row)
        self.steps += len(rows)
        if end is None:
            self._tracker.flush()
            return
        tracker, self._tracker = self._tracker, None
        tracker.close(end)
        if self._fingerprint() == before:  # else someone goes on with the run
            disk.write_atomically(journal, json.dumps(before, indent=2) + "\n")
        self._reset()

    def _describe(self) -> TrackedRun:
        config = from_dict(read_json_object(self._run / "config.json"))
        run_id = digest(config)
        owner = self._owners.setdefault(run_id, self._run)
        if owner != self._run:
            raise UserError(f"{self._run}: has the config of {owner}, so both are the run {run_id}")
        provenance = self._run / "provenance.json"
        return TrackedRun(
            run_id,
            self._run.resolve().name,
            _group(self._run),
            self._target.project,
            self._target.folder(self._run.resolve(), run_id),
            to_dict(config),
            read_json_object(provenance) if provenance.exists() else {},
        )

    def _fingerprint(self) -> dict[str, Any]:
        """Returns the project and the digests of the files; equal ones need no replay."""
        files = {name: _sha256(self._run / name) for name in (*SHOWN, *FAILED)}
        return {"project": self._target.project, "files": files}

    def close(self) -> None:
        """Closes the tracker's unfinished run; another update begins it anew."""
        if self._tracker is not None:
            tracker, self._tracker = self._tracker, None
            with suppress(OSError):
                tracker.close(UNFINISHED)
        self._reset()

    def _reset(self) -> None:
        """Makes the next update begin with the first step."""
        self._reader.close()
        self._reader = RowReader(self._run)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def track(
    root: Path,
    target: Target,
    report: Callable[[RunFollower, Path], None],
    wait: Callable[[float], End | None] | None = None,
) -> int:
    """Brings a tracker up to date with all runs at or below a folder; returns their number.

    Args:
      root: a run, a sweep, or a folder above.
      target: the tracker.
      report: called with each follower that has changed, and its run folder.
      wait: waits for a number of seconds; returns None to go on or, to stop following, the state
        of the runs that have not ended. Without it each run is replayed once.
    """
    followers: dict[Path, RunFollower] = {}
    owners: dict[str, Path] = {}
    left = None if wait else UNFINISHED
    while True:
        began = time.monotonic()
        for run in find_runs(root):
            follower = followers.setdefault(run, RunFollower(run, target, owners))
            if follower.update(left):
                report(follower, run)
        if wait is None or left is not None:
            return len(followers)
        left = wait(max(POLL_SECONDS, 5 * (time.monotonic() - began)))


def find_runs(root: Path) -> list[Path]:
    """Returns the run folders at or below a folder."""
    return sorted(_runs_below(root))


def _runs_below(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        if "config.json" in files and is_run_folder(Path(path)):
            folders.clear()
            yield Path(path)


def read_end(run: Path, left: End | None = None) -> End | None:
    """Returns how a run ended, or None if it goes on.

    Args:
      run: the run folder.
      left: as for `RunFollower.update`.
    """
    if (path := run / "summary.json").exists():
        summary = read_summary(path)
        diverged = find_divergence(run)
        reason = f"step {diverged.step}: {diverged.reason}" if diverged else ""
        return End("diverged" if diverged else "finished", reason, summary)
    if diverged := read_divergence(run):
        return End("diverged", f"step {diverged.step}: {diverged.reason}")
    if left is None and (run / LOCK).exists():
        return None
    if reason := _failure(run):
        return End("failed", reason)
    return left or UNFINISHED


def _failure(run: Path) -> str:
    """Returns why the last attempt of a sweep at a run failed, on one line, or ""."""
    if error := find_error(run):
        return " ".join(error.error.split())
    if (path := run / FAILED[1]).exists():
        return next(reversed(path.read_text(errors="replace").strip().splitlines()), "")
    return ""


class _InUseError(UserError):
    """Another process writes the same run to the same tracker."""


def _lock(path: Path, run: Path) -> int:
    """Locks a file until its descriptor is closed, on file systems that have locks."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise _InUseError(f"{run}: another process is tracking it") from None
    except OSError:
        pass
    return file


def _group(run: Path) -> str:
    """Returns the name of the experiment in whose sweep folder a run lies, or ""."""
    plan = run.absolute().parent.parent / "sweep.json"
    with suppress(UserError, OSError):
        if isinstance(name := read_json_object(plan).get("experiment"), str):
            return name
    return ""


def _read_journal(path: Path) -> dict[str, Any] | None:
    with suppress(UserError, OSError):
        return read_json_object(path)
    return None


def _signature(path: Path) -> Any:
    try:
        status = path.stat()
    except OSError:
        return None
    if path.name == LOCK:
        return True  # its holder touches it
    return status.st_ino, status.st_size, status.st_mtime_ns


def _sha256(path: Path) -> str | None:
    try:
        return disk.digest(path)
    except FileNotFoundError:
        return None


def _disk_problem(run: Path, error: OSError) -> str:
    return f"{error.filename or run}: {error.strerror or one_line(error)}"
