"""Scenes of handwritten digits on textured backgrounds, whose masks and boxes are known exactly.

Each scene has one to four of scikit-learn's digits, enlarged, brighter or darker than a background
of waves and noise, at places where they do not touch. Training scenes show the digits that the
dataset `digits` trains on, test scenes those that it tests on, so most of the writers in a test
scene are unknown. Every scene is a function of its split and number alone.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from resjax.data.examples import Split

SIDE = 64  # pixels of a scene
DIGIT_SIDES = (14, 30)  # bounds of an enlarged digit's side, in pixels
MOST_DIGITS = 4
INK = 0.5  # share of the darkest stroke from which a pixel belongs to the digit
CONTRAST = (0.35, 0.6)  # bounds of the difference between ink and background
TRIES = 20  # draws of a place where a digit touches no other

CLASS_NAMES = ("background", *map(str, range(10)))


class Scene(NamedTuple):
    """A scene: digit d has the value d + 1 in masks and classes; 0 is background or no object."""

    image: UInt8[np.ndarray, "h w 1"]
    mask: UInt8[np.ndarray, "h w"]
    boxes: Float[np.ndarray, "objects 4"]  # left, top, right, bottom, in pixels
    classes: Int[np.ndarray, "objects"]


def scenes(digits: Split, count: int, seed: int) -> Split:
    """Returns `count` scenes with the targets `mask`, `boxes` and `classes`.

    Args:
      digits: images (n, 8, 8, 1) and labels.
      count: number of scenes.
      seed: of a split; scene i is drawn by (seed, i).
    """
    made = [draw_scene(digits, np.random.default_rng((seed, index))) for index in range(count)]
    image, mask, boxes, classes = map(np.stack, zip(*made, strict=True))
    return Split(image, {"mask": mask, "boxes": boxes, "classes": classes})


def draw_scene(digits: Split, generator: np.random.Generator) -> Scene:
    """Draws one scene."""
    image = background(generator)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    free = np.ones((SIDE, SIDE), bool)
    boxes = np.zeros((MOST_DIGITS, 4), np.float32)
    classes = np.zeros(MOST_DIGITS, np.int32)
    drawn = 0
    for _ in range(generator.integers(1, MOST_DIGITS + 1)):
        chosen = int(generator.integers(len(digits)))
        side = int(generator.integers(*DIGIT_SIDES, endpoint=True))
        strokes = enlarged(digits.images[chosen, :, :, 0], side)
        ink = strokes >= INK
        for top, left in generator.integers(0, SIDE - side + 1, (TRIES, 2)):
            window = slice(top, top + side), slice(left, left + side)
            if free[window].all():
                break
        else:
            continue  # the scene is full
        label = int(digits.labels[chosen])
        sign = 1 if image[window][ink].mean() < 0.5 else -1
        image[window] += sign * generator.uniform(*CONTRAST) * strokes
        mask[window][ink] = label + 1
        free[window] = False
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        corners = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        boxes[drawn] = np.add(corners, (left, top, left, top))
        classes[drawn] = label + 1
        drawn += 1
    pixels = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)[..., None]
    return Scene(pixels, mask, boxes, classes)


def background(generator: np.random.Generator) -> Float[np.ndarray, "h w"]:
    """Draws a texture: a gray level, three plane waves and noise."""
    image = np.full((SIDE, SIDE), generator.uniform(0.2, 0.8))
    rows, columns = np.mgrid[:SIDE, :SIDE] * (2 * np.pi / SIDE)
    for _ in range(3):
        along, across = generator.uniform(-8, 8, 2)
        phase = generator.uniform(0, 2 * np.pi)
        image += generator.uniform(0, 0.08) * np.sin(along * rows + across * columns + phase)
    return image + generator.normal(0, 0.03, image.shape)


def enlarged(digit: UInt8[np.ndarray, "8 8"], side: int) -> Float[np.ndarray, "side side"]:
    """Returns a digit with bicubically interpolated strokes from 0 to 1."""
    weights = _interpolation(len(digit), side)
    return np.clip(weights @ (digit / digit.max()) @ weights.T, 0, 1)


@cache
def _interpolation(before: int, after: int) -> Float[np.ndarray, "after before"]:
    """Returns the weights of cubic convolution (Keys 1981, a = -0.5) between rows of pixels."""
    positions = (np.arange(after) + 0.5) * before / after - 0.5
    distance = np.abs(positions[:, None] - np.arange(-2, before + 2))
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    weights[:, 2] += weights[:, :2].sum(1)  # the border is repeated
    weights[:, -3] += weights[:, -2:].sum(1)
    return weights[:, 2:-2]
