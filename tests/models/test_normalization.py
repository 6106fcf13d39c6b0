"""Batch norm over groups equals Flax's on each group alone, and is as exact as PyTorch's."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

import resjax
from resjax.models.normalization import BatchNorm, Bias, GroupNorm
from resjax.models.presets import ImpossibleNetworkError
from resjax.xla.compile_options import quick_compile, step_compile
from resjax.xla.target import Target, compiling_for

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


@pytest.mark.parametrize("lacking", ["scale", "bias"])
def test_training_without_a_scale_or_a_bias_is_that_of_flax(lacking, variables):
    options = {f"use_{lacking}": False, **OPTIONS}
    del variables["params"][lacking]
    found, expected = (
        trained(norm(**options), variables, IMAGES) for norm in (BatchNorm, nn.BatchNorm)
    )
    close(found, expected)


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


# By type and mean in standard deviations, the largest errors of PyTorch 2.14's batch norm on CPU:
# of the outputs, and of the input gradient. Images and slopes are those of `drawn_images`.
PYTORCH_ERRORS = {
    ("float32", 0): (2.6e-7, 3.6e-7),
    ("float32", 1): (2.7e-7, 3.6e-7),
    ("float32", 10): (7.6e-7, 3.6e-7),
    ("float32", 100): (7.1e-6, 3.6e-7),
    ("float32", 1e3): (3.8e-5, 3.9e-6),
    ("float32", 3e3): (1.3e-4, 8.3e-6),
    ("float32", 1e4): (7.4e-4, 6.9e-5),
    ("bfloat16", 0): (1.7e-2, 1.8e-2),
    ("bfloat16", 10): (4.1e-2, 2.2e-2),
    ("bfloat16", 100): (5.5e-2, 1.5e-2),
    ("bfloat16", 1e3): (4.3e-2, 2.2e-2),
}


def drawn_images(dtype, mean):
    random = np.random.default_rng(0)
    images = (random.normal(size=(16, 8, 8, 8)) + mean).astype(np.float32)
    slopes = random.normal(size=images.shape).astype(np.float32)
    return images.astype(jax.numpy.dtype(dtype)), slopes.astype(jax.numpy.dtype(dtype))


def exact_norm(images, slopes, epsilon=1e-5):
    """Normalized images and the input gradient in float64, over all but the last axis."""
    images, slopes = (
        array.astype(np.float64).reshape(-1, array.shape[-1]) for array in (images, slopes)
    )
    centered = images - images.mean(0)
    inverse = 1 / np.sqrt((centered**2).mean(0) + epsilon)
    normal = centered * inverse
    gradient = (slopes - slopes.mean(0) - normal * (slopes * normal).mean(0)) * inverse
    return normal, gradient


def norm_with_gradient(images, slopes, running_mean=0, **options):
    norm = BatchNorm(use_running_average=False, dtype=images.dtype, **options)
    variables = norm.init(jax.random.key(0), images)
    variables["batch_stats"]["mean"] += running_mean

    def normalize(images):
        return norm.apply(variables, images, mutable="batch_stats")[0]

    normal, pullback = jax.vjp(normalize, images)
    return normal, pullback(slopes)[0]


def on_four_devices(images, slopes):
    parts = (array.reshape(4, -1, *array.shape[1:]) for array in (images, slopes))
    return jax.vmap(partial(norm_with_gradient, axis_name="batch"), axis_name="batch")(*parts)


def rematerialized_in_a_scan(images, slopes):
    def body(_, pair):
        return None, jax.checkpoint(norm_with_gradient)(*pair)

    _, found = jax.lax.scan(body, None, (images[None], slopes[None]))
    return found


def computed_as_on(platform, images, slopes, **options):
    with compiling_for(Target([SimpleNamespace(platform=platform)], memory=None)):
        return norm_with_gradient(images, slopes, **options)


compiled_as_a_step = jax.jit(norm_with_gradient, compiler_options=step_compile())
BY_DEFAULT = (norm_with_gradient, on_four_devices, rematerialized_in_a_scan)


@pytest.mark.parametrize("function", [compiled_as_a_step, *BY_DEFAULT])
def test_errors_are_within_ten_times_those_of_pytorch(function, default_compile):
    if function in BY_DEFAULT:
        function = jax.jit(function, compiler_options=default_compile)
    for (dtype, mean), limits in PYTORCH_ERRORS.items():
        images, slopes = drawn_images(dtype, mean)
        found = errors(function(images, slopes), images, slopes)
        for error, limit in zip(found, limits, strict=True):
            assert error <= 10 * limit, f"{dtype} at a mean of {mean}"


def errors(found, images, slopes):
    """The largest absolute errors of the outputs and of the input gradient."""
    pairs = zip(found, exact_norm(images, slopes), strict=True)
    return [
        np.abs(np.asarray(array, np.float64).reshape(exact.shape) - exact).max()
        for array, exact in pairs
    ]


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_on_accelerators_errors_are_as_small_once_the_running_mean_is_near(platform):
    for (dtype, mean), limits in PYTORCH_ERRORS.items():
        images, slopes = drawn_images(dtype, mean)
        found = computed_as_on(platform, images, slopes, running_mean=mean + 0.5)
        for error, limit in zip(errors(found, images, slopes), limits, strict=True):
            assert error <= 10 * limit, f"{dtype} at a mean of {mean}"


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_on_accelerators_errors_of_a_new_network_are_those_of_flax(platform):
    def flax(images):
        norm = nn.BatchNorm(use_running_average=False, epsilon=1e-5)
        return norm.init_with_output(jax.random.key(0), images)[0]

    for mean in (0, 1, 10, 100):
        images, slopes = drawn_images("float32", mean)
        limits = errors((flax(images), jax.vjp(flax, images)[1](slopes)[0]), images, slopes)
        found = errors(computed_as_on(platform, images, slopes), images, slopes)
        assert np.less(found, 2 * np.array(limits) + 1e-6).all(), f"at a mean of {mean}"


def test_on_a_gpu_each_pass_is_one_sum():
    traced = jax.make_jaxpr(partial(computed_as_on, "gpu"))(*drawn_images("float32", 1))
    sums = re.findall(r"reduce_sum\[\s*axes=\(([\d, ]*)\)", str(traced))
    assert sums.count("0, 1, 2") == 2


@pytest.mark.parametrize(("platform", "expected"), [("cpu", 3), ("gpu", 2), ("tpu", 2)])
def test_the_shift_takes_a_collective_on_cpu_alone(platform, expected):
    norm = partial(computed_as_on, platform, axis_name="batch")
    traced = jax.make_jaxpr(norm, axis_env=[("batch", 4)])(*drawn_images("float32", 1))
    assert str(traced).count("= psum") == expected


def test_a_constant_channel_is_normalized_to_zero_and_its_gradient_is_exact():
    _, slopes = drawn_images("float32", 0)
    images = np.full_like(slopes, 1234.567)
    normal, gradient = compiled_as_a_step(images, slopes)
    np.testing.assert_allclose(normal, 0, atol=1e-3)
    np.testing.assert_allclose(gradient.reshape(-1, 8), exact_norm(images, slopes)[1], rtol=1e-3)


def test_group_norms_do_not_cancel_either(default_compile):
    images, _ = drawn_images("float32", 1e3)
    normalize = jax.jit(GroupNorm(num_groups=1).init_with_output, compiler_options=default_compile)
    found, _ = normalize(jax.random.key(0), images)
    for image, normal in zip(images, found, strict=True):
        exact, _ = exact_norm(image.reshape(-1, 1), image.reshape(-1, 1), epsilon=1e-6)
        np.testing.assert_allclose(normal.reshape(-1, 1), exact, atol=5e-4)


@pytest.mark.parametrize(("unbiased", "factor"), [(False, 1), (True, 72 / 71)])
def test_the_running_variance_is_that_of_flax_or_of_pytorch(unbiased, factor, variables):
    norm = BatchNorm(unbiased=unbiased, use_running_average=False, **OPTIONS)
    _, changed = norm.apply(variables, IMAGES, mutable="batch_stats")
    var = 0.7 * variables["batch_stats"]["var"] + 0.3 * factor * IMAGES.var((0, 1, 2))
    np.testing.assert_allclose(changed["batch_stats"]["var"], var, rtol=1e-5)


def test_the_unbiased_variance_is_that_of_all_devices_together(variables):
    norm = BatchNorm(unbiased=True, use_running_average=False)
    _, whole = norm.apply(variables, IMAGES, mutable="batch_stats")
    shared = norm.clone(axis_name="batch")
    parts = IMAGES.reshape(4, 3, *IMAGES.shape[1:])
    _, found = jax.vmap(
        lambda part: shared.apply(variables, part, mutable="batch_stats"), axis_name="batch"
    )(parts)
    close(jax.tree.map(lambda leaf: leaf[0], found), whole)


@pytest.mark.parametrize("options", [{}, {"groups": 3}])
def test_one_value_per_channel_in_training_is_an_error(options):
    images = np.zeros((options.get("groups", 1), 1, 1, 4), np.float32)
    model = resjax.build("cifar_resnet8", width=4, norm_options=options)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    with pytest.raises(ImpossibleNetworkError, match=r"BatchNorm_0: .* more than one value"):
        jax.eval_shape(partial(model.apply, train=True, mutable="batch_stats"), variables, images)
    two = np.zeros((2 * len(images), *images.shape[1:]), np.float32)
    jax.eval_shape(partial(model.apply, train=True, mutable="batch_stats"), variables, two)


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
    jit = partial(jax.jit, compiler_options=quick_compile())
    variables = jit(model.init)(jax.random.key(0), images)
    assert variables.keys() == {"params"}
    apply = jit(partial(model.apply, train=True))
    together, alone = apply(variables, images), apply(variables, images[:1])
    np.testing.assert_allclose(together[:1], alone, rtol=1e-3, atol=1e-4)


def test_a_width_that_groups_do_not_divide_is_an_error_that_names_it():
    model = resjax.build("cifar_resnet8", norm="group")
    with pytest.raises(ImpossibleNetworkError, match="cannot divide 16 channels into 32 groups"):
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3)))


def test_without_norms_a_network_is_convolutions_and_a_bias_per_channel():
    """Then logits scale with images while all biases are zero, and no image affects another."""
    model = resjax.build({}, depth=8, width=4, norm="none", shortcut="project")
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    jit = partial(jax.jit, compiler_options=quick_compile())
    variables = jit(model.init)(jax.random.key(0), images)
    assert variables.keys() == {"params"}
    close(variables["params"]["stage2"]["block1"]["Bias_1"], {"bias": np.zeros(8)})
    apply = jit(partial(model.apply, train=True))
    logits = apply(variables, images)
    close(apply(variables, 4 * images), 4 * logits)
    close(apply(variables, images[[0, 0]])[0], logits[0])
    variables["params"]["stem"]["Bias_0"]["bias"] += np.arange(4)
    assert (apply(variables, 4 * images) != 4 * logits).any()


def test_a_bias_is_added_per_channel_in_the_type_of_the_network():
    bias = {"params": {"bias": np.asarray([1.0, 2.0], np.float32)}}
    images = np.zeros((1, 1, 1, 2), jax.numpy.bfloat16)
    added = Bias(dtype=jax.numpy.bfloat16).apply(bias, images)
    assert added.dtype == jax.numpy.bfloat16
    np.testing.assert_array_equal(added[0, 0, 0].astype(np.float32), [1, 2])
    assert Bias(use_bias=False).apply({}, images) is images
