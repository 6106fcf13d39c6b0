"""Boxes: anchors, their overlap, coding and matching, and non-maximum suppression.

A box is (left, top, right, bottom) in pixels. Everything has fixed shapes, so that it can be
compiled. The formulas and their order are those of torchvision's detection models, with which the
tests compare it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Boxes = Float[Array, "... boxes 4"]

BACKGROUND, BETWEEN = -1, -2
"""Matches of anchors that overlap no object enough, and of those that do not count."""

LARGEST_GROWTH = math.log(1000 / 16)
"""The largest logarithm of a box's side divided by its anchor's."""


def anchors(
    image_size: Sequence[int],
    grids: Sequence[Sequence[int]],
    sizes: Sequence[Sequence[float]],
    ratios: Sequence[float],
) -> list[Float[np.ndarray, "anchors 4"]]:
    """Returns the anchors of each level, ordered by row, column, ratio and size.

    Args:
      image_size: (height, width) in pixels.
      grids: (height, width) of each level.
      sizes: of each level, the roots of the anchors' areas, in pixels.
      ratios: height divided by width.
    """
    levels = []
    for (rows, columns), level in zip(grids, sizes, strict=True):
        heights = np.sqrt(np.asarray(ratios, np.float32))
        tall, wide = (
            np.outer(side, np.asarray(level, np.float32)).ravel() for side in (heights, 1 / heights)
        )
        shapes = np.round(np.stack([-wide, -tall, wide, tall], 1) / 2)
        stride = image_size[0] // rows, image_size[1] // columns
        y, x = np.meshgrid(
            np.arange(rows) * stride[0], np.arange(columns) * stride[1], indexing="ij"
        )
        centers = np.stack([x, y, x, y], -1).reshape(-1, 1, 4)
        levels.append((centers + shapes).reshape(-1, 4).astype(np.float32))
    return levels


def area(boxes: Boxes) -> Float[Array, "... boxes"]:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlap(some: Boxes, others: Boxes) -> Float[Array, "... some others"]:
    """Returns the intersection of each pair of boxes divided by their union."""
    corner = jnp.maximum(some[..., :, None, :2], others[..., None, :, :2])
    opposite = jnp.minimum(some[..., :, None, 2:], others[..., None, :, 2:])
    shared = jnp.prod(jnp.maximum(opposite - corner, 0), -1)
    union = area(some)[..., :, None] + area(others)[..., None, :] - shared
    return shared / union


def encode(boxes: Boxes, anchors: Boxes) -> Boxes:
    """Returns boxes relative to anchors: shifts of the center and logarithms of the growth."""
    center, side = _center_and_side(boxes)
    origin, unit = _center_and_side(anchors)
    return jnp.concatenate([(center - origin) / unit, jnp.log(side / unit)], -1)


def decode(deltas: Boxes, anchors: Boxes) -> Boxes:
    """Returns the boxes that `encode` encoded; growth is limited to `LARGEST_GROWTH`."""
    origin, unit = _center_and_side(anchors)
    center = deltas[..., :2] * unit + origin
    half = jnp.exp(jnp.minimum(deltas[..., 2:], LARGEST_GROWTH)) * unit / 2
    return jnp.concatenate([center - half, center + half], -1)


def _center_and_side(boxes: Boxes) -> tuple[Array, Array]:
    side = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + side / 2, side


def clip(boxes: Boxes, image_size: Sequence[int]) -> Boxes:
    """Returns boxes cut at the border of the image, (height, width)."""
    height, width = image_size
    return jnp.clip(boxes, 0, jnp.asarray([width, height, width, height], boxes.dtype))


def match(
    overlaps: Float[Array, "objects anchors"],
    real: Bool[Array, "objects"],
    high: float = 0.5,
    low: float = 0.4,
) -> Int[Array, "anchors"]:
    """Returns the object of each anchor, `BACKGROUND` or `BETWEEN`.

    An anchor belongs to the object that it overlaps most, if by `high` or more, and to the
    background if by less than `low`. An anchor that overlaps some object as much as any other
    anchor does belongs to its own best object in any case.

    Args:
      overlaps: of each object with each anchor.
      real: False for objects that only fill the array.
    """
    overlaps = jnp.where(real[:, None], overlaps, -1)
    best, most = overlaps.argmax(0), overlaps.max(0)
    matched = jnp.where(most < low, BACKGROUND, jnp.where(most < high, BETWEEN, best))
    wanted = (overlaps == overlaps.max(1, keepdims=True)) & real[:, None]
    return jnp.where(wanted.any(0), best, matched)


class Detections(NamedTuple):
    """The objects found in each image, by falling score; those of score 0 only fill the arrays."""

    boxes: Float[Array, "n detections 4"]
    scores: Float[Array, "n detections"]
    classes: Int[Array, "n detections"]


def suppress(
    boxes: Float[Array, "boxes 4"],
    scores: Float[Array, "boxes"],
    classes: Int[Array, "boxes"],
    threshold: float,
    most: int,
) -> Int[Array, "most"]:
    """Returns the boxes that remain if each suppresses worse ones of its class.

    Args:
      boxes: candidates.
      scores: of the boxes; those of 0 or less are no candidates.
      classes: boxes of different classes do not suppress each other.
      threshold: of the overlap, above which the worse box is suppressed.
      most: number of boxes that are returned.

    Returns:
      Their indices by falling score, of equal scores the lower index first; -1 fills the array.
    """

    def take(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, chosen, left = state
        best = left.argmax()
        same = (overlap(boxes[best][None], boxes)[0] > threshold) & (classes == classes[best])
        left = jnp.where(same.at[best].set(True), 0, left)
        return count + 1, chosen.at[count].set(best), left

    def goes_on(state: tuple[Array, Array, Array]) -> Array:
        count, _, left = state
        return (count < most) & (left > 0).any()

    start = jnp.asarray(0), jnp.full(most, -1), jnp.maximum(scores, 0)
    return lax.while_loop(goes_on, take, start)[1]


def postprocess(
    logits: Sequence[Float[Array, "anchors classes"]],
    deltas: Sequence[Float[Array, "anchors 4"]],
    anchors: Sequence[Float[Array, "anchors 4"]],
    image_size: Sequence[int],
    *,
    score: float = 0.05,
    candidates: int = 1000,
    overlap: float = 0.5,
    detections: int = 300,
) -> Detections:
    """Returns the objects in one image, from what the head returned for each level.

    Args:
      logits, deltas, anchors: by level.
      image_size: (height, width) in pixels.
      score: the lowest score of a candidate.
      candidates: at most so many of each level.
      overlap: with a better candidate of the same class, above which a candidate is dropped.
      detections: at most so many.
    """
    found = [
        _candidates(*level, image_size, score, candidates)
        for level in zip(logits, deltas, anchors, strict=True)
    ]
    boxes, scores, classes = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
    chosen = suppress(boxes, scores, classes, overlap, detections)
    remains = chosen >= 0
    return Detections(
        jnp.where(remains[:, None], boxes[chosen], 0),
        jnp.where(remains, scores[chosen], 0),
        jnp.where(remains, classes[chosen], 0),
    )


def _candidates(
    logits: Array,
    deltas: Array,
    anchors: Array,
    image_size: Sequence[int],
    score: float,
    candidates: int,
) -> Detections:
    classes = logits.shape[-1]
    scores, chosen = lax.top_k(jax.nn.sigmoid(logits).ravel(), min(candidates, logits.size))
    anchor = chosen // classes
    boxes = clip(decode(deltas[anchor], anchors[anchor]), image_size)
    return Detections(boxes, jnp.where(scores > score, scores, 0), chosen % classes)
