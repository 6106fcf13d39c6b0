"""The preprocessing of images for pretrained weights."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from resjax.data.crops import center, scaled
from resjax.data.decoding import as_array, resize
from resjax.transfer.weights import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}  # Pillow's, by number of channels


def preprocess(
    image: "Image", _: np.random.Generator | None = None, *, preprocessing: Preprocessing
) -> UInt8[np.ndarray, "size size c"]:
    """Returns the pixels that the weights are evaluated on, before their normalization.

    With `preprocessing` bound, it is a crop function for `resjax.data.stream`.

    Args:
      image: of any size, grayscale or RGB; converted if the weights take the other.
      preprocessing: of the weights.

    Raises:
      KeyError: the weights take neither 1 nor 3 channels.
      OSError: the image cannot be decoded.
    """
    from PIL.Image import Resampling

    size, side = preprocessing.size, preprocessing.shorter_side
    resampling = Resampling[preprocessing.interpolation.upper()]
    mode = MODES[preprocessing.channels]
    if image.mode != mode:
        image = image.convert(mode)
    if preprocessing.squash:
        return center(image.resize((side, side), resampling), size)
    if side == size:  # cropped first, so that the square is centered to a fraction of a pixel
        return as_array(resize(image, size, preprocessing.interpolation))
    return center(image.resize(scaled(image.size, side), resampling), size)
