"""Every shortcut equals its formula in He et al. 2015 section 3.3 and 2016 section 3, in NumPy."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from resjax.models import shortcuts
from resjax.models.shortcuts import Scaled, scale_branch
from resjax.xla.compile_options import quick_compile

jit = partial(jax.jit, compiler_options=quick_compile())

rng = np.random.default_rng(0)
X = rng.normal(size=(2, 5, 5, 3)).astype(np.float32)
SHAPES = [(3, 1), (3, 2), (7, 1), (7, 2)]  # features, strides
each_shape = pytest.mark.parametrize(("features", "strides"), SHAPES)


def branch_of(features, strides):
    side = -(-5 // strides)
    return rng.normal(size=(2, side, side, features)).astype(np.float32)


def output(shortcut, branch, variables=None, **options):
    """Returns the output of a block before its activation."""

    @jit
    def add(variables, x, branch):
        return branch + shortcut.apply(variables, x, **options)

    return add(variables or {}, X, branch)


def option_a(x, features, strides):
    """Every strides-th pixel, and zeros in the channels that x lacks."""
    y = np.zeros((*x[:, ::strides, ::strides].shape[:3], features), np.float32)
    y[..., : x.shape[-1]] = x[:, ::strides, ::strides]
    return y


def kernel_of(features):
    return rng.normal(size=(1, 1, 3, features)).astype(np.float32)


def projection(x, kernel, strides):
    return x[:, ::strides, ::strides] @ kernel[0, 0]


def norm_of(features):
    """A norm's parameters and statistics, and the norm itself in NumPy."""
    scale, bias, mean = (rng.normal(size=features).astype(np.float32) for _ in range(3))
    var = rng.uniform(0.5, 2, features).astype(np.float32)
    variables = ({"scale": scale, "bias": bias}, {"mean": mean, "var": var})
    return *variables, lambda y: (y - mean) / np.sqrt(var + 1e-5) * scale + bias


