"""Normalisation by parts of a batch is Flax's, of each part alone."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn

import resjax
from resjax.models.normalization import BatchNorm
from resjax.models.presets import ImpossibleNetworkError

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
def test_every_group_is_normalised_as_if_it_were_the_batch(groups, variables):
    grouped, changed = trained(BatchNorm(groups=groups, **OPTIONS), variables, IMAGES)
    alone = [trained(nn.BatchNorm(**OPTIONS), variables, part) for part in np.split(IMAGES, groups)]
    close(grouped, np.concatenate([normal for normal, _ in alone]))
    mean = jax.tree.map(lambda *stats: np.mean(stats, 0), *(stats for _, stats in alone))
    close(changed, mean)


def test_groups_of_other_images_differ_from_the_whole_batch(variables):
    whole, _ = trained(BatchNorm(**OPTIONS), variables, IMAGES)
    halves, _ = trained(BatchNorm(groups=2, **OPTIONS), variables, IMAGES)
    assert np.abs(whole - halves).max() > 0.1


def test_gradients_of_a_group_are_those_of_the_group_alone(variables):
    weights = np.random.default_rng(2).normal(size=IMAGES.shape)

    def slope(norm, images, weights):
        def loss(images):
            return (trained(norm, variables, images)[0] * weights).sum()

        return jax.grad(loss)(images)

    grouped = slope(BatchNorm(groups=3, **OPTIONS), IMAGES, weights)
    parts = zip(np.split(IMAGES, 3), np.split(weights, 3), strict=True)
    close(grouped, np.concatenate([slope(nn.BatchNorm(**OPTIONS), *part) for part in parts]))


def test_running_averages_know_no_groups(variables):
    found = [
        norm.clone(use_running_average=True).apply(variables, IMAGES)
        for norm in (BatchNorm(groups=4, **OPTIONS), nn.BatchNorm(**OPTIONS))
    ]
    np.testing.assert_array_equal(*found)


def test_groups_change_no_variable(variables):
    norms = [
        BatchNorm(groups=4, use_running_average=False),
        nn.BatchNorm(use_running_average=False),
    ]
    grouped, flax = (norm.init(jax.random.key(0), IMAGES) for norm in norms)
    assert jax.tree.structure(grouped) == jax.tree.structure(flax) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, grouped, flax)


def test_half_precision_is_normalised_in_single(variables):
    half = IMAGES.astype(jax.numpy.bfloat16)
    norm = BatchNorm(groups=3, dtype=jax.numpy.bfloat16, **OPTIONS)
    found, changed = trained(norm, variables, half)
    assert found.dtype == jax.numpy.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(changed)} == {np.dtype(np.float32)}
    exact, stats = trained(BatchNorm(groups=3, **OPTIONS), variables, half.astype(np.float32))
    close(changed, stats)
    np.testing.assert_array_equal(found, exact.astype(jax.numpy.bfloat16))


def test_group_norms_see_no_other_image_and_have_no_statistics():
    model = resjax.build("bit_r50x1", depth=14, width=32, classes=3, loop="unroll")
    images = np.random.default_rng(0).normal(size=(2, 33, 33, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    assert variables.keys() == {"params"}
    together = jax.jit(partial(model.apply, train=True))(variables, images)
    alone = jax.jit(partial(model.apply, train=True))(variables, images[:1])
    np.testing.assert_allclose(together[:1], alone, rtol=1e-3, atol=1e-4)


def test_a_width_that_groups_do_not_divide_is_told():
    model = resjax.build("cifar_resnet8", norm="group")
    with pytest.raises(ImpossibleNetworkError, match="32 groups and cannot divide 16 channels"):
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3)))
