"""What every source of data gives: splits, as rows of examples, and what is said when it cannot."""

import bisect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int, UInt8

from resjax.errors import UserError

Shape = tuple[int, int, int]  # height, width, channels


class DataError(UserError):
    """A dataset is unknown, missing or damaged."""


class NotPreparedError(DataError):
    """The dataset is known, but not on this machine."""


class BadImageError(DataError):
    """An image that cannot be decoded."""


def in_one_line(error: Exception) -> str:
    """What a library says, for a DataError to quote; without the objects that it shows."""
    return " ".join(re.sub(r"<\w[^>]* object at 0x\w+>", "", str(error)).split())


class Example(NamedTuple):
    image: bytes | UInt8[np.ndarray, "h w c"]  # a file's contents, or decoded already
    label: int
    origin: str  # for messages: a file's path, or "cifar10 train[17]"


class Examples(Protocol):
    """A split as a row of examples with random access; picklable, and cheap to open."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Source(NamedTuple):
    """A dataset as its reader gives it: all its splits, by name."""

    splits: Mapping[str, Examples]
    class_names: tuple[str, ...]
    image_shape: Shape | None  # None: sizes differ, or are not known before all is read
    train: str = "train"  # which split is meant where none is asked for
    test: str | None = "test"


class Split(NamedTuple):
    """Images and labels, on the host or on a device."""

    images: UInt8[Any, "n h w c"]  # an array of NumPy's or JAX's
    labels: Int[Any, "n"]


@dataclass(frozen=True)
class ArrayExamples:
    """Examples that are decoded already."""

    split: Split
    name: str

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> Example:
        images, labels = self.split
        return Example(images[index], int(labels[index]), f"{self.name}[{index}]")


def of_arrays(name: str, splits: Mapping[str, Split], class_names: tuple[str, ...]) -> Source:
    """A source of arrays that are here already."""
    examples = {split: ArrayExamples(part, f"{name} {split}") for split, part in splits.items()}
    height, width, channels = next(iter(splits.values())).images.shape[1:]
    return Source(examples, class_names, (height, width, channels))


class Piece(NamedTuple):
    """The examples of a split from `start` to before `stop`."""

    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class Pieces:
    """Pieces of splits, one after the other."""

    parts: tuple[tuple[Examples, int, int], ...]  # examples, start, stop

    def __len__(self) -> int:
        return sum(stop - start for _, start, stop in self.parts)

    def __getitem__(self, index: int) -> Example:
        ends = list(accumulate(stop - start for _, start, stop in self.parts))
        if not 0 <= index < ends[-1]:
            raise IndexError(index)
        part = bisect.bisect_right(ends, index)
        examples, _, stop = self.parts[part]
        return examples[stop - (ends[part] - index)]


def pieces(expression: str, splits: Mapping[str, Examples]) -> Sequence[Piece]:
    """Reads one of TFDS's split expressions: `train`, `train[:90%]`, `train[-500:]+test`.

    Raises:
      DataError: there is no such split, no such expression, or no example in it.
    """
    if expression in splits:  # nearly always; TFDS takes seconds to import
        found = [Piece(expression, 0, len(splits[expression]))]
    else:
        import tensorflow_datasets as tfds

        infos = {
            name: tfds.core.SplitInfo(name=name, shard_lengths=[len(examples)], num_bytes=0)
            for name, examples in splits.items()
        }
        try:
            asked = tfds.core.ReadInstruction.from_spec(expression).to_absolute(infos)
        except (ValueError, NotImplementedError, AssertionError) as error:
            raise DataError(
                f"split {expression!r}: {in_one_line(error)}; the splits are {', '.join(splits)}"
            ) from error
        found = [
            Piece(name, start or 0, len(splits[name]) if stop is None else stop)
            for name, start, stop in ((part.splitname, part.from_, part.to) for part in asked)
        ]
    if not sum(stop - start for _, start, stop in found):
        raise DataError(f"split {expression!r} is empty")
    return found
