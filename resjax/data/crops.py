"""Crops of large images on the host, before they are batched.

Each crop is called with a Pillow image and the image's own random generator. A JPEG is not decoded
before the crop is known, because decoding at a half, a quarter or an eighth of its size is faster.
Augmentation that does not need the large image runs on the device: `resjax.data.augmentation`.

Alternatives to Pillow are not faster: for a photo of 500x375 pixels Pillow takes 0.80 ms to decode,
simplejpeg 0.67 ms and a copy, OpenCV 0.83 ms. Resampling takes 0.7 ms.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import UInt8

from resjax.data.decoding import as_array

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = UInt8[np.ndarray, "size size c"]

AREA = (0.08, 1.0)  # bounds of a random crop's area, as a fraction of the image's
RATIO = (3 / 4, 4 / 3)  # bounds of width / height
TRIES = 10
SHORTER_SIDES = (256, 480)  # bounds of the image's shorter side before a crop of 224 pixels

# A JPEG is decoded at no less than this multiple of the size that a crop needs, as in Pillow's
# thumbnails. With 1, the error of the pixels would be twice as large.
REDUCING_GAP = 2


class Box(NamedTuple):
    """A part of an image, in pixels, which may be fractional."""

    left: float
    top: float
    right: float
    bottom: float


def random_box(generator: np.random.Generator, width: int, height: int) -> Box:
    """Draws a box of random area and ratio (Szegedy et al. 2014).

    The area and the logarithm of the ratio are uniform, as in torchvision. If no box fits, because
    the image is too elongated, its center is used.
    """
    for _ in range(TRIES):
        area = width * height * generator.uniform(*AREA)
        ratio = math.exp(generator.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            left = int(generator.integers(width - columns + 1))
            top = int(generator.integers(height - rows + 1))
            return Box(left, top, left + columns, top + rows)
    columns = min(width, round(height * RATIO[1]))
    rows = min(height, round(width / RATIO[0]))
    left, top = (width - columns) // 2, (height - rows) // 2
    return Box(left, top, left + columns, top + rows)


def scale_jitter_box(
    generator: np.random.Generator,
    width: int,
    height: int,
    size: int,
    shorter_sides: tuple[int, int] = SHORTER_SIDES,
) -> Box:
    """Draws a square of `size` pixels in the image at a random scale (He et al. 2015).

    The image's shorter side is drawn uniformly from the range `shorter_sides`, bounds included
    (Simonyan & Zisserman 2014).
    """
    low, high = shorter_sides
    wide, tall = scaled((width, height), int(generator.integers(low, high + 1)))
    left = int(generator.integers(wide - size + 1))
    top = int(generator.integers(tall - size + 1))
    x, y = width / wide, height / tall
    return Box(left * x, top * y, (left + size) * x, (top + size) * y)


def resize_and_center_crop(
    image: "Image", _: np.random.Generator, *, size: int, shorter_side: int | None = None
) -> Pixels:
    """Resizes the image's shorter side to `shorter_side` and crops the central square of `size`.

    `shorter_side=None` is 8/7 of `size`, 256 pixels for 224.
    """
    return center(with_shorter_side(image, size, shorter_side), size)


def center(image: "Image", size: int) -> Pixels:
    """Crops the central square of `size`."""
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return as_array(image.crop((left, top, left + size, top + size)))


def ten_crop(
    image: "Image", _: np.random.Generator, *, size: int, shorter_side: int | None = None
) -> UInt8[np.ndarray, "10 size size c"]:
    """Crops the four corners and the center, of the image and its mirror image.

    Krizhevsky et al. 2012, in torchvision's order: top left, top right, bottom left, bottom right,
    center. The arguments are those of `resize_and_center_crop`.
    """
    image = with_shorter_side(image, size, shorter_side)
    whole = as_array(image)
    right, bottom = image.width - size, image.height - size
    corners = (0, 0), (0, right), (bottom, 0), (bottom, right)
    places = (*corners, (round(bottom / 2), round(right / 2)))
    return np.stack(
        [
            view[top : top + size, left : left + size]
            for view in (whole, whole[:, ::-1])
            for top, left in places
        ]
    )


def with_shorter_side(image: "Image", size: int, shorter_side: int | None) -> "Image":
    """Resizes the whole image."""
    from PIL.Image import Resampling

    side = shorter_side or usual_shorter_side(size)
    return image.resize(scaled(image.size, side), Resampling.BILINEAR)


def usual_shorter_side(size: int) -> int:
    """Returns the usual shorter side before a crop of `size`: 256 pixels for 224."""
    return round(size * 8 / 7)


def scaled(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """Returns (width, height) with this shorter side; the longer one is rounded down."""
    width, height = size
    shorter = min(size)
    return width * shorter_side // shorter, height * shorter_side // shorter


def resampled(
    image: "Image", box: Box, columns: int, rows: int | None = None
) -> UInt8[np.ndarray, "rows columns c"]:
    """Resamples a part of the image, decoding no more than necessary; `rows` are like `columns`."""
    from PIL.Image import Resampling

    width, height = image.size
    rows = columns if rows is None else rows
    wide, tall = box.right - box.left, box.bottom - box.top
    shrink = min(wide / (REDUCING_GAP * columns), tall / (REDUCING_GAP * rows))
    # This has an effect on JPEGs that are not decoded yet.
    image.draft(None, (math.ceil(width / shrink), math.ceil(height / shrink)))
    x, y = image.width / width, image.height / height
    part = (box.left * x, box.top * y, box.right * x, box.bottom * y)
    return as_array(image.resize((columns, rows), Resampling.BILINEAR, box=part))
