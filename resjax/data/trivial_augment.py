"""TrivialAugment: one operation, drawn with its strength, for every image (arXiv 2103.10158).

Müller & Hutter 2021, in their "wide" space as torchvision has it: no parameter to tune. The
operations are Pillow's, held to its integer arithmetic. Under `vmap` a switch would compute all
fourteen, so they are three computations instead: every warp is one affine map, every enhancement
one blend, and every remapping of grey levels one expression.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

LEVELS = 256  # of a byte
STRENGTHS = 31  # that an operation can have
GREY = np.array([19595, 38470, 7471])  # 0.299, 0.587, 0.114 in 65536ths, as Pillow has them


class Range(NamedTuple):
    """The strengths of an operation, evenly from `weakest` to `strongest`."""

    weakest: float = 0.0
    strongest: float = 0.0
    signed: bool = False  # whether the sign is drawn too


# Warps, enhancements and remappings, in this order.
WIDE = {
    "identity": Range(),
    "shear_x": Range(0, 0.99, signed=True),
    "shear_y": Range(0, 0.99, signed=True),
    "translate_x": Range(0, 32, signed=True),  # pixels, of any size of image
    "translate_y": Range(0, 32, signed=True),
    "rotate": Range(0, 135, signed=True),  # degrees, counter-clockwise
    "brightness": Range(0, 0.99, signed=True),  # what an enhancement's factor has above 1
    "color": Range(0, 0.99, signed=True),
    "contrast": Range(0, 0.99, signed=True),
    "sharpness": Range(0, 0.99, signed=True),
    "posterize": Range(8, 2),  # bits that are kept
    "solarize": Range(255, 0),  # level from which on the image is inverted
    "autocontrast": Range(),
    "equalize": Range(),
}
OPERATIONS = tuple(WIDE)
_STRENGTHS = np.array([np.linspace(low, high, STRENGTHS) for low, high, _ in WIDE.values()])
_SIGNED = np.array([operation.signed for operation in WIDE.values()])

Pixels = Int[Array, "h w c"]  # 0 to 255


def trivial_augment(
    keys: Key[Array, "n"], images: UInt8[Array, "n h w c"]
) -> UInt8[Array, "n h w c"]:
    """Applies one operation of `WIDE` to every image; each is as likely as the others.

    Args:
      keys: draw every image's operation, strength and sign.
      images: (n, h, w, c) of 1 channel or 3, in bytes: the operations are defined on these.
    """

    def one(key: Array, image: Array) -> Array:
        operation_key, strength_key, sign_key = jax.random.split(key, 3)
        operation = jax.random.randint(operation_key, (), 0, len(WIDE))
        strength = jax.random.randint(strength_key, (), 0, STRENGTHS)
        magnitude = jnp.asarray(_STRENGTHS, jnp.float32)[operation, strength]
        negative = jnp.asarray(_SIGNED)[operation] & jax.random.bernoulli(sign_key)
        return operate(image, operation, jnp.where(negative, -magnitude, magnitude))

    return jax.vmap(one)(keys, images)


def operate(
    image: UInt8[Array, "h w c"], operation: Int[Array, ""], magnitude: Float[Array, ""]
) -> UInt8[Array, "h w c"]:
    """Applies one operation.

    Args:
      image: of 1 channel or 3.
      operation: its place in `OPERATIONS`; may be traced.
      magnitude: in the operation's unit, see `WIDE`.
    """
    chosen = {name: operation == place for place, name in enumerate(OPERATIONS)}
    pixels = image.astype(jnp.int32)
    # Beside each other, not one after the other: fused, the second would compute the first anew for
    # every pixel that it looks at.
    warped, enhanced, remapped = (
        part(pixels, chosen, magnitude) for part in (_warp, _enhance, _remap)
    )
    warps = operation < OPERATIONS.index("brightness")
    enhances = operation < OPERATIONS.index("posterize")
    return jnp.where(warps, warped, jnp.where(enhances, enhanced, remapped)).astype(jnp.uint8)


Chosen = dict[str, Bool[Array, ""]]


def _warp(image: Pixels, chosen: Chosen, magnitude: Float[Array, ""]) -> Pixels:
    """Shears about the corner, shifts, or turns about the centre; black comes in from outside."""
    height, width, _ = image.shape

    def asked(name: str) -> Array:
        return jnp.where(chosen[name], magnitude, 0.0)

    y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    angle = jnp.radians(asked("rotate"))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    from_x, from_y = x - width / 2, y - height / 2
    source_x = cos * from_x - sin * from_y + width / 2
    source_y = sin * from_x + cos * from_y + height / 2
    source_x += asked("shear_x") * y - jnp.trunc(asked("translate_x"))
    source_y += asked("shear_y") * x - jnp.trunc(asked("translate_y"))
    row, column = jnp.floor(source_y).astype(jnp.int32), jnp.floor(source_x).astype(jnp.int32)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    # Negative indices would count from the end.
    found = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
    return jnp.where(inside[..., None], found, 0)


def _enhance(image: Pixels, chosen: Chosen, magnitude: Float[Array, ""]) -> Pixels:
    """Goes away from a degenerate image: black, evenly grey, without colour, or smoothed."""
    grey = image
    if image.shape[-1] == GREY.size:
        grey = ((image * GREY).sum(-1, keepdims=True) + (1 << 15)) >> 16
    mean = (2 * grey.sum() + grey.size) // (2 * grey.size)
    degenerate = {
        "brightness": jnp.zeros_like(image),
        "contrast": jnp.broadcast_to(mean, image.shape),
        "color": jnp.broadcast_to(grey, image.shape),
        "sharpness": _smooth(image),
    }
    names = list(degenerate)
    away = jnp.select([chosen[name] for name in names], [degenerate[name] for name in names], image)
    blended = away + (1 + magnitude) * (image - away)
    return jnp.clip(blended, 0, LEVELS - 1).astype(jnp.int32)


def _smooth(image: Pixels) -> Pixels:
    """The mean of every pixel, five times, and its eight neighbours; the border stays."""
    height, width, _ = image.shape
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
    nine = sum(padded[i : i + height, j : j + width] for i in range(3) for j in range(3))
    smooth = (2 * (nine + 4 * image) + 13) // 26
    return image.at[1:-1, 1:-1].set(smooth[1:-1, 1:-1])


def _remap(image: Pixels, chosen: Chosen, magnitude: Float[Array, ""]) -> Pixels:
    """Gives every level another, by itself or by what levels its channel has."""
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
    """Spreads the levels so that each is about as frequent as the others."""
    histogram = jnp.zeros(LEVELS, jnp.int32).at[channel].add(1)
    step = (channel.size - histogram[channel.max()]) // (LEVELS - 1)
    below = jnp.cumsum(histogram) - histogram
    table = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), LEVELS - 1)
    return jnp.where(step > 0, table[channel], channel)
