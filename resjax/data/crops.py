"""Crops of large images on the host: what ImageNet's images go through before they make a batch.

Images come as Pillow holds them, where possible not yet decoded, for a JPEG decodes faster at a
half, a quarter or an eighth of its size, and a crop knows which of these will do. Every crop is
called alike, with the image and a generator of the image's own. Mirroring, and all else that needs
no large image, is on the device: `resjax.data.augmentation`.

Pillow, because it is here anyway and nothing was faster: a photo of 500x375 pixels takes it 0.80 ms
to decode, simplejpeg 0.67 ms, to which comes a copy, and OpenCV 0.83 ms; resampling takes 0.7 ms.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import UInt8

from resjax.data.decoding import as_array

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = UInt8[np.ndarray, "size size c"]

AREA = (0.08, 1.0)  # of a random crop, as a share of the image
RATIO = (3 / 4, 4 / 3)  # of its width to its height
TRIES = 10

# A JPEG is decoded no smaller than this many times what a crop needs. Pillow's thumbnails have the
# same; with 1 pixels would be off by twice as much.
REDUCING_GAP = 2


class Box(NamedTuple):
    """A part of an image, in pixels of it; edges may lie between two."""

    left: float
    top: float
    right: float
    bottom: float


def random_resized_crop(image: "Image", generator: np.random.Generator, *, size: int) -> Pixels:
    """A crop of random area and ratio, resampled to a square of `size` (Szegedy et al. 2014).

    Area and the logarithm of the ratio are uniform, as in torchvision. An image so long that no
    crop fits is cropped in its middle.
    """
    return resampled(image, random_box(generator, *image.size), size)


def random_box(generator: np.random.Generator, width: int, height: int) -> Box:
    """Where `random_resized_crop` crops an image of this size."""
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


def scale_jitter_crop(
    image: "Image",
    generator: np.random.Generator,
    *,
    size: int,
    shorter_sides: tuple[int, int] = (256, 480),
) -> Pixels:
    """A random square of `size`, of the image brought to a random scale (He et al. 2015).

    The shorter side has a length drawn from `shorter_sides`, both included (Simonyan & Zisserman
    2014). Only the square is resampled, not the image.
    """
    low, high = shorter_sides
    width, height = scaled(image.size, int(generator.integers(low, high + 1)))
    left = int(generator.integers(width - size + 1))
    top = int(generator.integers(height - size + 1))
    x, y = image.width / width, image.height / height
    return resampled(image, Box(left * x, top * y, (left + size) * x, (top + size) * y), size)


def resize_and_center_crop(
    image: "Image", _: np.random.Generator, *, size: int, shorter_side: int | None = None
) -> Pixels:
    """The square of `size` in the middle of the image, whose shorter side is resampled first.

    Args:
      image: of any size.
      size: of the square.
      shorter_side: what it is brought to; None is 8/7 of `size`, 256 pixels for 224.
    """
    return center(with_shorter_side(image, size, shorter_side), size)


def center(image: "Image", size: int) -> Pixels:
    """The square of `size` in the middle."""
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return as_array(image.crop((left, top, left + size, top + size)))


def ten_crop(
    image: "Image", _: np.random.Generator, *, size: int, shorter_side: int | None = None
) -> UInt8[np.ndarray, "10 size size c"]:
    """The four corners and the middle, of the image and its mirror image (Krizhevsky et al. 2012).

    In the order of torchvision: top left, top right, bottom left, bottom right, middle. Arguments
    as of `resize_and_center_crop`.
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
    """The whole image, resampled."""
    from PIL.Image import Resampling

    side = shorter_side or usual_shorter_side(size)
    return image.resize(scaled(image.size, side), Resampling.BILINEAR)


def usual_shorter_side(size: int) -> int:
    """To which an image is brought before a square of `size` is cut: 256 pixels for 224."""
    return round(size * 8 / 7)


def scaled(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """Width and height once the shorter has this length; the other is rounded down."""
    width, height = size
    shorter = min(size)
    return width * shorter_side // shorter, height * shorter_side // shorter


def resampled(image: "Image", box: Box, size: int) -> Pixels:
    """A part of the image as a square of `size`, decoded no larger than that takes."""
    from PIL.Image import Resampling

    width, height = image.size
    shrink = min(box.right - box.left, box.bottom - box.top) / (REDUCING_GAP * size)
    # Of a JPEG not yet decoded; of others it does nothing.
    image.draft(None, (math.ceil(width / shrink), math.ceil(height / shrink)))
    x, y = image.width / width, image.height / height
    part = (box.left * x, box.top * y, box.right * x, box.bottom * y)
    return as_array(image.resize((size, size), Resampling.BILINEAR, box=part))
