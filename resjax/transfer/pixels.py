"""What an image goes through before pretrained weights, whoever trained them: one function."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from resjax.data.crops import center, scaled
from resjax.data.decoding import as_array, resize
from resjax.transfer.weights import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels


def preprocess(
    image: "Image", _: np.random.Generator | None = None, *, preprocessing: Preprocessing
) -> UInt8[np.ndarray, "size size c"]:
    """The pixels that the weights' evaluation sees, for `resjax.data.normalization.normalize`.

    With `preprocessing` bound it is a crop as `resjax.data.stream` wants them.

    Args:
      image: of any size; grey ones become RGB where that is asked for, and the other way round.
      preprocessing: of the weights.

    Raises:
      KeyError: the weights want neither 1 channel nor 3.
      OSError: the image is not decoded yet, and cannot be.
    """
    from PIL.Image import Resampling

    size, side = preprocessing.size, preprocessing.shorter_side
    resampling = Resampling[preprocessing.interpolation.upper()]
    mode = MODES[preprocessing.channels]
    if image.mode != mode:
        image = image.convert(mode)
    if preprocessing.squash:
        return center(image.resize((side, side), resampling), size)
    if side == size:  # cut first, so that the square is the middle to a fraction of a pixel
        return as_array(resize(image, size, preprocessing.interpolation))
    return center(image.resize(scaled(image.size, side), resampling), size)
