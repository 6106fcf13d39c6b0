"""Batch norm over groups equals Flax's on each group alone."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

import resjax
from resjax.models.normalization import BatchNorm
from resjax.models.presets import ImpossibleNetworkError
from resjax.xla.compile_options import quick_compile

IMAGES = np.random.default_rng(0).normal(3, 2, (12, 2, 3, 5)).astype(np.float32)
OPTIONS = {"momentum": 0.7, "epsilon": 1e-3}


@pytest.fixture
def variables():
    random = np.random.default_rng(1)
    draw = {
        name: random.uniform(0.5, 2, 5).astype(np.float32)
        for name in ("scale", "bias", "mean", "var")
    }
    return {
        "params": {name: draw[name] for name in ("scale", "bias")},
        "batch_stats": {name: draw[name] for name in ("mean", "var")},
    }


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def trained(norm, variables, images):
    return norm.clone(use_running_average=False).apply(variables, images, mutable="batch_stats")


@pytest.mark.parametrize("groups", [1, 2, 3, 12])
def test_every_group_is_normalized_as_if_it_were_the_batch(groups, variables):
    grouped, changed = trained(BatchNorm(groups=groups, **OPTIONS), variables, IMAGES)
    alone = [trained(nn.BatchNorm(**OPTIONS), variables, part) for part in np.split(IMAGES, groups)]
    close(grouped, np.concatenate([normal for normal, _ in alone]))
    mean = jax.tree.map(lambda *stats: np.mean(stats, 0), *(stats for _, stats in alone))
    close(changed, mean)


def test_groups_of_other_images_differ_from_the_whole_batch(variables):
    whole, _ = trained(BatchNorm(**OPTIONS), variables, IMAGES)
    halves, _ = trained(BatchNorm(groups=2, **OPTIONS), variables, IMAGES)
    assert np.abs(whole - halves).max() > 0.1


def test_gradients_of_a_group_do_not_depend_on_other_groups(variables):
    weights = np.random.default_rng(2).normal(size=IMAGES.shape)

    def slope(norm, images, weights):
        def loss(images):
            return (trained(norm, variables, images)[0] * weights).sum()

        return jax.grad(loss)(images)

    grouped = slope(BatchNorm(groups=3, **OPTIONS), IMAGES, weights)
    parts = zip(np.split(IMAGES, 3), np.split(weights, 3), strict=True)
    close(grouped, np.concatenate([slope(nn.BatchNorm(**OPTIONS), *part) for part in parts]))


SHAPE = (4, 3, 2, 5)


@partial(jax.jit, static_argnums=0)
def slopes(norm, images, weights, params):
    def loss(images, params):
        statistics = {"mean": jax.numpy.zeros(SHAPE[-1]), "var": jax.numpy.ones(SHAPE[-1])}
        found, _ = trained(norm, {"params": params, "batch_stats": statistics}, images)
        return (found * weights).sum()

    return jax.grad(loss, (0, 1))(images, params)


@given(seed=st.integers(0, 2**16), shift=st.floats(-5, 5), spread=st.floats(0.1, 10))
def test_gradients_are_those_of_jax(seed, shift, spread):
    random = np.random.default_rng(seed)
    images = random.normal(shift, spread, SHAPE).astype(np.float32)
    weights = random.normal(size=SHAPE).astype(np.float32)
    params = dict(zip(("scale", "bias"), random.normal(1, 0.3, (2, 5)), strict=True))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-2 * max(1, 1 / spread)),
        slopes(BatchNorm(**OPTIONS), images, weights, params),
        slopes(nn.BatchNorm(use_fast_variance=False, **OPTIONS), images, weights, params),
    )


def stored_bytes(network, images):
    """Returns the bytes that training stores for the backward pass, without constants."""
    init = jax.jit(network.init, compiler_options=quick_compile())
    variables = init(jax.random.key(0), images)

    def logits(params):
        changed = {"params": params, "batch_stats": variables["batch_stats"]}
        return network.apply(changed, images, train=True, mutable=["batch_stats"])[0]

    _, pullback = jax.vjp(logits, variables["params"])
    stored = {id(leaf): leaf for leaf in jax.tree.leaves(pullback)}.values()
    return sum(leaf.nbytes for leaf in stored if leaf.any())


def test_the_backward_pass_stores_only_the_input_of_a_norm():
    network = resjax.build("cifar_plain8", width=4, dtype="bfloat16", loop="unroll")
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    # Convolutions and norms store their inputs, in two bytes per element; the nonlinearity stores
    # where its input is positive, in one.
    elements = 4 * (3 * 32 * 32 * 4 + 2 * 16 * 16 * 8 + 2 * 8 * 8 * 16)
    weights = 4 * resjax.count(network, images.shape[1:]).parameters
    assert 4 * elements < stored_bytes(network, images) < 5.3 * elements + weights


def test_running_averages_do_not_depend_on_groups(variables):
    found = [
        norm.clone(use_running_average=True).apply(variables, IMAGES)
        for norm in (BatchNorm(groups=4, **OPTIONS), nn.BatchNorm(**OPTIONS))
    ]
    np.testing.assert_array_equal(*found)


def test_groups_do_not_change_the_variables(variables):
    norms = [
        BatchNorm(groups=4, use_running_average=False),
        nn.BatchNorm(use_running_average=False),
    ]
    grouped, flax = (norm.init(jax.random.key(0), IMAGES) for norm in norms)
    assert jax.tree.structure(grouped) == jax.tree.structure(flax) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, grouped, flax)


def test_half_precision_is_normalized_in_single_precision(variables):
    half = IMAGES.astype(jax.numpy.bfloat16)
    norm = BatchNorm(groups=3, dtype=jax.numpy.bfloat16, **OPTIONS)
    found, changed = trained(norm, variables, half)
    assert found.dtype == jax.numpy.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(changed)} == {np.dtype(np.float32)}
    exact, stats = trained(BatchNorm(groups=3, **OPTIONS), variables, half.astype(np.float32))
    close(changed, stats)
    np.testing.assert_array_equal(found, exact.astype(jax.numpy.bfloat16))


def test_group_norms_do_not_depend_on_other_images_and_have_no_statistics():
    model = resjax.build("bit_r50x1", depth=14, width=32, classes=3, loop="unroll")
    images = np.random.default_rng(0).normal(size=(2, 33, 33, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    assert variables.keys() == {"params"}
    together = jax.jit(partial(model.apply, train=True))(variables, images)
    alone = jax.jit(partial(model.apply, train=True))(variables, images[:1])
    np.testing.assert_allclose(together[:1], alone, rtol=1e-3, atol=1e-4)


def test_a_width_that_groups_do_not_divide_is_an_error_that_names_it():
    model = resjax.build("cifar_resnet8", norm="group")
    with pytest.raises(ImpossibleNetworkError, match="cannot divide 16 channels into 32 groups"):
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3)))
