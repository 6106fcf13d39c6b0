"""The one convolution of all networks: He initialisation, PyTorch's padding, fast gradients on CPU.

Flax's `SAME` pads (0, 1) where a strided 3x3 convolution of the published networks pads (1, 1), so
padding is explicit here.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from resjax.models.presets import ImpossibleNetworkError

# He et al. 2015, arXiv 1502.01852, eq. 10: variance 2 / fan_in, normal and not truncated.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")

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


def conv(
    features: int,
    kernel_size: int | tuple[int, int],
    strides: int = 1,
    *,
    use_bias: bool = False,
    kernel_init: Any = he_normal,
    standardize: bool = False,
    **options: Any,
) -> nn.Conv:
    """A convolution padded by half its kernel: stride 1 keeps height and width.

    Args:
      features: channels out.
      kernel_size: side, or (height, width), in pixels.
      strides: in both directions, pixels.
      standardize: every filter to mean 0 and variance 1 (Qiao et al. 2019, arXiv 1903.10520).
      **options: of `flax.linen.Conv`, such as `feature_group_count`, `dtype` or `name`.

    Raises:
      ImpossibleNetworkError: a block's options leave it no channels.
    """
    if features < 1:
        raise ImpossibleNetworkError(f"a convolution needs 1 channel or more, not {features}")
    height, width = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    return nn.Conv(
        features,
        (height, width),
        strides,
        padding=[((side - 1) // 2, side // 2) for side in (height, width)],
        use_bias=use_bias,
        kernel_init=kernel_init,
        conv_general_dilated=_standardized if standardize else _convolution,
        **options,
    )


def _standardized(x: Array, kernel: Array, *arguments: Any, **options: Any) -> Array:
    """A convolution with standardised filters; epsilon as in BiT (arXiv 1912.11370)."""
    weights = kernel.astype(jnp.float32)
    centered = weights - weights.mean((0, 1, 2))
    filters = centered * lax.rsqrt((centered**2).mean((0, 1, 2)) + 1e-10)
    return _convolution(x, filters.astype(kernel.dtype), *arguments, **options)


def _convolution(
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


def quick_compile() -> dict[str, Any] | None:
    """Options of `jax.jit` for what runs once, such as drawing weights: less time to compile.

    On CPU the random numbers of a few dozen kernels take several seconds to compile, and a sixth of
    that unoptimised.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, **_code_generation()}


def step_compile() -> dict[str, Any] | None:
    """Options of `jax.jit` for what has these networks' convolutions and runs many times.

    On CPU LLVM's costlier passes are a sixth of the time to compile, and no faster step comes of
    them. Convolutions there are YNNPACK's unless one asks for XLA's own. Those of jax 0.10 keep to
    one thread within a loop, and a step of ResNet-20 is a fifth shorter without them on two cores,
    a tenth longer on one; from jax 0.11 on it is as long, and narrower ones are a tenth shorter.
    """
    if jax.default_backend() != "cpu":
        return None
    options = {
        "xla_backend_optimization_level": 1,
        "xla_llvm_disable_expensive_passes": True,
        **_code_generation(),
    }
    if OLD_JAX and _cores() == 1:
        return options
    # A choice of one excludes the others: sums stay with YNNPACK.
    return options | {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


OLD_JAX = jax.__version_info__ < (0, 11)


def _code_generation() -> dict[str, Any]:
    """How XLA's CPU compiler hands a program to LLVM: in as many parts as there are cores.

    With jax 0.10 every operation as such and not each fused loop by a compiler of its own: scanned
    networks then compile in four fifths of the time and run as fast. Unrolled ones of 110 layers
    take twice as long to compile, but scanned is what they are here. jax 0.12 has no such choice.
    """
    parts = {"xla_cpu_parallel_codegen_split_count": min(32, _cores())}
    return parts | ({"xla_cpu_use_fusion_emitters": False} if OLD_JAX else {})


def _cores() -> int:
    """The cores that this process may use; macOS tells those of the machine alone."""
    tells = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if tells else os.cpu_count() or 1


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
