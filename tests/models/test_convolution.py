"""The convolution equals one in NumPy, and its gradients equal JAX's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

from resjax.models import convolution
from resjax.models.convolution import conv
from resjax.xla.compile_options import quick_compile
from resjax.xla.convolution import convolution as cpu_convolution

jit = partial(jax.jit, compiler_options=quick_compile())
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the fast gradients are for CPU")


def in_numpy(x, kernel, stride):
    """Cross-correlates images padded by half the kernel on every side, as PyTorch does."""
    side = len(kernel)
    half = side // 2
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    rows = (padded.shape[1] - side) // stride + 1
    columns = (padded.shape[2] - side) // stride + 1
    y = np.empty((len(x), rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = padded[:, i * stride : i * stride + side, j * stride : j * stride + side]
            y[:, i, j] = np.tensordot(window, kernel, 3)
    return y


def stock(x, kernel, stride):
    half = len(kernel) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((half, half), (half, half)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def ours(x, kernel, stride, **options):
    module = conv(kernel.shape[-1], kernel.shape[:2], stride, **options)
    return module.apply({"params": {"kernel": kernel}}, x)


def close(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_padding_is_half_the_kernel_on_every_side(side, stride, kernel_size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, side, side + 1, 3)).astype(np.float32)
    kernel = rng.normal(size=(kernel_size, kernel_size, 3, 2)).astype(np.float32)
    close(jit(ours, static_argnums=2)(x, kernel, stride), in_numpy(x, kernel, stride))


cases = {
    "height": st.integers(1, 9),
    "width": st.integers(1, 9),
    "kernel_size": st.sampled_from([1, 3, 7]),
    "stride": st.sampled_from([1, 2]),
    "channels": st.integers(1, 3),
    "features": st.integers(1, 3),
}


@on_cpu
@settings(max_examples=30, deadline=None)
@given(**cases)
def test_gradients_equal_those_of_jax(height, width, kernel_size, stride, channels, features):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, channels)).astype(np.float32)
    kernel = rng.normal(size=(kernel_size, kernel_size, channels, features)).astype(np.float32)
    shape = jax.eval_shape(lambda: stock(x, kernel, stride)).shape
    cotangent = rng.normal(size=shape).astype(np.float32)

    @jit
    def both(x, kernel):
        def vjp(function):
            y, pull = jax.vjp(partial(function, stride=stride), x, kernel)
            return (y, *pull(cotangent))

        return vjp(ours), vjp(stock)

    for got, expected in zip(*both(x, kernel), strict=True):
        close(got, expected)


def by_taps(x, kernel, strides, padding):
    """Sums the images shifted by each tap of a kernel.

    Problem: for some geometries XLA's algebraic simplifier ends the process when it compiles JAX's
    own gradient of a strided convolution (jax 0.10 and 0.12), so that one is no reference.
    """
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    ends = [x.shape[d + 1] - kernel.shape[d] + 1 for d in (0, 1)]
    return sum(
        x[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]] @ kernel[i, j]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )


PAIR = st.tuples(st.integers(0, 2), st.integers(0, 2))


@on_cpu
@settings(max_examples=20, deadline=None)
@given(
    image=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    sides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(PAIR, PAIR),
)
def test_gradients_for_any_sides_strides_and_padding(image, sides, strides, padding):
    assume(all(image[d] + sum(padding[d]) >= sides[d] for d in (0, 1)))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *image, 3)).astype(np.float32)
    kernel = rng.normal(size=(*sides, 3, 2)).astype(np.float32)

    @jit
    def both(x, kernel):
        def vjp(function):
            y, pull = jax.vjp(lambda *arrays: function(*arrays, strides, padding), x, kernel)
            return (y, *pull(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)))

        return vjp(cpu_convolution), vjp(by_taps)

    for got, expected in zip(*both(x, kernel), strict=True):
        close(got, expected)


@on_cpu
@settings(max_examples=15, deadline=None)
@given(**cases)
def test_derivatives_of_every_kind_equal_those_of_jax(
    height, width, kernel_size, stride, channels, features
):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, channels)).astype(np.float32)
    kernel = rng.normal(size=(kernel_size, kernel_size, channels, features)).astype(np.float32)
    dx, dkernel = (rng.normal(size=each.shape).astype(np.float32) for each in (x, kernel))

    def derivatives(function, tangents):
        def loss(x, kernel):
            return (function(x, kernel, stride) ** 3).mean()

        def along(x, kernel):
            return jax.jvp(loss, (x, kernel), tangents)[1]

        y, dy = jax.jvp(partial(function, stride=stride), (x, kernel), tangents)
        forward_over_reverse = jax.jvp(jax.grad(loss, (0, 1)), (x, kernel), tangents)[1]

        def slope(x, kernel):
            return sum(map(jnp.vdot, jax.grad(loss, (0, 1))(x, kernel), tangents))

        second = [jax.grad(each, (0, 1))(x, kernel) for each in (along, slope)]
        return y, dy, *forward_over_reverse, *second[0], *second[1]

    @jit
    def both(*tangents):
        return derivatives(ours, tangents), derivatives(stock, tangents)

    for got, expected in zip(*both(dx, dkernel), strict=True):
        close(got, expected, 1e-4)


BATCHED = {  # the axis of the batch in images, kernel and the tangents of both
    "images": (1, None, None, None),
    "kernels": (None, 2, None, None),
    "both": (0, 3, None, None),
    "tangents": (None, None, 0, 1),
    "everything": (0, 0, 0, 0),
}


@on_cpu
@pytest.mark.parametrize("axes", BATCHED.values(), ids=BATCHED)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_batch_of_convolutions_has_the_derivatives_of_each(axes, stride):
    rng = np.random.default_rng(0)
    shapes = 2 * ((2, 6, 5, 3), (3, 3, 3, 2))
    arrays = [
        rng.normal(size=shape if axis is None else (*shape[:axis], 4, *shape[axis:]))
        for shape, axis in zip(shapes, axes, strict=True)
    ]

    def derivatives(function, x, kernel, *tangents):
        def loss(x, kernel):
            return (function(x, kernel, stride) ** 3).mean()

        gradient, product = jax.jvp(jax.grad(loss, (0, 1)), (x, kernel), tangents)
        return *gradient, *product

    def of_the_sum(function, *arrays):
        batched = jax.vmap(partial(function, stride=stride), axes[:2])
        return jax.grad(lambda *arrays: (batched(*arrays) ** 3).mean(), (0, 1))(*arrays[:2])

    @jit
    def both(*arrays):
        found = [jax.vmap(partial(derivatives, each), axes)(*arrays) for each in (ours, stock)]
        if axes[:2] != (None, None):
            found = [
                (*batch, *of_the_sum(each, *arrays))
                for batch, each in zip(found, (ours, stock), strict=True)
            ]
        return found

    for got, expected in zip(*both(*map(np.float32, arrays)), strict=True):
        close(got, expected, 1e-4)


def uses_fast_gradients(x, kernel, **options):
    program = jax.make_jaxpr(partial(ours, stride=1, **options))(x, kernel)
    return any("fast_convolution" in equation.primitive.name for equation in program.eqns)


@on_cpu
@pytest.mark.parametrize("stride", [1, 2])
def test_a_1x1_convolution_and_its_gradients_are_matrix_products_on_cpu(stride):
    x, kernel = jnp.ones((2, 6, 6, 3)), jnp.ones((1, 1, 3, 4))
    program = jit(jax.grad(lambda *arrays: (ours(*arrays, stride) ** 2).sum(), (0, 1)))
    text = program.lower(x, kernel).as_text()
    assert text.count("stablehlo.dot_general") == 3
    assert "stablehlo.convolution" not in text


@on_cpu
def test_only_dense_convolutions_use_the_fast_gradients():
    x, kernel = jnp.zeros((1, 5, 5, 4)), jnp.zeros((3, 3, 4, 4))
    assert uses_fast_gradients(x, kernel)
    assert not uses_fast_gradients(x, kernel[:, :, :2], feature_group_count=2)
    assert not uses_fast_gradients(x, kernel, kernel_dilation=2)
    assert not uses_fast_gradients(x, kernel, input_dilation=2)


def test_a_group_reads_only_its_own_channels():
    x = np.random.default_rng(0).normal(size=(1, 5, 5, 4)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(3, 3, 2, 6)).astype(np.float32)
    y = jit(partial(ours, stride=1, feature_group_count=2))(x, kernel)
    halves = [in_numpy(x[..., :2], kernel[..., :3], 1), in_numpy(x[..., 2:], kernel[..., 3:], 1)]
    close(y, np.concatenate(halves, -1))


def test_a_dilated_kernel_is_not_treated_as_dense():
    x = np.random.default_rng(0).normal(size=(1, 7, 7, 2)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(3, 3, 2, 2)).astype(np.float32)
    spread = np.zeros((5, 5, 2, 2), np.float32)
    spread[::2, ::2] = kernel
    y = jit(partial(ours, stride=1, kernel_dilation=2))(x, kernel)
    close(y, in_numpy(x, spread, 1))  # the padding is that of a side of 5


@pytest.mark.parametrize("padding", ["SAME", "VALID", 1, ((0, 2), (1, 0))])
@pytest.mark.parametrize(("side", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_padding_may_be_given_as_in_flax(side, stride, padding):
    x = np.random.default_rng(0).normal(size=(1, 7, 6, 2)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(side, side, 2, 2)).astype(np.float32)
    theirs = nn.Conv(2, (side, side), stride, padding=padding, use_bias=False)
    expected = theirs.apply({"params": {"kernel": kernel}}, x)
    close(jit(partial(ours, stride=stride, padding=padding))(x, kernel), expected)


def test_kernels_start_with_the_variance_of_he_et_al_and_no_truncation():
    module = conv(256, 3)
    shape = jnp.zeros((1, 3, 3, 64))
    kernel = jit(module.init)(jax.random.key(0), shape)["params"]["kernel"]
    sigma = (2 / (3 * 3 * 64)) ** 0.5
    assert float(kernel.std()) == pytest.approx(sigma, rel=0.02)
    assert float(abs(kernel).max()) > 3.5 * sigma


def test_there_is_no_bias_unless_use_bias_is_set():
    x = jnp.zeros((1, 3, 3, 2))
    shapes = [
        jax.eval_shape(conv(4, 1, **options).init, jax.random.key(0), x)["params"].keys()
        for options in ({}, {"use_bias": True})
    ]
    assert shapes == [{"kernel"}, {"kernel", "bias"}]


@pytest.mark.parametrize("features", [0, -4])
def test_a_convolution_without_channels_is_refused(features):
    with pytest.raises(ValueError, match=f"1 channel or more, not {features}"):
        convolution.conv(features, 3)


@given(scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_standardized_filters_ignore_scale_and_mean(scale, shift):
    x = np.random.default_rng(0).normal(size=(1, 5, 5, 4)).astype(np.float32)
    module = conv(6, 3, standardize=True)
    variables = module.init(jax.random.key(0), x)
    changed = jax.tree.map(lambda kernel: scale * (kernel + shift), variables)
    expected = module.apply(variables, x)
    np.testing.assert_allclose(module.apply(changed, x), expected, rtol=1e-2, atol=1e-2)
