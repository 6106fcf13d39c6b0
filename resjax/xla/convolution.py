"""A convolution that XLA compiles to fast code on CPU, inside loops too.

Problem: XLA's CPU compiler rewrites convolutions to its fast layout only outside loops, and JAX's
gradients of a convolution need that rewriting. Effect: inside a `lax.scan` they take about twenty
times longer (jax 0.10); the gradients below do not. On a GPU XLA recognizes JAX's own gradients,
which are faster than these, so only CPU uses them.

The convolution and its two gradients are primitives of JAX, each linear in two arrays, so they can
be differentiated in both modes and to any order, by each other.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from resjax.xla.target import platform

NHWC = ("NHWC", "HWIO", "NHWC")

_as_written = ContextVar("_as_written", default=False)


@contextmanager
def as_written() -> Iterator[None]:
    """Traces layers as the network defines them, for counting and for export."""
    token = _as_written.set(True)
    try:
        yield
    finally:
        _as_written.reset(token)


def uses_cpu_forms() -> bool:
    """Returns whether layers are traced in the forms that are fastest on CPU."""
    return platform() == "cpu" and not _as_written.get()


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
    """Returns `lax.conv_general_dilated`, with gradients that are fast on the target platform."""
    dense = {feature_group_count, *lhs_dilation, *rhs_dilation} == {1}
    if dense and uses_cpu_forms():
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], window_strides, padding)
        pads = tuple((before, after) for before, after in padding)
        geometry = Geometry(x.shape[1:3], kernel.shape[:2], tuple(window_strides), pads)
        return _output_p.bind(x, kernel, geometry=geometry, batches=0)
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


class Geometry(NamedTuple):
    """Sides are (height, width), in pixels."""

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @property
    def is_product(self) -> bool:
        """True if the kernel is 1x1 and there is no padding; a matrix product then computes it.

        XLA's CPU compiler has no fast code for a 1x1 convolution: as a matrix product it and its
        gradients take half to five sixths of the time (jax 0.10, on the layers of ResNet-50).
        """
        return self.kernel == (1, 1) and not any(map(any, self.padding))


def _output(x: Array, kernel: Array, geometry: Geometry) -> Array:
    """Returns the convolution of images (n, h, w, i) with a kernel (kh, kw, i, o)."""
    if geometry.is_product:
        return jnp.tensordot(_reached(x, geometry), kernel[0, 0], 1)
    return _fast_convolution(x, kernel, geometry.strides, geometry.padding)


def _image_gradient(dy: Array, kernel: Array, geometry: Geometry) -> Array:
    """Returns the gradient of the images from the gradient of the output, dy."""
    if geometry.is_product:
        return _undo_strides(jnp.tensordot(dy, kernel[0, 0], (-1, 1)), geometry)
    if geometry.strides != (1, 1):
        return _strided_image_gradient(dy, kernel, geometry)
    sides, padding = geometry.kernel, geometry.padding
    outer = [(sides[d] - 1 - padding[d][0], sides[d] - 1 - padding[d][1]) for d in (0, 1)]
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    return _fast_convolution(dy, flipped, (1, 1), outer)


def _kernel_gradient(x: Array, dy: Array, geometry: Geometry) -> Array:
    """Returns the gradient of the kernel from the gradient of the output, dy.

    Batch and channels change places: weights sum over images as outputs sum over input channels.
    """
    if geometry.is_product:  # of two matrices, since XLA would copy transposed images
        pixels, slopes = (y.reshape(-1, y.shape[-1]) for y in (_reached(x, geometry), dy))
        return lax.dot_general(pixels, slopes, (((0,), (0,)), ((), ())))[None, None]
    rest = _rest(dy, geometry)
    padding = [(before, after - rest[d]) for d, (before, after) in enumerate(geometry.padding)]
    images, slopes = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    dkernel = lax.conv_general_dilated(
        images, slopes, (1, 1), padding, rhs_dilation=geometry.strides, dimension_numbers=NHWC
    )
    return dkernel.transpose(1, 2, 0, 3)


def _strided_image_gradient(dy: Array, kernel: Array, geometry: Geometry) -> Array:
    """Returns the gradient of the images of a strided convolution.

    Problem: with zeros between the pixels of dy, as JAX computes it, stride 2 takes four times the
    multiplications. Effect of a convolution of stride 1 on blocks of 2x2 pixels, which are pixels
    of four times the channels: 0.3 to 0.8 of the time for 3x3 kernels, a tenth for 7x7.
    """
    (down, across), channels = geometry.strides, kernel.shape[2]
    sides = tuple(-(-geometry.kernel[d] // geometry.strides[d]) for d in (0, 1))
    ends = [sides[d] * geometry.strides[d] - geometry.kernel[d] for d in (0, 1)]
    taps = jnp.pad(kernel, ((0, ends[0]), (0, ends[1]), (0, 0), (0, 0)))
    taps = taps.reshape(sides[0], down, sides[1], across, channels, -1).swapaxes(1, 2)
    taps = taps.reshape(*sides, down * across * channels, -1)
    image = tuple(dy.shape[d + 1] - 1 + sides[d] for d in (0, 1))
    dblocks = _image_gradient(dy, taps, Geometry(image, sides, (1, 1), ((0, 0), (0, 0))))
    dx = dblocks.reshape(len(dy), *image, down, across, channels).swapaxes(2, 3)
    dx = dx.reshape(len(dy), image[0] * down, image[1] * across, channels)
    before = [pads[0] for pads in geometry.padding]
    after = [geometry.image[d] + before[d] - dx.shape[d + 1] for d in (0, 1)]
    crop = [(0, 0, 0), *((-before[d], after[d], 0) for d in (0, 1)), (0, 0, 0)]
    return lax.pad(dx, jnp.zeros((), dx.dtype), crop)


def _reached(x: Array, geometry: Geometry) -> Array:
    """Returns the pixels that a 1x1 convolution reads."""
    return x[:, :: geometry.strides[0], :: geometry.strides[1]]


def _undo_strides(dy: Array, geometry: Geometry) -> Array:
    """Returns the gradient of the output that a 1x1 convolution would have at stride 1."""
    rest = _rest(dy, geometry)
    spread = [(0, rest[d], geometry.strides[d] - 1) for d in (0, 1)]
    return lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *spread, (0, 0, 0)])


def _rest(dy: Array, geometry: Geometry) -> list[int]:
    """Returns how many rows and columns at the end of the padded images no window reaches."""
    image, sides, strides, padding = geometry
    reached = [(dy.shape[d + 1] - 1) * strides[d] + sides[d] for d in (0, 1)]
    return [image[d] + sum(padding[d]) - reached[d] for d in (0, 1)]


def _fast_convolution(x: Array, kernel: Array, strides: tuple[int, ...], padding: Any) -> Array:
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


class _Bilinear(Primitive):
    """A primitive of two arrays, linear in each, with further batches as leading axes of both.

    Args:
      name: of the primitive.
      compute: takes the arrays and their `Geometry`.
      folds: for each array, the axis of it and that of the result which hold a batch that the other
        array does not have: images become more images, and kernels more channels.
    """

    def __init__(self, name: str, compute: Callable[..., Array], *folds: tuple[int, int]):
        super().__init__(name)
        self._compute, self._folds = compute, folds
        self.def_impl(self._evaluate)
        self.def_abstract_eval(cache(self._abstract))  # else each call traces again
        mlir.register_lowering(self, mlir.lower_fun(self._evaluate, multiple_results=False))
        batching.primitive_batchers[self] = self._batch

    def _evaluate(self, *arrays: Array, geometry: Geometry, batches: int) -> Array:
        compute = partial(self._compute, geometry=geometry)
        for _ in range(batches):
            compute = jax.vmap(compute)
        return compute(*arrays)

    def _abstract(self, *arrays: Any, **options: Any) -> Any:
        return jax.make_jaxpr(partial(self._evaluate, **options))(*arrays).out_avals[0]

    def _batch(self, arrays: Any, dims: Any, *, batches: int, **options: Any) -> tuple[Array, int]:
        if None not in dims:
            moved = [jnp.moveaxis(array, dim, 0) for array, dim in zip(arrays, dims, strict=True)]
            return self.bind(*moved, batches=batches + 1, **options), 0
        which = int(dims[0] is None)
        axis, result_axis = (batches + each for each in self._folds[which])
        size = arrays[which].shape[dims[which]]
        array = jnp.moveaxis(arrays[which], dims[which], axis)
        folded = array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
        operands = (arrays[0], folded) if which else (folded, arrays[1])
        result = self.bind(*operands, batches=batches, **options)
        before, after = result.shape[:result_axis], result.shape[result_axis + 1 :]
        return result.reshape(*before, size, -1, *after), result_axis


# The sum of dy times the output is linear in dy, images and kernel. Each primitive is its gradient
# with respect to one of them, so the three are all of each other's derivatives.
_output_p = _Bilinear("fast_convolution", _output, (0, 0), (3, 3))
_image_p = _Bilinear("fast_convolution_image_gradient", _image_gradient, (0, 0), (2, 3))
_kernel_p = _Bilinear("fast_convolution_kernel_gradient", _kernel_gradient, (3, 2), (3, 3))

ad.defbilinear(
    _output_p,
    lambda dy, _, kernel, **options: _image_p.bind(dy, kernel, **options),
    lambda dy, x, _, **options: _kernel_p.bind(x, dy, **options),
)
ad.defbilinear(
    _image_p,
    lambda x, _, kernel, **options: _output_p.bind(x, kernel, **options),
    lambda x, dy, _, **options: _kernel_p.bind(x, dy, **options),
)
ad.defbilinear(
    _kernel_p,
    lambda kernel, _, dy, **options: _image_p.bind(dy, kernel, **options),
    lambda kernel, x, _, **options: _output_p.bind(x, kernel, **options),
)