norm = partial(nn.BatchNorm, use_running_average=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@each_shape
def test_nothing_is_added_to_a_plain_branch(features, strides):
    branch = branch_of(features, strides)
    assert (output(shortcuts.NoShortcut(features, strides), branch) == branch).all()


@each_shape
def test_option_a_subsamples_and_pads_with_zeros(features, strides):
    nothing = np.zeros_like(branch_of(features, strides))
    added = output(shortcuts.Pad(features, strides), nothing)
    assert (added == option_a(X, features, strides)).all()


def test_option_a_cannot_drop_channels():
    with pytest.raises(ValueError, match="cannot drop 1 of 3 channels"):
        shortcuts.pad(X, 2, 1)


@pytest.mark.parametrize("cls", [shortcuts.Project, shortcuts.ProjectAll])
@each_shape
def test_b_and_c_project_with_norm(cls, features, strides):
    kernel = kernel_of(features)
    params, statistics, normalized = norm_of(features)
    variables = {
        "params": {"Conv_0": {"kernel": kernel}, "BatchNorm_0": params},
        "batch_stats": {"BatchNorm_0": statistics},
    }
    branch = branch_of(features, strides)
    expected = branch + normalized(projection(X, kernel, strides))
    if cls is shortcuts.Project and (features, strides) == (3, 1):
        expected = branch + X  # the shape does not change: the identity, without parameters
        assert jax.eval_shape(cls(3, 1, norm=norm).init, jax.random.key(0), X) == {}
    close(output(cls(features, strides, norm=norm), branch, variables), expected)


@each_shape
def test_resnet_d_projects_averages_of_existing_pixels(features, strides):
    kernel = kernel_of(features)
    params, statistics, normalized = norm_of(features)
    variables = {
        "params": {"Conv_0": {"kernel": kernel}, "BatchNorm_0": params},
        "batch_stats": {"BatchNorm_0": statistics},
    }
    side = -(-5 // strides)
    averages = np.empty((2, side, side, 3), np.float32)
    for i, j in np.ndindex(side, side):
        window = X[:, strides * i : strides * (i + 1), strides * j : strides * (j + 1)]
        averages[:, i, j] = window.mean((1, 2))
    expected = normalized(averages @ kernel[0, 0]) if (features, strides) != (3, 1) else X
    branch = branch_of(features, strides)
    module = shortcuts.ProjectAverage(features, strides, norm=norm)
    close(output(module, branch, variables), branch + expected)


@each_shape
def test_scaling_scales_shortcut_and_branch(features, strides):
    module = shortcuts.Scale(features, strides, factor=0.5, branch_factor=0.25)
    branch = branch_of(features, strides)
    close(output(module, branch), 0.5 * option_a(X, features, strides) + 0.25 * branch)


def test_scaling_does_not_change_the_branch_by_default():
    branch = branch_of(3, 1)
    close(output(shortcuts.Scale(3), branch), 0.5 * X + branch)


@each_shape
def test_an_exclusive_gate_weights_branch_and_shortcut_to_a_sum_of_one(features, strides):
    kernel, bias = kernel_of(features), rng.normal(size=features).astype(np.float32)
    g = sigmoid(projection(X, kernel, strides) + bias)
    variables = {"params": {"Conv_0": {"kernel": kernel, "bias": bias}}}
    branch = branch_of(features, strides)
    got = output(shortcuts.ExclusiveGate(features, strides), branch, variables)
    close(got, (1 - g) * option_a(X, features, strides) + g * branch)


@each_shape
def test_a_shortcut_gate_does_not_change_the_branch(features, strides):
    kernel, bias = kernel_of(features), rng.normal(size=features).astype(np.float32)
    g = sigmoid(projection(X, kernel, strides) + bias)
    variables = {"params": {"Conv_0": {"kernel": kernel, "bias": bias}}}
    branch = branch_of(features, strides)
    got = output(shortcuts.ShortcutGate(features, strides), branch, variables)
    close(got, (1 - g) * option_a(X, features, strides) + branch)


@pytest.mark.parametrize("cls", [shortcuts.ExclusiveGate, shortcuts.ShortcutGate])
@pytest.mark.parametrize(("options", "start"), [({}, -6.0), ({"bias": -1.5}, -1.5)])
def test_a_gate_starts_with_its_bias(cls, options, start):
    def init(key):  # of the gate alone, since Scaled is not an array
        return cls(3, **options).init(key, X, method="gate")

    params = jit(init)(jax.random.key(0))["params"]["Conv_0"]
    assert (params["bias"] == start).all()


@each_shape
def test_a_convolution_shortcut_has_no_norm(features, strides):
    kernel = kernel_of(features)
    branch = branch_of(features, strides)
    module = shortcuts.Convolve(features, strides)
    got = output(module, branch, {"params": {"Conv_0": {"kernel": kernel}}})
    close(got, branch + projection(X, kernel, strides))


@each_shape
def test_dropout_is_the_identity_without_a_key(features, strides):
    branch = branch_of(features, strides)
    got = output(shortcuts.DropShortcut(features, strides), branch)
    close(got, branch + option_a(X, features, strides))


def test_dropout_with_a_key_drops_its_rate_and_scales_the_rest():
    module, nothing = shortcuts.DropShortcut(3, rate=0.75), np.zeros_like(X)
    ratio = output(module, nothing, rngs={"dropout": jax.random.key(0)}) / X
    dropped = np.isclose(ratio, 0)
    assert (dropped | np.isclose(ratio, 4)).all()
    assert dropped.mean() == pytest.approx(0.75, abs=0.12)  # of 150 numbers


whole = st.integers(-1000, 1000)


@given(whole, whole, whole)
def test_adding_scaled_scales_the_branch_from_either_side(branch, carried, s):
    assert branch + Scaled(carried, s) == Scaled(carried, s) + branch == s * branch + carried


@given(whole, whole, whole, whole)
def test_scales_of_a_branch_multiply_in_any_order(branch, carried, s, t):
    once = branch + scale_branch(carried, s * t)
    assert branch + scale_branch(scale_branch(carried, s), t) == once
    assert branch + scale_branch(scale_branch(carried, t), s) == once
    assert branch + scale_branch(Scaled(carried, s), t) == once


@given(whole, whole)
def test_scaling_by_one_changes_nothing(branch, carried):
    assert branch + scale_branch(carried, 1) == branch + carried


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_survival_is_zero_or_the_inverse_rate_and_one_on_average(rate):
    images = 20_000
    survival = partial(shortcuts.Survival(rate).apply, {}, np.zeros((images, 1, 1, 1)))
    scale = jit(lambda key: survival(rngs={"dropout": key}))(jax.random.key(0))
    assert scale.shape == (images, 1, 1, 1)
    np.testing.assert_allclose(np.unique(scale), [0, 1 / (1 - rate)], rtol=1e-6)
    deviation = (rate / (1 - rate) / images) ** 0.5
    assert float(scale.mean()) == pytest.approx(1, abs=4 * deviation)
