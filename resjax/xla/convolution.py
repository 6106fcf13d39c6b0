"""A convolution that XLA compiles to fast code on CPU, inside loops too.

Problem: XLA's CPU compiler rewrites convolutions to its fast layout only outside loops, and JAX's
gradients of a convolution need that rewriting. Effect: inside a `lax.scan` they take about twenty
times longer (jax 0.10); the gradients below do not. On a GPU XLA recognizes JAX's own gradients,
which are faster than these, so only CPU uses them.
"""

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
    """Traces convolutions as the network defines them, for counting and for export."""
    token = _as_written.set(True)
    try:
        yield
    finally:
        _as_written.reset(token)


def convolution(
    x: Array,
    kernel: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] = (1, 1),
    rhs_dilation: Sequence[int] = (1, 1),
    feature_group_count: int = 1,
    **options: Any,
) -> Array:
    """Returns `lax.conv_general_dilated`, with gradients that are fast on this platform."""
    dense = {feature_group_count, *lhs_dilation, *rhs_dilation} == {1}
    if jax.default_backend() == "cpu" and dense and not _as_written.get():
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], window_strides, padding)
        return _with_fast_gradients(x, kernel, tuple(window_strides), tuple(padding))
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
def _with_fast_gradients(
    x: Float[Array, "n h w i"],
    kernel: Float[Array, "kh kw i o"],
    strides: tuple[int, int],
    padding: Padding,
) -> Float[Array, "n h2 w2 o"]:
    """Convolves with gradients that are convolutions in the layout that is fast on CPU."""
    if kernel.shape[:2] == (1, 1) and strides != (1, 1) and not any(map(any, padding)):
        x, strides = x[:, :: strides[0], :: strides[1]], (1, 1)  # other pixels have no effect
    return _fast_convolution(x, kernel, strides, padding)


def _fast_convolution(x: Array, kernel: Array, strides: tuple[int, int], padding: Any) -> Array:
    """Convolves in a form that XLA's CPU compiler has fast code for.

    Problem: if the image is smaller than the kernel, XLA exchanges the two and has no fast code for
    the result; a 3x3 kernel on 2x2 pixels takes about ten times longer. Padding the image first,
    behind a barrier, makes it no smaller than the kernel.

    Problem: few channels are slow. Computing two columns at once doubles the output channels: a
    third more multiplications take two thirds of the time or less.
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


NARROW = 16  # channels; with more, the matrix products of a convolution are fast


def _forward(x: Array, kernel: Array, strides: tuple[int, int], padding: Padding) -> Any:
    return _with_fast_gradients(x, kernel, strides, padding), (x, kernel)


def _backward(
    strides: tuple[int, int], padding: Padding, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    sides = kernel.shape[:2]
    # Zeros between the outputs undo the stride; zeros after them stand for pixels that no window
    # reached.
    reached = [(dy.shape[d + 1] - 1) * strides[d] + sides[d] for d in (0, 1)]
    rest = [x.shape[d + 1] + sum(padding[d]) - reached[d] for d in (0, 1)]
    spread = [(0, rest[d], strides[d] - 1) for d in (0, 1)]
    dy = lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
    outer = [(sides[d] - 1 - padding[d][0], sides[d] - 1 - padding[d][1]) for d in (0, 1)]
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    dx = _fast_convolution(dy, flipped, (1, 1), outer)
    # Batch and channels change places: weights sum over images as outputs sum over input channels.
    dkernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), padding, dimension_numbers=NHWC
    )
    return dx, dkernel.transpose(1, 2, 0, 3)


_with_fast_gradients.defvjp(_forward, _backward)
