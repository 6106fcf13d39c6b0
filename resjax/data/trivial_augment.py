"""TrivialAugment: one random operation of random strength per image (arXiv 2103.10158).

Müller & Hutter 2021, with their "wide" space as in torchvision: there is nothing to tune. The
operations match Pillow's, including its integer arithmetic. Under `vmap` a switch would compute all
fourteen, so they share three computations: an affine warp, a blend with a degenerate image, and a
remapping of gray levels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key, UInt8

LEVELS = 256  # values of a byte
STRENGTHS = 31  # per operation
GRAY = np.array([19595, 38470, 7471])  # 0.299, 0.587, 0.114 in 65536ths, as in Pillow


class Range(NamedTuple):
    """The strengths of an operation, evenly spaced from `weakest` to `strongest`."""

    weakest: float = 0.0
    strongest: float = 0.0
    signed: bool = False  # whether a random sign applies


# Warps, enhancements and remappings, in this order.
WIDE = {
    "identity": Range(),
    "shear_x": Range(0, 0.99, signed=True),
    "shear_y": Range(0, 0.99, signed=True),
    "translate_x": Range(0, 32, signed=True),  # pixels, whatever the image size
    "translate_y": Range(0, 32, signed=True),
    "rotate": Range(0, 135, signed=True),  # degrees, counter-clockwise
    "brightness": Range(0, 0.99, signed=True),  # of enhancements: the factor minus 1
    "color": Range(0, 0.99, signed=True),
    "contrast": Range(0, 0.99, signed=True),
    "sharpness": Range(0, 0.99, signed=True),
    "posterize": Range(8, 2),  # bits kept
    "solarize": Range(255, 0),  # level from which the image is inverted
    "autocontrast": Range(),
    "equalize": Range(),
}
OPERATIONS = tuple(WIDE)


def strengths(operation: Range) -> Float32[np.ndarray, "strengths"]:
    """Returns the strengths of an operation as PyTorch's `linspace` rounds them.

    It counts from the nearer end, with steps in float32, so that the middle translation is of
    15.999999 pixels, which are truncated to 15.
    """
    low, high = np.float32(operation.weakest), np.float32(operation.strongest)
    step = float((high - low) / np.float32(STRENGTHS - 1))
    index = np.arange(STRENGTHS)
    from_low, from_high = low + step * index, high - step * index[::-1]
    return np.where(index < STRENGTHS // 2, from_low, from_high).astype(np.float32)


_STRENGTHS = np.array([strengths(operation) for operation in WIDE.values()])
_SIGNED = np.array([operation.signed for operation in WIDE.values()])

Pixels = Int[Array, "h w c"]  # 0 to 255


def trivial_augment(
    keys: Key[Array, "n"], images: UInt8[Array, "n h w c"]
) -> UInt8[Array, "n h w c"]:
    """Applies one operation of `WIDE`, drawn uniformly, to each image.

    Args:
      keys: one for each image; draw the operation, its strength and its sign.
      images: (n, h, w, c) with 1 or 3 channels.
    """

    def one(key: Array, image: Array) -> Array:
        operation_key, strength_key, sign_key = jax.random.split(key, 3)
        operation = jax.random.randint(operation_key, (), 0, len(WIDE))
        strength = jax.random.randint(strength_key, (), 0, STRENGTHS)
        magnitude = jnp.asarray(_STRENGTHS)[operation, strength]
        negative = jnp.asarray(_SIGNED)[operation] & jax.random.bernoulli(sign_key)
        return operate(image, operation, jnp.where(negative, -magnitude, magnitude))

    return jax.vmap(one)(keys, images)


def operate(
    image: UInt8[Array, "h w c"], operation: Int[Array, ""], magnitude: Float[Array, ""]
) -> UInt8[Array, "h w c"]:
    """Applies one operation.

    Args:
      image: with 1 or 3 channels.
      operation: its index in `OPERATIONS`; may be traced.
      magnitude: in the operation's unit, see `WIDE`.
    """
    chosen = {name: operation == place for place, name in enumerate(OPERATIONS)}
    pixels = image.astype(jnp.int32)
    # In parallel, not in sequence: fused in sequence, each pixel that a later computation reads
    # would be computed again by the earlier one.
    warped, enhanced, remapped = (
        part(pixels, chosen, magnitude) for part in (_warp, _enhance, _remap)
    )
    warps = operation < OPERATIONS.index("brightness")
    enhances = operation < OPERATIONS.index("posterize")
    return jnp.where(warps, warped, jnp.where(enhances, enhanced, remapped)).astype(jnp.uint8)


Chosen = dict[str, Bool[Array, ""]]


def _warp(image: Pixels, chosen: Chosen, magnitude: Float[Array, ""]) -> Pixels:
    """Shears about the corner, translates, or rotates about the center; fills with black."""
    height, width, _ = image.shape

    def magnitude_of(name: str) -> Array:
        return jnp.where(chosen[name], magnitude, 0.0)

    y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    angle = jnp.radians(magnitude_of("rotate"))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    from_x, from_y = x - width / 2, y - height / 2
    source_x = cos * from_x - sin * from_y + width / 2
    source_y = sin * from_x + cos * from_y + height / 2
    source_x += magnitude_of("shear_x") * y - jnp.trunc(magnitude_of("translate_x"))
    source_y += magnitude_of("shear_y") * x - jnp.trunc(magnitude_of("translate_y"))
    row, column = jnp.floor(source_y).astype(jnp.int32), jnp.floor(source_x).astype(jnp.int32)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    # Negative indices would count from the end.
    found = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
    return jnp.where(inside[..., None], found, 0)


def _enhance(image: Pixels, chosen: Chosen, magnitude: Float[Array, ""]) -> Pixels:
    """Extrapolates from a degenerate image: black, uniformly gray, grayscale, or smoothed."""
    gray = image
    if image.shape[-1] == GRAY.size:
        gray = ((image * GRAY).sum(-1, keepdims=True) + (1 << 15)) >> 16
    mean = (2 * gray.sum() + gray.size) // (2 * gray.size)
    degenerate = {
        "brightness": jnp.zeros_like(image),
        "contrast": jnp.broadcast_to(mean, image.shape),
        "color": jnp.broadcast_to(gray, image.shape),
        "sharpness": _smooth(image),
    }
    names = list(degenerate)
    away = jnp.select([chosen[name] for name in names], [degenerate[name] for name in names], image)
    blended = away + (1 + magnitude) * (image - away)
    return jnp.clip(blended, 0, LEVELS - 1).astype(jnp.int32)


def _smooth(image: Pixels) -> Pixels:
    """Averages each pixel, weighted 5, with its eight neighbors; the border is unchanged."""
    height, width, _ = image.shape
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
    nine = sum(padded[i : i + height, j : j + width] for i in range(3) for j in range(3))
    smooth = (2 * (nine + 4 * image) + 13) // 26
    return image.at[1:-1, 1:-1].set(smooth[1:-1, 1:-1])


def _remap(image: Pixels, chosen: Chosen, magnitude: Float[Array, ""]) -> Pixels:
    """Maps each level to another, which may depend on the levels in its channel."""
    dropped = 8 - jnp.where(chosen["posterize"], jnp.round(magnitude), 8).astype(jnp.int32)
    low, high = image.min((0, 1)), image.max((0, 1))
    stretched = (LEVELS - 1) * (image - low) // jnp.maximum(high - low, 1)
    remapped = {
        "posterize": (image >> dropped) << dropped,
        "solarize": jnp.where(image < magnitude, image, LEVELS - 1 - image),
        "autocontrast": jnp.where(low < high, stretched, image),
        "equalize": jax.vmap(_equalize, in_axes=-1, out_axes=-1)(image),
    }
    return jnp.select([chosen[name] for name in remapped], list(remapped.values()), image)


def _equalize(channel: Int[Array, "h w"]) -> Int[Array, "h w"]:
    """Equalizes the histogram of a channel."""
    histogram = jnp.zeros(LEVELS, jnp.int32).at[channel].add(1)
    step = (channel.size - histogram[channel.max()]) // (LEVELS - 1)
    below = jnp.cumsum(histogram) - histogram
    table = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), LEVELS - 1)
    return jnp.where(step > 0, table[channel], channel)
