"""The device-resident feed: a small dataset lies on the device as uint8, batches are drawn there.

Which examples a step sees is a pure function of a key and the step, so there is no state to save:
a run that resumes at any step sees the batches that would have come.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8


class Statistics(NamedTuple):
    """Normalisation: (image / 255 - mean) / std, both broadcast over (n, h, w, c)."""

    mean: Float[np.ndarray, "..."]
    std: Float[np.ndarray, "..."]
    color_axes: Float[np.ndarray, "c c"] | None = None  # where they are asked for


def statistics(
    images: UInt8[np.ndarray, "n h w c"], kind: str, *, colors: bool = False
) -> Statistics:
    """Of the training images: "pixel_mean" as He et al. 2015 do it, or "channel" mean and std.

    With `colors` also the axes that `augmentation.pca_lighting` needs.
    """
    axes = color_axes(images) if colors else None
    scaled_mean = images.mean(0, dtype=np.float64) / 255
    if kind == "pixel_mean":
        return Statistics(scaled_mean.astype(np.float32), np.ones((), np.float32), axes)
    mean = scaled_mean.mean((0, 1))
    std = (images / np.float32(255)).std((0, 1, 2), dtype=np.float64)
    return Statistics(mean.astype(np.float32), std.astype(np.float32), axes)


def color_axes(images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "c c"]:
    """The principal axes of the colours in [0, 1], in columns, each as long as its variance.

    Krizhevsky et al. 2012 shift colours along these: eigenvectors times eigenvalues, not their
    roots, of the pixels' covariance. An axis may point either way.
    """
    channels = images.shape[-1]
    colors = images.reshape(-1, channels) / np.float32(255)
    colors -= colors.mean(0, dtype=np.float64).astype(np.float32)
    variances, axes = np.linalg.eigh((colors.T @ colors).astype(np.float64) / len(colors))
    return (axes * variances).astype(np.float32)


def scale(images: UInt8[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """From bytes to [0, 1]."""
    return images.astype(jnp.float32) / 255


def standardize(images: Float[Array, "n h w c"], statistics: Statistics) -> Float[Array, "n h w c"]:
    """From [0, 1] to what the network sees."""
    return (images - statistics.mean) / statistics.std


def normalize(images: UInt8[Array, "n h w c"], statistics: Statistics) -> Float[Array, "n h w c"]:
    return standardize(scale(images), statistics)


def batch_indices(
    key: Key[Array, ""], first_step: Int[Array, ""], steps: int, batch_size: int, examples: int
) -> Int[Array, "steps batch"]:
    """Which examples the steps from `first_step` on see.

    Examples come in an endless row of epochs, each a permutation of all, cut into batches; so every
    example comes exactly once an epoch, and a batch may span the end of one.

    Args:
      key: of the run. Epoch e is permuted by `fold_in(key, e)`.
      first_step: a traced number; `steps`, `batch_size` and `examples` are static.
    """
    first = first_step * batch_size
    epoch = first // examples
    epochs = -(-steps * batch_size // examples) + 1  # that the steps can touch
    order = jax.vmap(lambda e: jax.random.permutation(jax.random.fold_in(key, e), examples))(
        epoch + jnp.arange(epochs)
    )
    position = first - epoch * examples + jnp.arange(steps * batch_size)
    return order.reshape(-1)[position].reshape(steps, batch_size)
