"""Cuts and pads boxes, which are left, top, right and bottom in pixels."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

Boxes = Float[np.ndarray, "objects 4"]


def cut_boxes(boxes: Boxes, size: Any) -> tuple[Boxes, Bool[np.ndarray, "objects"]]:
    """Returns boxes cut at the border of their images, and whether each of them has an area left.

    Args:
      boxes: of one image or of several.
      size: width and height of the image, or of the image of each box.
    """
    cut = np.clip(boxes, 0, np.tile(size, 2))
    return cut, (cut[:, 2:] > cut[:, :2]).all(1)


def padded_boxes(
    boxes: Boxes, classes: Int[np.ndarray, "objects"], room: int
) -> dict[str, np.ndarray]:
    """Returns boxes and classes as targets with room for `room` objects; the rest has class 0."""
    rest = room - len(boxes)
    return {
        "boxes": np.pad(boxes.astype(np.float32), ((0, rest), (0, 0))),
        "classes": np.pad(classes.astype(np.int32), (0, rest)),
    }
