"""Which examples a step sees, and normalisation against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resjax.data.resident import batch_indices, color_axes, normalize, statistics
from resjax.xla.compile_options import quick_compile

drawn = jax.jit(
    batch_indices,
    static_argnames=("steps", "batch_size", "examples"),
    compiler_options=quick_compile(),
)


def batches(first_step, steps, batch_size, examples, seed=0):
    indices = drawn(jax.random.key(seed), first_step, steps, batch_size, examples)
    assert indices.shape == (steps, batch_size)
    return np.asarray(indices)


@settings(max_examples=8, deadline=None)  # each compiles
@given(st.integers(1, 40), st.integers(1, 30))
@example(batch_size=7, examples=7)
def test_every_example_comes_exactly_once_an_epoch(batch_size, examples):
    epochs = 3
    steps = -(-epochs * examples // batch_size)
    row = batches(0, steps, batch_size, examples).ravel()[: epochs * examples]
    for epoch in row.reshape(epochs, examples):
        assert sorted(epoch) == list(range(examples))


@settings(max_examples=6, deadline=None)  # each compiles twice
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 30))
@example(steps=3, batch_size=7, examples=7)
def test_a_run_that_resumes_sees_the_batches_that_would_have_come(steps, batch_size, examples):
    whole = batches(0, 30, batch_size, examples)
    for first_step in range(30 - steps):
        part = batches(first_step, steps, batch_size, examples)
        assert (part == whole[first_step : first_step + steps]).all()


def test_epochs_and_runs_differ_in_their_order():
    first, second = batches(0, 2, 50, 50)
    other, _ = batches(0, 2, 50, 50, seed=1)
    assert (first != second).any()
    assert (first != other).any()


def test_every_order_of_examples_can_come():
    epochs = batches(0, 120, 3, 3)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6


IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 5, 3), np.uint8)


def test_pixel_mean_subtracts_every_pixels_own_mean_and_keeps_the_scale():
    found = statistics(IMAGES, "pixel_mean")
    assert found.mean.shape == (4, 5, 3)
    normalized = normalize(jnp.asarray(IMAGES), found)
    expected = IMAGES / 255 - (IMAGES / 255).mean(0)
    np.testing.assert_allclose(normalized, expected, atol=1e-6)


def test_channel_statistics_give_every_channel_mean_0_and_variance_1():
    found = statistics(IMAGES, "channel")
    assert found.mean.shape == found.std.shape == (3,)
    np.testing.assert_allclose(found.mean, (IMAGES / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found.std, (IMAGES / 255).std((0, 1, 2)), rtol=1e-6)
    normalized = np.asarray(normalize(jnp.asarray(IMAGES), found))
    np.testing.assert_allclose(normalized.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std((0, 1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["pixel_mean", "channel"])
def test_normalisation_is_float32(kind):
    found = statistics(IMAGES, kind)
    assert found.mean.dtype == found.std.dtype == np.float32
    shape = jax.eval_shape(partial(normalize, statistics=found), IMAGES)
    assert shape.dtype == jnp.float32


@pytest.mark.parametrize("channels", [1, 3])
def test_color_axes_are_the_eigenvectors_of_the_colours_covariance_times_its_eigenvalues(channels):
    colors = np.random.default_rng(1).normal(120, (40, 30, 10), (500, 3))
    colors[:, 1] += colors[:, 0] - 120
    images = colors.clip(0, 255).astype(np.uint8).reshape(5, 10, 10, 3)[..., :channels]
    covariance = np.cov(images.reshape(-1, channels) / 255, rowvar=False, ddof=0)
    covariance = covariance.reshape(channels, channels)
    axes = color_axes(images)
    lengths = np.linalg.norm(axes, axis=0)
    np.testing.assert_allclose(covariance @ axes, axes * lengths, atol=1e-7)
    np.testing.assert_allclose(lengths.sum(), np.trace(covariance), rtol=1e-5)


def test_only_who_asks_for_colours_gets_their_axes():
    assert statistics(IMAGES, "channel").color_axes is None
    np.testing.assert_array_equal(
        statistics(IMAGES, "pixel_mean", colors=True).color_axes, color_axes(IMAGES)
    )
