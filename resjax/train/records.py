"""What a run writes: config.json, provenance.json, metrics.jsonl, summary.json.

Every file appears whole or not at all; a metrics line is written in one piece. `summary.json` comes
last, so its presence means that the run is finished.
"""

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("resjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON whole or not at all; a number that is not finite becomes null."""
    write_text(path, json.dumps(_finite(content), indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text whole or not at all: under another name, then renamed."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


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


class MetricsFile:
    """metrics.jsonl: one JSON object a line, appended."""

    def __init__(self, path: Path, lines: Iterable[Mapping[str, Any]]):
        """Opens the file for more lines than these; others that it held are dropped."""
        write_text(path, "".join(map(_line, lines)))
        self._file = path.open("a", buffering=1)

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(_line(line))

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, in order; a half-written last one is left out.

    A null, which stands for a number that was not finite, is read as NaN.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return [_read(line) for line in lines]


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary of a finished run, its nulls as NaN; None where the run is not finished."""
    return _read(path.read_text()) if path.exists() else None


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(_finite(values)) + "\n"


def _read(text: str) -> dict[str, Any]:
    values = json.loads(text)
    return {name: math.nan if value is None else value for name, value in values.items()}


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity, so they become null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
