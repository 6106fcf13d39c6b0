"""Images through a network: files found, prepared as the weights want them, in equal batches."""

import errno
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt8

from resjax.data.datasets import OnBadImage
from resjax.data.examples import Examples
from resjax.data.stream import eval_batches
from resjax.data.user_data import FileExamples, image_files
from resjax.errors import UserError
from resjax.transfer.pixels import MODES, preprocess
from resjax.transfer.weights import Preprocessing

Function = Callable[[UInt8[np.ndarray, "b h w c"]], Float[Array, "b d"]]


class Outputs(NamedTuple):
    """What a function of images gives, in the order of the images."""

    values: Float[np.ndarray, "n d"]  # of the good ones, like their labels
    labels: Int32[np.ndarray, "n"]
    good: Bool[np.ndarray, "examples"]  # False: cannot be decoded, and was left out


def find_images(paths: Iterable[Path]) -> FileExamples:
    """The images at `paths`: files as they come, and those below folders, sorted.

    Raises:
      UserError: a path is not there, or a folder holds no image.
    """
    found: list[str] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: cannot be read: {os.strerror(errno.ENOENT)}")
        inside = [str(file) for file in image_files(path)] if path.is_dir() else [str(path)]
        if not inside:
            raise UserError(f"{path}: holds no image (.jpg, .png, ...)")
        found += inside
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
    """What a compiled function of batches gives for every image, each prepared for the weights.

    Args:
      function: called with batches of one size, so that it compiles once: the last is filled up.
      examples: the images.
      preprocessing: of the weights.
      batch_size: images a batch, at most.
      on_bad_image: whether an image that cannot be decoded is an error, or left out.
      workers: processes that decode; 0 is a thread.

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
            labels.append(batch.labels)
            weights.append(batch.weights)
            if len(values) > 1:  # the device works while the next is decoded, and no further
                values[-2] = np.asarray(values[-2])
    counted = np.concatenate(weights) > 0
    return Outputs(
        np.concatenate(values)[counted], np.concatenate(labels)[counted], counted[: len(examples)]
    )
