"""Applies a network to images: finds the files, preprocesses them and batches them."""

import errno
import os
from collections.abc import Callable, Iterable
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt8

from resjax.data.datasets import OnBadImage
from resjax.data.examples import Examples
from resjax.data.image_files import Skipped, image_files
from resjax.data.stream import eval_batches
from resjax.data.user_data import FileExamples
from resjax.errors import UserError
from resjax.train.progress import print_warning
from resjax.transfer.pixels import MODES, preprocess
from resjax.transfer.weights import Preprocessing

Function = Callable[[UInt8[np.ndarray, "b h w c"]], Float[Array, "b d"]]


class Outputs(NamedTuple):
    """The outputs of a function of images, in the order of the images."""

    values: Float[np.ndarray, "n d"]  # of the images that could be decoded, like their labels
    labels: Int32[np.ndarray, "n"]
    decoded: Bool[np.ndarray, "examples"]  # False for those that were skipped


def find_images(paths: Iterable[Path]) -> FileExamples:
    """Returns the image files at `paths`, and those below folders in sorted order.

    Prints a warning that names the files and folders that `resjax.data.image_files` skips.

    Raises:
      UserError: a path does not exist, or a folder contains no images.
    """
    found: list[str] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: cannot be read: {os.strerror(errno.ENOENT)}")
        skipped = Skipped(path)
        files = image_files(path, skipped) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path}: contains no images (.jpg, .png, ...)")
        if str(skipped):
            print_warning(f"{path}: skipped {skipped}")
        found += map(str, files)
    return FileExamples(Path(), found, [0] * len(found))


def each_image(
    function: Function,
    examples: Examples,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    on_bad_image: OnBadImage = "error",
    workers: int = 0,
) -> Outputs:
    """Applies a compiled function to preprocessed images.

    Args:
      function: takes batches of one size; the last batch is padded, so that it compiles once.
      examples: the images.
      preprocessing: of the weights.
      batch_size: maximum number of images per batch.
      on_bad_image: whether an image that cannot be decoded is an error, or is skipped.
      workers: decoding processes; 0 decodes in a thread.

    Raises:
      UserError: an image cannot be read or decoded, or none can.
    """
    if preprocessing.channels not in MODES:
        channels = preprocessing.channels
        raise UserError(f"the weights take images of {channels} channels; files have 1 or 3")
    values: list[Any] = []
    labels: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    with eval_batches(
        examples,
        batch_size=min(batch_size, len(examples)),
        crop=partial(preprocess, preprocessing=preprocessing),
        channels=preprocessing.channels,
        workers=workers,
        on_bad_image=on_bad_image,
    ) as feed:
        for batch in feed:
            values.append(function(batch.images))
            labels.append(batch.targets["label"])
            weights.append(batch.weights)
            if len(values) > 1:  # compute while the next batch is decoded
                values[-2] = np.asarray(values[-2])
    counted = np.concatenate(weights) > 0
    return Outputs(
        np.concatenate(values)[counted], np.concatenate(labels)[counted], counted[: len(examples)]
    )


def require_finite(
    values: Float[np.ndarray, "n d"], origins: Iterable[str], what: str = "outputs"
) -> None:
    """Raises a UserError that names the first image whose values are not finite."""
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        raise UserError(
            f"the {what} of {next(compress(origins, bad))} are not finite ({bad.sum():,} of "
            f"{len(values):,} images)"
        )
