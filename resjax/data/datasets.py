"""Datasets by name: opened, to read their images one by one, or loaded whole.

Every source (scikit-learn's digits, what TFDS prepared, folders and .npz files of one's own) gives
its splits as a row of examples. TFDS's split expressions, such as `train[:90%]`, work on all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int, UInt8

from resjax.data import DATASETS, Spec, why_unknown

OnBadImage = Literal["error", "skip"]


class DataError(Exception):
    """What is wrong with a dataset, where, and the mend: one line."""


class NotPreparedError(DataError):
    """The dataset is known, but not on this machine."""


class Split(NamedTuple):
    """Images and labels, on the host or on a device."""

    images: UInt8[Any, "n h w c"]  # an array of NumPy's or JAX's
    labels: Int[Any, "n"]


class Dataset(NamedTuple):
    train: Split
    test: Split
    class_names: tuple[str, ...]
    skipped: int = 0  # bad images that were left out


class Example(NamedTuple):
    image: bytes | UInt8[np.ndarray, "h w c"]  # a file's contents, or decoded already
    label: int
    origin: str  # for messages: a file's path, or "cifar10 train[17]"


class Examples(Protocol):
    """A split as a row of examples with random access; picklable, and cheap to open."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Opened(NamedTuple):
    train: Examples
    test: Examples
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int] | None  # height, width, channels; None: sizes differ


class Source(NamedTuple):
    """A dataset as its reader gives it: all its splits, by name."""

    splits: Mapping[str, Examples]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int] | None
    train: str = "train"  # which split is meant where none is asked for
    test: str = "test"


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


def open_dataset(
    name: str, train_split: str | None = None, test_split: str | None = None
) -> Opened:
    """Opens a dataset without reading an image.

    Args:
      name: of DATASETS, or of own data.
      train_split: a split expression; None is the dataset's own.
      test_split: likewise.

    Raises:
      NotPreparedError: its files are not here.
      DataError: no such dataset or split, or its files are not what they should be.
    """
    source = _source(name)
    return Opened(
        source.splits[train_split or source.train],
        source.splits[test_split or source.test],
        source.class_names,
        source.image_shape,
    )


def load(
    name: str,
    train_split: str | None = None,
    test_split: str | None = None,
    *,
    image_size: int | None = None,
    on_bad_image: OnBadImage = "error",
) -> Dataset:
    """Reads a dataset whole.

    Args:
      name: of DATASETS, or of own data.
      train_split: a split expression; None is the dataset's own.
      test_split: likewise.
      image_size: side in pixels to which images are brought.
      on_bad_image: whether an image that cannot be decoded is an error or left out.

    Raises:
      NotPreparedError: its files are not here.
      DataError: no such dataset or split, its files are not what they should be, or its images
        have different sizes and no `image_size` is asked for.
    """
    opened = open_dataset(name, train_split, test_split)
    assert isinstance(opened.train, ArrayExamples)
    assert isinstance(opened.test, ArrayExamples)
    return Dataset(opened.train.split, opened.test.split, opened.class_names)


def _source(name: str) -> Source:
    if why := why_unknown(name):
        raise DataError(why)
    if name == "digits":
        return digits()
    if (spec := DATASETS.get(name)) and spec.synthetic:
        return synthetic(name, spec)
    embedded = ", ".join(key for key, spec in DATASETS.items() if spec.embedded)
    raise NotPreparedError(
        f"dataset {name!r} is not prepared on this machine; embedded: {embedded}"
    )


def digits() -> Source:
    """1,797 greyscale digits of 8x8 pixels; the last fifth, in the order of the file, is the test.

    The file is ordered by writer, so most test digits come from hands that no training digit comes
    from. scikit-learn carries the images, so there is nothing to download.
    """
    from sklearn.datasets import load_digits  # takes a second

    bunch = load_digits()
    images = np.round(bunch.images[..., None] * (255 / 16)).astype(np.uint8)  # 0 to 16 on file
    labels = bunch.target.astype(np.int32)
    count = DATASETS["digits"].train_images
    splits = {
        "train": Split(images[:count], labels[:count]),
        "test": Split(images[count:], labels[count:]),
    }
    return _of_arrays("digits", splits, tuple(str(name) for name in bunch.target_names))


def synthetic(name: str, spec: Spec) -> Source:
    """Noise of a dataset's shape, the same every time: what is measured on it is speed alone."""
    generator = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = generator.integers(0, 256, (count, *spec.image_shape), dtype=np.uint8)
        return Split(images, generator.integers(0, spec.classes, count, dtype=np.int32))

    splits = {"train": split(spec.train_images), "test": split(spec.test_images)}
    return _of_arrays(name, splits, tuple(str(number) for number in range(spec.classes)))


def _of_arrays(name: str, splits: Mapping[str, Split], class_names: tuple[str, ...]) -> Source:
    examples = {split: ArrayExamples(part, f"{name} {split}") for split, part in splits.items()}
    _, *shape = next(iter(splits.values())).images.shape
    return Source(examples, class_names, tuple(shape))
