"""Datasets as arrays on the host."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from resjax.data import DATASETS, Spec


class Split(NamedTuple):
    """Images and labels, on the host or on a device."""

    images: UInt8[Any, "n h w c"]  # an array of NumPy's or JAX's
    labels: Int[Any, "n"]


class Dataset(NamedTuple):
    train: Split
    test: Split
    class_names: tuple[str, ...]


class NotPreparedError(Exception):
    """The dataset is known, but not on this machine."""


def load(name: str) -> Dataset:
    """Reads a dataset whole.

    Raises:
      NotPreparedError: its files are not here.
    """
    if name == "digits":
        return digits()
    if (spec := DATASETS.get(name)) and spec.synthetic:
        return synthetic(spec)
    embedded = ", ".join(key for key, spec in DATASETS.items() if spec.embedded)
    raise NotPreparedError(
        f"dataset {name!r} is not prepared on this machine; embedded: {embedded}"
    )


def digits() -> Dataset:
    """1,797 greyscale digits of 8x8 pixels; the last fifth, in the order of the file, is the test.

    The file is ordered by writer, so most test digits come from hands that no training digit comes
    from. scikit-learn carries the images, so there is nothing to download.
    """
    from sklearn.datasets import load_digits  # takes a second

    bunch = load_digits()
    images = np.round(bunch.images[..., None] * (255 / 16)).astype(np.uint8)  # 0 to 16 on file
    labels = bunch.target.astype(np.int32)
    count = DATASETS["digits"].train_images
    return Dataset(
        train=Split(images[:count], labels[:count]),
        test=Split(images[count:], labels[count:]),
        class_names=tuple(str(name) for name in bunch.target_names),
    )


def synthetic(spec: Spec) -> Dataset:
    """Noise of a dataset's shape, the same every time: what is measured on it is speed alone."""
    generator = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = generator.integers(0, 256, (count, *spec.image_shape), dtype=np.uint8)
        return Split(images, generator.integers(0, spec.classes, count, dtype=np.int32))

    return Dataset(
        train=split(spec.train_images),
        test=split(spec.test_images),
        class_names=tuple(str(number) for number in range(spec.classes)),
    )
