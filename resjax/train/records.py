"""Writes a run's JSON and JSON-lines files: config, provenance, metrics, layers, summary.

Each JSON file appears whole or not at all, and each line of a .jsonl file is written in one piece.
summary.json is written last: it exists if and only if the run has finished.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from resjax import run_files
from resjax.disk import describe_disk_error, unused_path, write_atomically
from resjax.machine import threads
from resjax.train.progress import Warn

PACKAGES = ("resjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically; numbers that are not finite become null."""
    write_atomically(path, json.dumps(_finite(content), indent=2, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file, or None without a file."""
    return run_files.read_json_object(path) if path.exists() else None


def read_summary(path: Path) -> dict[str, Any] | None:
    """Returns a summary.json, or None if the run has not finished."""
    return run_files.read_summary(path) if path.exists() else None


def write_provenance(
    path: Path,
    step: int,
    sources: Mapping[str, Any],
    change: run_files.ScheduleChange | None = None,
) -> dict[str, Any]:
    """Writes provenance.json; a run that continues from `step` adds to the file's list `resumed`.

    Its entry `device_changes` lists the changes of devices. Returns the content.

    Args:
      path: of the file.
      step: from which the run begins or continues.
      sources: further entries, such as the weights that training starts from.
      change: of the learning-rate schedule at this step, which is added to `schedule_changes`.
    """
    content = {**provenance(), **sources}
    with contextlib.suppress(run_files.DamagedFileError):  # a damaged file is replaced
        if (first := read_json(path)) is not None:
            resumed = first.get("resumed")
            resumed = resumed if isinstance(resumed, list) else []
            content = {**first, "resumed": [*resumed, {"step": step, **content}]}
    if change is not None:
        changes = [each for each in run_files.schedule_changes(content) if each != change]
        content["schedule_changes"] = [each._asdict() for each in (*changes, change)]
    content.pop("device_changes", None)
    if moved := run_files.device_changes(content):
        content["device_changes"] = [
            {"step": step, "before": before._asdict(), "after": after._asdict()}
            for step, before, after in moved
        ]
    write_json(path, content)
    return content


def provenance() -> dict[str, Any]:
    """Returns what a result depends on beside its config: commit, versions, devices, command."""
    import jax

    from resjax.xla.compile_options import step_compile

    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [str(device) for device in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "threads": threads(),
        "compile_options": step_compile(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "start": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str | None:
    """Returns git's output in the source folder; None without git or if it does not track this."""
    try:
        for command in (["ls-files", "--error-unmatch", __file__], arguments):
            done = subprocess.run(
                ["git", "--no-optional-locks", *command],  # a kill must leave no lock
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=True,
            )
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def encode_metrics(metrics: Any) -> Any:
    """Encodes metrics as JSON content, without loss of bits."""
    if isinstance(metrics, Mapping):
        return {name: encode_metrics(value) for name, value in metrics.items()}
    if isinstance(metrics, tuple | list):
        return [encode_metrics(value) for value in metrics]
    return {"dtype": str(metrics.dtype), "values": metrics.tolist()}


def decode_metrics(content: Any) -> Any:
    """Decodes the content of `encode_metrics` to NumPy arrays."""
    if isinstance(content, list):
        return tuple(map(decode_metrics, content))
    if content.keys() == {"dtype", "values"}:
        return np.asarray(content["values"], content["dtype"])
    return {name: decode_metrics(value) for name, value in content.items()}


class JsonLinesFile:
    """A file of one JSON object per line that grows with the run.

    All lines stay in memory, so a disk that is full or unreachable does not end the run: lines that
    it refuses are written when it accepts them again.
    """

    def __init__(self, path: Path | None, text: str, warn: Warn = lambda _: None):
        """Replaces the content of the file by `text`, the lines up to the step to continue from.

        `path` is None in a process that does not write the file.
        """
        self._path, self._warn = path, warn
        self._lines = [text]
        self._behind = False
        self._file: Any = None
        self._rewrite()

    @property
    def text(self) -> str:
        """All lines, including those that are not on disk yet."""
        self._lines = ["".join(self._lines)]
        return self._lines[0]

    @property
    def mark(self) -> dict[str, Any]:
        return text_mark(self.text)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line; numbers that are not finite become null."""
        self._lines.append(json.dumps(_finite(line)) + "\n")
        content = self._lines[-1].encode()
        with self._warning():
            if self._behind or (self._file and self._file.write(content) < len(content)):
                self._rewrite()

    def sync(self) -> None:
        """Flushes all lines to the disk, because a checkpoint must not be ahead of them."""
        with self._warning():
            if self._behind or not (self._path and self._path.exists()):
                self._rewrite()
            if self._file:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; raises OSError if the disk does not accept the last lines."""
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
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._behind:
                why = describe_disk_error(error)
                self._warn(f"{self._path}: {why}; lines stay in memory until it can be written")
            self._behind = True


def text_mark(text: str) -> dict[str, Any]:
    """Returns size and digest of a text, by which `read_marked` recognizes it in a file."""
    content = text.encode()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_marked(path: Path, mark: Mapping[str, Any]) -> str | None:
    """Returns the text with which a file begins if it has this mark, otherwise None."""
    content = path.read_bytes()[: mark["bytes"]] if path.exists() else b""
    return content.decode() if hashlib.sha256(content).hexdigest() == mark["sha256"] else None


def recover_metrics(path: Path, text: str, warn: Warn) -> None:
    """Moves a metrics.jsonl to `damaged/` unless it begins with a checkpoint's text."""
    if read_marked(path, text_mark(text)) is None:
        warn(f"{path} {_set_aside(path)}; its lines are restored from the checkpoint")


def recover_layers(path: Path, mark: Mapping[str, Any] | None, step: int, warn: Warn) -> str:
    """Returns the lines of a layers.jsonl up to a checkpoint, which holds only their mark.

    A file with another beginning is moved to `damaged/`, and its intact lines up to `step` are
    returned. Without a mark the run had no such file at the checkpoint.
    """
    text = read_marked(path, mark or text_mark(""))
    if text is not None:
        return text
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    intact = [
        line.decode() + "\n"
        for line in lines
        if (parsed := run_files.parse_layer(line)) and parsed["step"] <= step
    ]
    warn(f"{path} {_set_aside(path)}; its {len(intact)} intact lines are used")
    return "".join(intact)


def _set_aside(path: Path) -> str:
    if not path.exists():
        return "is missing"
    aside = unused_path(path.parent / "damaged", path.name)
    aside.parent.mkdir(exist_ok=True)
    path.rename(aside)
    return f"is not what the run wrote and was moved to {aside}"


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces numbers that JSON does not have, NaN and infinities, by None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
