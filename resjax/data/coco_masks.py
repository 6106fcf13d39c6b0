"""Semantic masks from the segmentations of COCO's annotations.

A segmentation is a list of polygons; or run lengths in the order of columns, alternately outside
and inside the object, as numbers or compressed to a string. As in torchvision's recipe, pycocotools
draws the polygons. Run lengths are decoded here, because pycocotools 2.0.11 writes beyond its
memory if a string is damaged.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from resjax.data.examples import VOID, DataError
from resjax.errors import one_line

Segmentation = Any  # as JSON: a list of polygons, or {"size": [h, w], "counts": ...}


class Region(NamedTuple):
    """The pixels of an annotation."""

    origin: str  # for messages: "instances.json: annotation 7"
    label: int  # of its class, or VOID for a crowd
    segmentation: Segmentation


def semantic_mask(regions: Iterable[Region], height: int, width: int) -> UInt8[np.ndarray, "h w"]:
    """Draws the objects of an image; 0 is the background.

    Smaller objects lie over larger ones, and of equal ones the later over the earlier. A crowd is
    void where no object lies over it.

    Raises:
      DataError: a segmentation is malformed or that of an image of another size.
    """
    shapes = [(each.label, region_pixels(each, height, width)) for each in regions]
    shapes.sort(key=lambda each: (each[0] != VOID, -np.count_nonzero(each[1])))
    mask = np.zeros((height, width), np.uint8)
    for label, pixels in shapes:
        mask[pixels] = label
    return mask


def region_pixels(region: Region, height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """Returns which pixels belong to a region; raises like `semantic_mask`."""
    origin, _, segmentation = region
    if isinstance(segmentation, list):
        segmentation = _run_lengths(segmentation, height, width, origin)
    try:
        size, counts = segmentation["size"], segmentation["counts"]
        lengths = np.array(_decompressed(counts) if isinstance(counts, str) else counts, np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{origin}: its segmentation cannot be read: {one_line(error)}") from error
    if size != [height, width]:
        raise DataError(
            f"{origin}: its segmentation has the size {size}, its image {[height, width]}"
        )
    total = height * width
    if (
        lengths.ndim != 1
        or (lengths < 0).any()
        or (lengths > total).any()
        or lengths.sum() != total
    ):
        raise DataError(f"{origin}: its run lengths do not cover the {width}x{height} pixels")
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T


def _run_lengths(polygons: list[Any], height: int, width: int, origin: str) -> dict[str, Any]:
    """Returns the union of polygons as compressed run lengths."""
    from pycocotools import mask as coco

    side = max(height, width)
    for polygon in polygons:
        try:
            numbers = np.array(polygon, np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"{origin}: its polygon cannot be read: {one_line(error)}") from error
        if numbers.ndim != 1 or len(numbers) < 6 or len(numbers) % 2:
            raise DataError(
                f"{origin}: its polygon has {numbers.size} numbers, not x and y of three or more "
                "points"
            )
        # Far points are mistakes, and pycocotools takes memory for every pixel on the way to them.
        if not ((numbers >= -side) & (numbers <= 2 * side)).all():
            raise DataError(f"{origin}: its polygon has points far outside the image")
    union = coco.merge(coco.frPyObjects(polygons, height, width))
    return {"size": union["size"], "counts": union["counts"].decode("ascii")}


def _decompressed(text: str) -> list[int]:
    """Returns the run lengths that a string contains.

    A character holds five bits, lowest first, and a bit that says whether more follow; the highest
    bit is the sign. From the fourth number on, each is the difference to the one before the last.
    """
    lengths: list[int] = []
    number = shift = 0
    for code in text.encode("ascii"):
        bits = code - 48
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        lengths.append(number + lengths[-2] if len(lengths) > 2 else number)
        number = shift = 0
    return lengths
