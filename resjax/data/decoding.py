"""Encoded images to arrays: what cameras, scanners and the web make of "an image".

Orientation, palettes, alpha, CMYK and 16 bits are brought to eight bits of RGB or grey, upright;
what cannot be read is told by its origin. Pillow does the work.
"""

import io
import struct
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import UInt8

from resjax.data.examples import BadImageError, in_one_line

if TYPE_CHECKING:
    from PIL import Image

Interpolation = Literal["nearest", "bilinear", "bicubic"]


def decode(data: bytes, channels: int, origin: str) -> UInt8[np.ndarray, "h w c"]:
    """Decodes an image, upright, in the channels that its dataset has.

    Args:
      data: a file's contents.
      channels: 3 is RGB, 1 is grey.
      origin: names the image in the error.

    Raises:
      BadImageError: it is truncated, or no image.
    """
    return as_array(open_image(data, channels, origin))


def open_image(data: bytes, channels: int, origin: str, *, lazily: bool = False) -> "Image.Image":
    """Like `decode`, for those who go on with Pillow.

    Args:
      data: as of `decode`, like `channels` and `origin`.
      lazily: leave a JPEG undecoded that is upright and has the right channels, so that `draft` can
        still make it smaller. One that is truncated then raises OSError where it is decoded.
    """
    from PIL import ExifTags, Image, ImageOps

    mode = "RGB" if channels == 3 else "L"
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if lazily and upright and (image.format, image.mode) == ("JPEG", mode):
            return image
        ImageOps.exif_transpose(image, in_place=True)
    # What Pillow's parsers are known to raise on damaged files.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise BadImageError(f"{origin}: cannot be decoded: {in_one_line(error)}") from error
    if image.mode == "F":
        raise BadImageError(f"{origin}: has floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip them
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode == "P":  # whose transparency Pillow wants in the open before it is dropped
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
    """Brings the shorter side to `size` pixels and cuts the longer one to it, at both ends."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size, size), Image.Resampling[interpolation.upper()])
