"""Decodes images with Pillow to upright 8-bit RGB or grayscale.

EXIF orientation, palettes, alpha, CMYK and 12 or 16 bits per pixel are converted. A 32-bit file
does not say which of its values is white, so only one with values from 0 to 255 is accepted.
"""

import functools
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import UInt8

from resjax.data.examples import VOID, BadImageError, DataError
from resjax.errors import one_line

if TYPE_CHECKING:
    from PIL import Image

Interpolation = Literal["nearest", "bilinear", "bicubic"]

# Some of Pillow's forty decoders start other programs (Ghostscript for EPS) or are old.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000")
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of a TIFF
WHITE_IS_ZERO = 0  # a value of the second


def decode(data: bytes, channels: int, origin: str) -> UInt8[np.ndarray, "h w c"]:
    """Decodes an image.

    Args:
      data: a file's contents.
      channels: 3 for RGB, 1 for grayscale.
      origin: the image's name in the error message.

    Raises:
      BadImageError: the data are damaged or not an image.
    """
    return as_array(open_image(data, channels, origin))


def open_image(data: bytes, channels: int, origin: str, *, lazily: bool = False) -> "Image.Image":
    """Like `decode`, but returns a Pillow image.

    With `lazily`, an upright JPEG with the right channels is not decoded yet, so that `draft` can
    still reduce its size; use it within `decoding`, as it may be damaged.
    """
    from PIL import ExifTags, Image, ImageOps

    mode = "RGB" if channels == 3 else "L"
    with decoding(origin):
        image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if lazily and upright and (image.format, image.mode) == ("JPEG", mode):
            return image
        as_bytes = _conversion(image, origin)
        ImageOps.exif_transpose(image, in_place=True)
        if as_bytes:
            image = Image.fromarray(as_bytes(np.asarray(image)))
        if image.mode in ("P", "PA"):  # Pillow warns about dropping a palette's transparency
            image = image.convert("RGBA")
        if image.mode == "LAB":  # which only its color management converts
            from PIL import ImageCms

            profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")  # type: ignore[assignment]
        return image.convert(mode)


def upright_size(data: bytes, origin: str) -> tuple[int, int]:
    """Returns the width and height of the image that `decode` returns, from its header alone.

    Raises:
      BadImageError: the data are not an image.
    """
    from PIL import ExifTags, Image

    with decoding(origin), Image.open(io.BytesIO(data), formats=_formats()) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def decode_mask(data: bytes, origin: str) -> UInt8[np.ndarray, "h w"]:
    """Decodes an image whose pixels are numbers of classes, which a palette may color.

    Raises:
      BadImageError: the data are damaged or not an image.
      DataError: its pixels are colors, or numbers above 255.
    """
    from PIL import Image

    with decoding(origin):
        image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
        pixels = np.asarray(image)  # of a palette, the indices
        mode = image.mode
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim != 2:
        raise DataError(
            f"{origin}: has colors ({mode}); a mask's pixels must be numbers of classes, in a "
            "grayscale image or as indices of a palette"
        )
    if mode == "F" or pixels.min() < 0 or pixels.max() > VOID:
        raise DataError(
            f"{origin}: has pixels from {pixels.min()} to {pixels.max()}; classes are numbered "
            f"from 0 to {VOID - 1}, and {VOID} is void"
        )
    return pixels.astype(np.uint8)


@functools.cache
def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF may be missing


def _conversion(
    image: "Image.Image", origin: str
) -> Callable[[np.ndarray], UInt8[np.ndarray, "h w"]] | None:
    """Returns a function that converts pixels to 8 bits, or None if they have 8 bits already."""
    if not image.mode.startswith(("F", "I")):
        return None
    tags = getattr(image, "tag_v2", {})
    (bits,) = tags.get(BITS_PER_SAMPLE, (16,))
    inverted = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO  # which Pillow undoes for 8 bits only
    known = image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I")

    def convert(pixels: np.ndarray) -> UInt8[np.ndarray, "h w"]:
        low, high = pixels.min(), pixels.max()
        if not known and (image.mode == "F" or low < 0 or high > 255):
            raise BadImageError(
                f"{origin}: has {low.dtype} pixels from {low:g} to {high:g}, whose white is not "
                "known; convert it to 8 or unsigned 16 bits"
            )
        white = 2**bits - 1 if known else 255
        scaled = np.rint(pixels * (255 / white)).astype(np.uint8)
        return 255 - scaled if inverted else scaled

    return convert


@contextmanager
def decoding(origin: str) -> Iterator[None]:
    """Turns every exception of Pillow's decoders into a BadImageError that names the image."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except BadImageError:
        raise
    except UnidentifiedImageError as error:  # its message shows an object's address
        raise BadImageError(f"{origin}: cannot be decoded: it is not an image") from error
    except Exception as error:
        raise BadImageError(f"{origin}: cannot be decoded: {one_line(error)}") from error


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
