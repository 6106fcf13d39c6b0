"""The convolution that every network runs, in the form that XLA compiles to fast code."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

NHWC = ("NHWC", "HWIO", "NHWC")

_as_written = ContextVar("_as_written", default=False)


@contextmanager
def as_written() -> Iterator[None]:
    """What is traced within has the convolutions that the network's definition has.

    Elsewhere they may be others that compute the same, faster: whoever counts asks for these.
    """
    token = _as_written.set(True)
    try:
        yield
    finally:
        _as_written.reset(token)


def convolution(
    x: Array,
    kernel: Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] = (1, 1),
    rhs_dilation: Sequence[int] = (1, 1),
    feature_group_count: int = 1,
    **options: Any,
) -> Array:
    """`lax.conv_general_dilated` with the gradients that this platform runs fast.

    XLA's CPU compiler rewrites convolutions to its fast layout only outside loops, and JAX's own
    gradients of a convolution need that rewriting: in a `lax.scan` they take some twenty times
    longer. Where a GPU is, XLA recognises JAX's gradients and hand-written ones lose.
    """
    plain = {feature_group_count, *lhs_dilation, *rhs_dilation} == {1}
    if jax.default_backend() == "cpu" and plain and not _as_written.get():
        return _plain_gradients(x, kernel, tuple(window_strides), tuple(padding))
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        feature_group_count=feature_group_count,
        **options,
    )


Padding = tuple[tuple[int, int], ...]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _plain_gradients(
    x: Float[Array, "n h w i"],
    kernel: Float[Array, "kh kw i o"],
    strides: tuple[int, int],
    padding: Padding,
) -> Float[Array, "n h2 w2 o"]:
    """A convolution both of whose gradients are convolutions in the layout that XLA's CPU likes."""
    if kernel.shape[:2] == (1, 1) and strides != (1, 1):
        x, strides = x[:, :: strides[0], :: strides[1]], (1, 1)  # the rest is never looked at
    return _quick(x, kernel, strides, padding)


def _quick(x: Array, kernel: Array, strides: tuple[int, int], padding: Any) -> Array:
    """A convolution in the form that XLA's CPU compiler has fast code for.

    It exchanges a small image and a larger kernel, to gain from the padding, and has none for what
    it gets: 3x3 over 2x2 pixels takes some ten times longer. What is padded beforehand, and not to
    be seen through, is no smaller than the kernel.

    Few channels it takes slowly. Two columns at once are twice the channels: a third more is
    multiplied, and it takes two thirds of the time or less.
    """
    if math.prod(x.shape[1:3]) < math.prod(kernel.shape[:2]):
        zero = jnp.zeros((), x.dtype)
        x = lax.pad(x, zero, [(0, 0, 0), *((*sides, 0) for sides in padding), (0, 0, 0)])
        x, padding = lax.optimization_barrier(x), ((0, 0), (0, 0))
    width = x.shape[2] + sum(padding[1]) - kernel.shape[1] + 1
    narrow = max(kernel.shape[2:]) <= NARROW and kernel.shape[1] > 1
    if not narrow or strides != (1, 1) or width % 2:
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)
    left, right = (
        jnp.pad(kernel, ((0, 0), (before, 1 - before), (0, 0), (0, 0))) for before in (0, 1)
    )
    both = jnp.concatenate([left, right], -1)
    y = lax.conv_general_dilated(x, both, (1, 2), padding, dimension_numbers=NHWC)
    return y.reshape(*y.shape[:2], width, -1)


NARROW = 16  # channels; what the matrix products within a convolution are fast from


def _forward(x: Array, kernel: Array, strides: tuple[int, int], padding: Padding) -> Any:
    return _plain_gradients(x, kernel, strides, padding), (x, kernel)


def _backward(
    strides: tuple[int, int], padding: Padding, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    sides = kernel.shape[:2]
    # Zeros between the outputs undo the stride; further ones stand for pixels that the last window
    # did not reach.
    reached = [(dy.shape[d + 1] - 1) * strides[d] + sides[d] for d in (0, 1)]
    rest = [x.shape[d + 1] + sum(padding[d]) - reached[d] for d in (0, 1)]
    spread = [(0, rest[d], strides[d] - 1) for d in (0, 1)]
    dy = lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
    outer = [(sides[d] - 1 - padding[d][0], sides[d] - 1 - padding[d][1]) for d in (0, 1)]
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    dx = _quick(dy, flipped, (1, 1), outer)
    # Batch and channels change places: every weight sums over images as an output does over inputs.
    dkernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), padding, dimension_numbers=NHWC
    )
    return dx, dkernel.transpose(1, 2, 0, 3)


_plain_gradients.defvjp(_forward, _backward)
