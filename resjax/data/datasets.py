"""Datasets as arrays on the host."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from resjax.data import DATASETS


class Split(NamedTuple):
    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n"]


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
