"""Normalization of images, and the statistics of the training images that it uses."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


class Statistics(NamedTuple):
    """Parameters of (image / 255 - mean) / std; both broadcast over (n, h, w, c)."""

    mean: Float[np.ndarray, "..."]
    std: Float[np.ndarray, "..."]
    color_axes: Float[np.ndarray, "c c"] | None = None  # for `augmentation.pca_lighting`


def compute_statistics(
    images: UInt8[np.ndarray, "n h w c"], kind: str, *, colors: bool = False
) -> Statistics:
    """Returns the statistics of the training images.

    Args:
      images: of the training split.
      kind: "pixel_mean" subtracts the mean of each pixel, as He et al. 2015 do; "channel"
        standardizes each channel.
      colors: whether to compute `color_axes` too.
    """
    axes = color_axes(images) if colors else None
    scaled_mean = images.mean(0, dtype=np.float64) / 255
    if kind == "pixel_mean":
        return Statistics(scaled_mean.astype(np.float32), np.ones((), np.float32), axes)
    mean = scaled_mean.mean((0, 1))
    std = (images / np.float32(255)).std((0, 1, 2), dtype=np.float64)
    return Statistics(mean.astype(np.float32), std.astype(np.float32), axes)


def color_axes(images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "c c"]:
    """Returns the principal axes of the colors in [0, 1] as columns with their variance as length.

    Krizhevsky et al. 2012 shift colors along the eigenvectors of the pixels' covariance times the
    eigenvalues, not their square roots. The sign of an axis is arbitrary.
    """
    channels = images.shape[-1]
    colors = images.reshape(-1, channels) / np.float32(255)
    colors -= colors.mean(0, dtype=np.float64).astype(np.float32)
    variances, axes = np.linalg.eigh((colors.T @ colors).astype(np.float64) / len(colors))
    return (axes * variances).astype(np.float32)


def scale(images: UInt8[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Converts bytes to floats in [0, 1]."""
    return images.astype(jnp.float32) / 255


def standardize(images: Float[Array, "n h w c"], statistics: Statistics) -> Float[Array, "n h w c"]:
    """Standardizes images in [0, 1]."""
    return (images - statistics.mean) / statistics.std


def normalize(images: UInt8[Array, "n h w c"], statistics: Statistics) -> Float[Array, "n h w c"]:
    """Converts bytes to the floats that the network sees."""
    return standardize(scale(images), statistics)
