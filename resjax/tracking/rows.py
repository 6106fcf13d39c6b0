"""Reads a run's metrics.jsonl and layers.jsonl as one row per step, while training writes them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from resjax.run_files import DamagedFileError, parse_layer, parse_measurement
from resjax.tracking import Row


class RewoundError(Exception):
    """Lines that were read are no longer valid; read the run from its first step again."""


class RowReader:
    """Reads the rows of a run, each of them once, in the order of steps."""

    def __init__(self, folder: Path):
        """Opens nothing yet; the files may not exist."""
        self._metrics = _Tail(folder / "metrics.jsonl", parse_measurement)
        self._layers = _Tail(folder / "layers.jsonl", parse_layer)
        self._waiting: dict[int, Row] = {}
        self._newest = self._returned = -1

    def read(self, everything: bool) -> list[Row]:
        """Returns the rows that are complete and were not returned before.

        Training writes all lines of a step before any of the next one. So the newest step may lack
        lines as long as the run goes on.

        Args:
          everything: whether the run has ended, so that the newest row is complete too; nothing
            can be read after it.

        Raises:
          RewoundError: the run was resumed from a checkpoint.
          DamagedFileError: a line is not valid.
        """
        # Metrics first: the diagnostics of a step are written before the metrics of the next one.
        for line in self._metrics.read(everything):
            step, split = line.pop("step"), line.pop("split")
            self._newest = max(self._newest, step)
            self._row(step).metrics.update({f"{split}/{name}": x for name, x in line.items()})
        for line in self._layers.read(everything):
            step, layer = line.pop("step"), line.pop("layer")
            for name, value in line.items():
                self._row(step).layers.setdefault(name, {})[layer] = value
        steps = sorted(step for step in self._waiting if everything or step < self._newest)
        self._returned = max([self._returned, *steps])
        return [self._waiting.pop(step) for step in steps]

    def close(self) -> None:
        self._metrics.close()
        self._layers.close()

    def _row(self, step: int) -> Row:
        if step <= self._returned:  # earlier versions appended the repeated steps of a resumed run
            raise RewoundError
        return self._waiting.setdefault(step, Row(step, {}, {}, self._metrics.time))


class _Tail:
    """Reads the lines of a file that grows and that a resumed run replaces by another file."""

    def __init__(self, path: Path, parse: Callable[[bytes], dict[str, Any] | None]):
        self.time = 0.0  # at which the file was last written
        self._path, self._parse = path, parse
        self._file: BinaryIO | None = None
        self._number = 0
        self._rest = b""

    def read(self, everything: bool) -> Iterator[dict[str, Any]]:
        """Yields the new lines; the last one without its line break only with `everything`."""
        if self._file is None:
            if not self._path.exists():
                return
            self._file = self._path.open("rb")  # stays open, so that no other file gets its inode
        elif self._replaced(self._file):
            raise RewoundError
        self.time = os.fstat(self._file.fileno()).st_mtime
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            self._number += 1
            parsed = self._parse(line)
            if parsed is None:
                name = self._path.name
                raise DamagedFileError(self._path, f"line {self._number} is not a line of {name}")
            yield parsed
        if everything and (parsed := self._parse(self._rest)):
            yield parsed

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _replaced(self, file: BinaryIO) -> bool:
        try:
            now, then = os.stat(self._path), os.fstat(file.fileno())
        except OSError:
            return True
        return not os.path.samestat(now, then) or now.st_size < file.tell()
