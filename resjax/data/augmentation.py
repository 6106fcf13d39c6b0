"""Augmentation on the device: pure functions of keys and a batch.

Every image has a key of its own, so what is drawn for it does not depend on how a batch is divided
among devices.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

Images = Float[Array, "n h w c"]


def pad_crop(keys: Key[Array, "n"], images: Images, padding: int) -> Images:
    """Pads every side by zeros and crops a window of the old size anywhere, as He et al. 2015 do.

    Zeros, so normalise first: then what is padded is the mean image.

    Args:
      keys: draw every image's own offset.
      images: (n, h, w, c).
      padding: pixels.
    """
    if not padding:
        return images
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))

    def crop(key: Array, image: Array) -> Array:
        row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return lax.dynamic_slice(image, (row, column, 0), images.shape[1:])

    return jax.vmap(crop)(keys, jnp.pad(images, sides))


def flip(keys: Key[Array, "n"], images: Images) -> Images:
    """Mirrors every image left to right with probability a half."""
    mirrored = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
