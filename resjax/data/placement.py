"""Square views of images, which move masks and boxes together with their image.

A placement is the part of an image that the square shows, and its size there. It is drawn from the
image's size alone. Then the image is resampled bilinearly, its mask to the nearest pixel, and its
boxes are moved and cut at the border.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from resjax.data.boxes import cut_boxes
from resjax.data.crops import (
    Box,
    Pixels,
    random_box,
    resampled,
    resize_and_center_crop,
    scale_jitter_box,
    scaled,
    usual_shorter_side,
)
from resjax.data.decoding import as_image
from resjax.data.examples import VOID, Targets

if TYPE_CHECKING:
    from PIL.Image import Image

SCALES = (0.1, 2.0)  # of large-scale jitter (Ghiasi et al. 2021)
PADDING = (123, 117, 104)  # the mean color of ImageNet, as in torchvision's recipe for detection


class Placement(NamedTuple):
    """A part of an image, resized and put at the top left of a square; the rest is padding."""

    part: Box  # in pixels of the image
    width: int  # of the part in the square, in pixels
    height: int


Place = Callable[[int, int, int, np.random.Generator], Placement]
"""Draws a placement from the width and height of an image and the side of the square."""


def random_resized(width: int, height: int, side: int, random: np.random.Generator) -> Placement:
    """Draws a part of random area and ratio and resizes it to the square (Szegedy et al. 2014)."""
    return Placement(random_box(random, width, height), side, side)


def scale_jitter(width: int, height: int, side: int, random: np.random.Generator) -> Placement:
    """Draws a square from the image at a random scale (He et al. 2015)."""
    return Placement(scale_jitter_box(random, width, height, side), side, side)


def large_scale_jitter(
    width: int, height: int, side: int, random: np.random.Generator
) -> Placement:
    """Scales the image between a tenth and twice the square, and crops or pads it at random.

    Ghiasi et al. 2021, "Simple Copy-Paste", as torchvision's recipe: the scale is uniform, a larger
    image is cropped at random, a smaller one is padded at the right and at the bottom.
    """
    ratio = min(side / width, side / height) * random.uniform(*SCALES)
    wide, high = max(int(width * ratio), 1), max(int(height * ratio), 1)
    columns, rows = min(wide, side), min(high, side)
    left = int(random.integers(wide - columns + 1))
    top = int(random.integers(high - rows + 1))
    x, y = width / wide, height / high
    part = Box(left * x, top * y, (left + columns) * x, (top + rows) * y)
    return Placement(part, columns, rows)


def center(width: int, height: int, side: int, _: np.random.Generator) -> Placement:
    """Returns the central square that `crops.resize_and_center_crop` shows."""
    wide, high = scaled((width, height), usual_shorter_side(side))
    left, top = round((wide - side) / 2), round((high - side) / 2)
    x, y = width / wide, height / high
    return Placement(Box(left * x, top * y, (left + side) * x, (top + side) * y), side, side)


def fit(width: int, height: int, side: int, _: np.random.Generator) -> Placement:
    """Returns the largest square in the center of the image, which `decoding.resize` shows."""
    shorter = min(width, height)
    left, top = (width - shorter) / 2, (height - shorter) / 2
    return Placement(Box(left, top, left + shorter, top + shorter), side, side)


def whole(width: int, height: int, side: int, _: np.random.Generator) -> Placement:
    """Fits the longer side into the square, which is padded at the right or at the bottom."""
    ratio = side / max(width, height)
    part = Box(0, 0, width, height)
    return Placement(part, max(round(width * ratio), 1), max(round(height * ratio), 1))


@dataclass(frozen=True)
class View:
    """A square view of images, with their masks and boxes.

    Attributes:
      place: draws where an image lies in the square.
      side: of the square, in pixels.
    """

    place: Place
    side: int

    def __call__(self, image: "Image", generator: np.random.Generator) -> Pixels:
        return self.targeted(image, {}, generator)[0]

    def targeted(
        self, image: "Image", targets: Targets, generator: np.random.Generator
    ) -> tuple[Pixels, Targets]:
        """Returns the view of an image, and its mask and boxes in the view.

        Args:
          image: a JPEG need not be decoded yet.
          targets: a `mask` of the image's size; `boxes` in its pixels and their `classes`. Padding
            is void. A box outside the view gets the class 0. Other targets are unchanged.
          generator: the image's own.
        """
        size = image.size
        placement = self.place(*size, self.side, generator)
        moved = dict(targets)
        if "mask" in targets:
            moved["mask"] = _moved_mask(targets["mask"], placement, self.side)
        if "boxes" in targets:
            moved["boxes"], left = _moved_boxes(targets["boxes"], placement)
            moved["classes"] = np.where(left, targets["classes"], 0).astype(np.int32)
        if self.place is center:  # resizes the whole image, so the pixels differ slightly
            return resize_and_center_crop(image, generator, size=self.side), moved
        part, width, height = placement
        pixels = resampled(image, part, width, height)
        channels = pixels.shape[-1]
        fill = PADDING if channels == len(PADDING) else round(sum(PADDING) / len(PADDING))
        return _padded(pixels, self.side, fill), moved


def _moved_mask(
    mask: UInt8[np.ndarray, "h w"], placement: Placement, side: int
) -> UInt8[np.ndarray, "side side"]:
    from PIL.Image import Resampling

    part, width, height = placement
    resized = as_image(mask[..., None]).resize((width, height), Resampling.NEAREST, box=part)
    return _padded(np.asarray(resized), side, VOID)


def _moved_boxes(
    boxes: Float[np.ndarray, "objects 4"], placement: Placement
) -> tuple[Float[np.ndarray, "objects 4"], np.ndarray]:
    """Returns the boxes in the square, and whether each of them has an area left."""
    part, width, height = placement
    scale = width / (part.right - part.left), height / (part.bottom - part.top)
    moved = (boxes - np.tile((part.left, part.top), 2)) * np.tile(scale, 2)
    cut, left = cut_boxes(moved.astype(np.float32), np.array((width, height), np.float32))
    return np.where(left[:, None], cut, np.float32(0)), left


def _padded(pixels: np.ndarray, side: int, fill: int | tuple[int, ...]) -> np.ndarray:
    if pixels.shape[:2] == (side, side):
        return pixels
    square = np.full((side, side, *pixels.shape[2:]), fill, np.uint8)
    square[: pixels.shape[0], : pixels.shape[1]] = pixels
    return square
