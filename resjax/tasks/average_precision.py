"""Average precision of detections, as COCO defines it, from sums that add up over batches.

A detection is right if it overlaps an object of its class, which no better detection has taken, by
a threshold or more. That is decided within each image; what adds up over images is the number of
right and wrong detections by class, threshold and score. Scores are counted in `BINS` equal bins,
so the result differs from pycocotools' by the order of detections in one bin alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from resjax.tasks.boxes import Detections, area, overlap

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
BINS = 1000
MOST_DETECTIONS = 100  # of an image


class Counts(NamedTuple):
    """Numbers of detections by class, threshold and score, and of objects by class."""

    right: Int[Array, "classes thresholds bins"]
    wrong: Int[Array, "classes thresholds bins"]
    objects: Int[Array, "classes"]


def count(
    detections: Detections,
    boxes: Float[Array, "n objects 4"],
    classes: Int[Array, "n objects"],
    number: int,
) -> Counts:
    """Counts right and wrong detections in a batch of images.

    Args:
      detections: by falling score, at most `MOST_DETECTIONS` of which count.
      boxes: of the objects, in pixels.
      classes: of the objects; 0 only fills the array.
      number: of classes, 0 included.
    """
    best = jax.tree.map(lambda values: values[:, :MOST_DETECTIONS], detections)
    right = jax.vmap(_right)(best, boxes, classes)  # n, detections, thresholds
    counts = best.scores > 0
    bins = jnp.clip((best.scores * BINS).astype(int), 0, BINS - 1)
    place = (best.classes * BINS + bins)[..., None] * len(THRESHOLDS) + jnp.arange(len(THRESHOLDS))
    length = number * BINS * len(THRESHOLDS)

    def histogram(chosen: Bool[Array, "n detections thresholds"]) -> Array:
        flat = jnp.where(chosen & counts[..., None], place, length).ravel()
        numbers = jnp.bincount(flat, length=length).reshape(number, BINS, -1)
        return numbers.swapaxes(1, 2).astype(jnp.int32)

    real = jnp.where(classes > 0, classes, number).ravel()
    objects = jnp.bincount(real, length=number).astype(jnp.int32)
    return Counts(histogram(right), histogram(~right), objects)


def _right(
    detections: Detections, boxes: Float[Array, "objects 4"], classes: Int[Array, "objects"]
) -> Bool[Array, "detections thresholds"]:
    """Returns which detections of one image are right at each threshold."""
    overlaps = overlap(detections.boxes, boxes)
    same = (detections.classes[:, None] == classes) & (classes > 0)
    overlaps = jnp.where(same & (area(boxes) > 0), overlaps, -1)

    def take(taken: Array, overlaps: Array) -> tuple[Array, Array]:
        free = jnp.where(taken, -1, overlaps)  # thresholds, objects
        # Of equal overlaps the last counts, as in pycocotools.
        best = free.shape[1] - 1 - free[:, ::-1].argmax(1)
        matched = free.max(1) >= THRESHOLDS
        return taken | (matched[:, None] & (jnp.arange(free.shape[1]) == best[:, None])), matched

    nothing = jnp.zeros((len(THRESHOLDS), len(classes)), bool)
    _, right = lax.scan(take, nothing, overlaps)
    return right


def average_precision(counts: Counts) -> Float[np.ndarray, "classes thresholds"]:
    """Returns the average precision, NaN for classes without an object.

    It is the mean, over 101 values of the recall, of the highest precision at that recall or a
    higher one.
    """
    right, wrong = (np.cumsum(np.asarray(part, float)[..., ::-1], -1) for part in counts[:2])
    objects = np.asarray(counts.objects, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(right / (right + wrong))
        recall = right / objects[:, None, None]
    precision = np.maximum.accumulate(precision[..., ::-1], -1)[..., ::-1]
    result = np.full(precision.shape[:2], np.nan)
    for index in np.ndindex(result.shape):
        if objects[index[0]] > 0:
            place = np.searchsorted(recall[index], RECALLS - 1e-6)  # float32 sums round
            result[index] = np.append(precision[index], 0)[place].mean()
    return result
