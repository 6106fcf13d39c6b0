"""Normalization and colors against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resjax.data.normalization import color_axes, compute_statistics, normalize

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 5, 3), np.uint8)


def test_pixel_mean_subtracts_the_mean_of_each_pixel_and_keeps_the_scale():
    found = compute_statistics(IMAGES, "pixel_mean")
    assert found.mean.shape == (4, 5, 3)
    normalized = normalize(jnp.asarray(IMAGES), found)
    expected = IMAGES / 255 - (IMAGES / 255).mean(0)
    np.testing.assert_allclose(normalized, expected, atol=1e-6)


def test_channel_statistics_standardize_each_channel():
    found = compute_statistics(IMAGES, "channel")
    assert found.mean.shape == found.std.shape == (3,)
    np.testing.assert_allclose(found.mean, (IMAGES / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found.std, (IMAGES / 255).std((0, 1, 2)), rtol=1e-6)
    normalized = np.asarray(normalize(jnp.asarray(IMAGES), found))
    np.testing.assert_allclose(normalized.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std((0, 1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["pixel_mean", "channel"])
def test_normalization_is_float32(kind):
    found = compute_statistics(IMAGES, kind)
    assert found.mean.dtype == found.std.dtype == np.float32
    shape = jax.eval_shape(partial(normalize, statistics=found), IMAGES)
    assert shape.dtype == jnp.float32


@pytest.mark.parametrize("channels", [1, 3])
def test_color_axes_are_eigenvectors_of_the_covariance_times_eigenvalues(channels):
    colors = np.random.default_rng(1).normal(120, (40, 30, 10), (500, 3))
    colors[:, 1] += colors[:, 0] - 120
    images = colors.clip(0, 255).astype(np.uint8).reshape(5, 10, 10, 3)[..., :channels]
    covariance = np.cov(images.reshape(-1, channels) / 255, rowvar=False, ddof=0)
    covariance = covariance.reshape(channels, channels)
    axes = color_axes(images)
    lengths = np.linalg.norm(axes, axis=0)
    np.testing.assert_allclose(covariance @ axes, axes * lengths, atol=1e-7)
    np.testing.assert_allclose(lengths.sum(), np.trace(covariance), rtol=1e-5)


def test_color_axes_are_computed_only_on_request():
    assert compute_statistics(IMAGES, "channel").color_axes is None
    np.testing.assert_array_equal(
        compute_statistics(IMAGES, "pixel_mean", colors=True).color_axes, color_axes(IMAGES)
    )
