"""Augmentation on the device: pure functions of a key and a batch."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

Images = Float[Array, "n h w c"]


def pad_crop(key: Key[Array, ""], images: Images, padding: int) -> Images:
    """Pads every side by zeros and crops a window of the old size anywhere, as He et al. 2015 do.

    Zeros, so normalise first: then what is padded is the mean image.

    Args:
      key: draws every image's own offset.
      images: (n, h, w, c).
      padding: pixels.
    """
    if not padding:
        return images
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)

    def crop(image: Array, offset: Array) -> Array:
        return lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(crop)(jnp.pad(images, sides), offsets)


def flip(key: Key[Array, ""], images: Images) -> Images:
    """Mirrors every image left to right with probability a half."""
    mirrored = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)
