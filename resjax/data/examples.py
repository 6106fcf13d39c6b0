"""Datasets as sequences of examples, split expressions, and the errors of reading data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from jaxtyping import Int, UInt8

from resjax.errors import UserError, one_line

Shape = tuple[int, int, int]  # height, width, channels

Targets = Mapping[str, Any]
"""The truth that a task predicts, by its names in a batch: a `label`; a `mask` of the image's size;
or `boxes` (objects, 4), as left, top, right and bottom in pixels, and their `classes`, which are 0
for unused rows."""

VOID = 255
"""The value of a mask's pixels that belong to no class, as in PASCAL VOC."""

LABEL = ("label",)
BOXES = ("boxes", "classes")
MASK = ("mask",)


class DataError(UserError):
    """A dataset is unknown, missing or damaged."""


class NotPreparedError(DataError):
    """The dataset is known but not on this machine."""


class BadImageError(DataError):
    """An image cannot be decoded."""


def stack_targets(examples: Sequence[Targets]) -> dict[str, np.ndarray]:
    """Returns the targets of several examples as arrays, a label as int32."""
    return {
        name: np.array([each[name] for each in examples], getattr(first, "dtype", np.int32))
        for name, first in examples[0].items()
    }


class Example(NamedTuple):
    image: bytes | UInt8[np.ndarray, "h w c"]  # a file's contents, or decoded
    targets: Targets  # of one example
    origin: str  # for messages: a file's path, or "cifar10 train[17]"


class Examples(Protocol):
    """A sequence of examples with random access; picklable and cheap to open."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Source(NamedTuple):
    """A dataset with all its splits, opened but not read."""

    splits: Mapping[str, Examples]
    class_names: tuple[str, ...]
    image_shape: Shape | None  # None if sizes differ or are not known yet
    train: str = "train"  # name of the default training split
    test: str | None = "test"  # name of the default test split
    notes: tuple[str, ...] = ()  # for the user: how the images are split, what was skipped and why
    targets: tuple[str, ...] = LABEL  # names of every example's targets
    objects: int = 0  # length of every example's `boxes` and `classes`


@dataclass(frozen=True)
class Split:
    """Images and their targets as NumPy or JAX arrays, with the examples along the first axis."""

    images: UInt8[Any, "n h w c"]
    targets: Targets

    @classmethod
    def labeled(cls, images: UInt8[Any, "n h w c"], labels: Int[Any, "n"]) -> Self:
        """Returns images with one class each."""
        return cls(images, {"label": labels})

    @property
    def labels(self) -> Int[Any, "n"]:
        return self.targets["label"]

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays by their names in a batch."""
        return {"image": self.images, **self.targets}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: Any) -> "Split":
        """Returns the examples that a slice or an array of indices selects."""
        return Split(self.images[chosen], {k: v[chosen] for k, v in self.targets.items()})


@dataclass(frozen=True)
class ArrayExamples:
    """Examples of decoded images."""

    split: Split
    name: str  # for messages

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Example:
        targets = {name: array[index] for name, array in self.split.targets.items()}
        return Example(self.split.images[index], targets, f"{self.name}[{index}]")


def array_source(name: str, splits: Mapping[str, Split], class_names: tuple[str, ...]) -> Source:
    """Returns a source of images that are in memory and have one shape."""
    examples = {split: ArrayExamples(part, f"{name} {split}") for split, part in splits.items()}
    first = next(iter(splits.values()))
    height, width, channels = first.images.shape[1:]
    objects = first.targets["classes"].shape[1] if "classes" in first.targets else 0
    shape, targets = (height, width, channels), tuple(first.targets)
    return Source(examples, class_names, shape, targets=targets, objects=objects)


@dataclass(frozen=True)
class Slices:
    """Slices of splits, one after the other."""

    parts: tuple[tuple[Examples, int, int], ...]  # examples, start, stop

    def __len__(self) -> int:
        return sum(stop - start for _, start, stop in self.parts)

    def __getitem__(self, index: int) -> Example:
        offset = index
        for examples, start, stop in self.parts:
            if 0 <= offset < stop - start:
                return examples[start + offset]
            offset -= stop - start
        raise IndexError(index)


def select(expression: str, splits: Mapping[str, Examples]) -> Slices:
    """Evaluates a TFDS split expression: `train`, `train[:90%]`, `train[-500:]+test`.

    Raises:
      DataError: the expression is malformed, names an unknown split, or selects nothing.
    """
    if expression in splits:  # usually; TFDS takes seconds to import
        return Slices(((splits[expression], 0, len(splits[expression])),))
    import tensorflow_datasets as tfds

    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[len(examples)], num_bytes=0)
        for name, examples in splits.items()
    }
    try:
        ranges = tfds.core.ReadInstruction.from_spec(expression).to_absolute(infos)
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise DataError(
            f"split {expression!r}: {one_line(error)}; the splits are {', '.join(splits)}"
        ) from error
    parts = [
        (examples, part.from_ or 0, len(examples) if part.to is None else part.to)
        for part in ranges
        for examples in (splits[part.splitname],)
    ]
    if not (parts := [part for part in parts if part[1] < part[2]]):
        raise DataError(f"split {expression!r} is empty")
    return Slices(tuple(parts))
