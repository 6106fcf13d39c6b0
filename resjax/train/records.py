"""What a run writes: config.json, provenance.json, metrics.jsonl, summary.json.

Every file appears whole or not at all; a metrics line is written in one piece. `summary.json` comes
last, so its presence means that the run is finished.
"""

import contextlib
import errno
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from resjax import run_files
from resjax.disk import describe_disk_error, write_atomically
from resjax.errors import UserError

PACKAGES = ("resjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON whole or not at all; a number that is not finite becomes null."""
    write_atomically(path, json.dumps(_finite(content), indent=2, default=str) + "\n")


def write_provenance(path: Path, step: int, further: Mapping[str, Any]) -> None:
    """Writes provenance.json; that of a run which goes on keeps how it began.

    Args:
      path: of the file.
      step: from which the run goes on.
      further: what else the run comes from.
    """
    content = {**provenance(), **further}
    with contextlib.suppress(UserError):  # damaged: begun anew
        if (there := read_json(path)) is not None:
            before = there.get("resumed")
            resumed = [*(before if isinstance(before, list) else []), {"step": step, **content}]
            content = {**there, "resumed": resumed}
    write_json(path, content)


def provenance() -> dict[str, Any]:
    """Where a result comes from: commit, versions, devices, command, start."""
    import jax

    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [str(device) for device in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "start": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _git(*words: str) -> str | None:
    """What git says of the source; None where git does not track it or is not there."""
    try:
        for command in (["ls-files", "--error-unmatch", __file__], words):
            answer = subprocess.run(
                ["git", *command],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=True,
            )
        return answer.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class JsonLinesFile:
    """metrics.jsonl: one JSON object a line, appended.

    A disk that is full or away ends no run: lines wait in memory until it takes them.
    """

    def __init__(self, path: Path | None, text: str, warn: Callable[[str], None] = lambda _: None):
        """Opens the file for more lines than those of `text`; others that it held are dropped.

        Args:
          path: None where another process writes the file.
          text: its first lines.
          warn: is told when the file cannot be written.
        """
        self._path, self._warn = path, warn
        self._lines = [text]
        self._behind = False
        self._file: Any = None
        self._rewrite()

    @property
    def text(self) -> str:
        """All lines, those too that wait."""
        self._lines = ["".join(self._lines)]
        return self._lines[0]

    def write(self, line: Mapping[str, Any]) -> None:
        self._lines.append(_line(line))
        if self._path is None:
            return
        with self._told():
            if self._behind:
                self._rewrite()
            elif self._file.write(content := self._lines[-1].encode()) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Brings all lines to the disk, for a checkpoint must not be ahead of them."""
        if self._path is None:
            return
        with self._told():
            if self._behind or not self._path.exists():
                self._rewrite()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Raises OSError where lines still wait and the disk does not take them."""
        try:
            if self._behind:
                self._rewrite()
        finally:
            if self._file:
                self._file.close()

    def _rewrite(self) -> None:
        if self._path is None:
            return
        if self._file:
            self._file.close()
        write_atomically(self._path, self.text)
        self._file = self._path.open("ab", buffering=0)
        self._behind = False

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._behind:
                why = describe_disk_error(error)
                self._warn(f"{self._path}: {why}; lines wait in memory until it can be written")
            self._behind = True


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file.

    Raises:
      UserError: it holds something else.
    """
    return _read(run_files.read_json_object, path)


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None where the run is not finished.

    Raises:
      UserError: it is no summary.
    """
    return _read(run_files.read_summary, path)


def _read(read: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any] | None:
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{error}; put back a copy, or move it away") from error


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(_finite(values)) + "\n"


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity, so they become null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
