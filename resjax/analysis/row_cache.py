"""A cache of rows of the runs table, so that a table of thousands of runs is read anew quickly.

It lies among the user's caches, one file for each folder whose runs were loaded, and never among
results. A row counts only while the size, times and inode of each file that it was read from are
what they were. A cache file that is damaged, that other code wrote, or that belongs to another user
is not read, and one that cannot be written is not written; the rows are then read from the runs.
"""

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from resjax.disk import write_atomically
from resjax.machine import user_caches

Row = dict[str, Any]

MIN_RUNS = 50
"""Fewer runs are read as quickly as a cache."""

SETTLED_SECONDS = 2.0
"""A file that changed more recently may change again within the resolution of its times."""

KEPT_SECONDS = 90 * 24 * 3600.0
"""Cache files that were not used for longer are removed."""


class RowCache:
    """The rows of the runs below one folder, by the paths of the runs in it.

    A row is a dict of strings, numbers, None and tuples of such values.
    """

    def __init__(self, root: Path, names: tuple[str, ...], read: Callable[[Path], Row], runs: int):
        """Reads the cache file of a folder.

        Args:
          root: the folder.
          names: of the files in a run folder that a row is read from.
          read: returns the row of a run folder.
          runs: the number of runs in the folder.
        """
        self._root, self._names, self._read = root, names, read
        self._path = _cache_path(root) if runs >= MIN_RUNS else None
        self._saved = {} if self._path is None else _load(self._path)
        self._entries: dict[str, tuple[list[Any], Row]] = {}
        self._changed = False

    def row(self, folder: Path) -> Row:
        """Returns the row of a run folder below the root; raises what reading it raises."""
        if self._path is None:
            return self._read(folder)
        name = os.path.relpath(folder, self._root)
        state = self._state(folder)
        saved = self._saved.get(name)
        if saved is not None and saved[0] == state:
            row = dict(zip(saved[1], map(_tuples, saved[2]), strict=True))
            self._entries[name] = state, row
            return row
        row = self._read(folder)
        if _is_settled(state):
            self._entries[name] = state, row
            self._changed = True
        return row

    def save(self) -> None:
        """Writes the rows that were requested, unless the cache file has all of them."""
        if self._path is None:
            return
        if not self._changed:
            with suppress(OSError):
                os.utime(self._path)
            return
        columns = {tuple(row): None for _, row in self._entries.values()}
        numbers = {names: number for number, names in enumerate(columns)}
        runs = {
            name: [state, numbers[tuple(row)], list(row.values())]
            for name, (state, row) in self._entries.items()
        }
        text = json.dumps({"code": _code(), "columns": list(columns), "runs": runs})
        with suppress(OSError, ValueError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(self._path, f"{_digest(text.encode())}\n{text}")
            _remove_unused(self._path.parent)

    def _state(self, folder: Path) -> list[list[int] | None]:
        """Returns the identity, size and times of each file of a row; None for a missing file."""
        states: list[list[int] | None] = []
        for name in self._names:
            try:
                stat = os.stat(f"{folder}/{name}")
            except OSError:
                states.append(None)
            else:
                times = stat.st_mtime_ns, stat.st_ctime_ns
                states.append([stat.st_dev, stat.st_ino, stat.st_size, *times])
        return states


def _cache_path(root: Path) -> Path | None:
    """Returns the cache file of a folder; None for a user without a home folder."""
    with suppress(RuntimeError):
        name = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:32]
        return user_caches() / "runs" / f"{name}.json"
    return None


def _load(path: Path) -> dict[str, Any]:
    """Returns the states, columns and values of runs by their paths; {} without a sound file."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return {}
            digest, _, text = file.read().partition(b"\n")
        if digest.decode() != _digest(text):
            return {}
        content = json.loads(text)
        if content["code"] != _code():
            return {}
        columns = content["columns"]
        return {
            name: (state, columns[number], values)
            for name, (state, number, values) in content["runs"].items()
        }
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _is_settled(state: list[list[int] | None]) -> bool:
    newest = max((max(times) for _, _, _, *times in filter(None, state)), default=0)
    return time.time_ns() - newest > SETTLED_SECONDS * 1e9


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.cache
def _code() -> str:
    """Returns a digest of the code that makes rows, because another version may differ."""
    package = Path(__file__).parents[1]
    files = (Path(__file__), package / "analysis" / "runs.py", package / "run_files.py")
    return _digest(b"".join(file.read_bytes() for file in files))


def _remove_unused(folder: Path) -> None:
    for file in folder.iterdir():
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > KEPT_SECONDS:
                file.unlink()
