"""Decodes images with Pillow to upright 8-bit RGB or grayscale.

EXIF orientation, palettes, alpha, CMYK and 16 bits are converted.
"""

import io
import struct
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import UInt8

from resjax.data.examples import BadImageError
from resjax.errors import one_line

if TYPE_CHECKING:
    from PIL import Image

Interpolation = Literal["nearest", "bilinear", "bicubic"]


def decode(data: bytes, channels: int, origin: str) -> UInt8[np.ndarray, "h w c"]:
    """Decodes an image.

    Args:
      data: a file's contents.
      channels: 3 for RGB, 1 for grayscale.
      origin: the image's name in the error message.

    Raises:
      BadImageError: the data are truncated or not an image.
    """
    return as_array(open_image(data, channels, origin))


def open_image(data: bytes, channels: int, origin: str, *, lazily: bool = False) -> "Image.Image":
    """Like `decode`, but returns a Pillow image.

    With `lazily`, an upright JPEG with the right channels is not decoded yet, so that `draft` can
    still reduce its size; if it is truncated, decoding it raises OSError.
    """
    from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

    mode = "RGB" if channels == 3 else "L"
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if lazily and upright and (image.format, image.mode) == ("JPEG", mode):
            return image
        ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError as error:  # its message shows an object's address
        raise BadImageError(f"{origin}: cannot be decoded: it is not an image") from error
    # Pillow's parsers raise these on damaged files.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise BadImageError(f"{origin}: cannot be decoded: {one_line(error)}") from error
    if image.mode == "F":
        raise BadImageError(f"{origin}: has floating-point pixels; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode == "P":  # Pillow warns about dropping a palette's transparency
        image = image.convert("RGBA")
    return image.convert(mode)


def as_array(image: "Image.Image") -> UInt8[np.ndarray, "h w c"]:
    return np.asarray(image).reshape(image.height, image.width, -1)


def as_image(array: UInt8[np.ndarray, "h w c"]) -> "Image.Image":
    from PIL import Image

    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def resize(
    image: "Image.Image", size: int, interpolation: Interpolation = "bilinear"
) -> "Image.Image":
    """Resizes the shorter side to `size` pixels and center-crops the longer one."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size, size), Image.Resampling[interpolation.upper()])
