"""The convolution layer of all networks: He initialization and PyTorch's padding.

Padding is explicit: a 3x3 convolution with stride 2 of the published networks pads (1, 1), Flax's
`SAME` pads (0, 1).
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array

from resjax.models.presets import ImpossibleNetworkError
from resjax.xla.convolution import convolution

# He et al. 2015, arXiv 1502.01852, eq. 10: variance 2 / fan_in, normal and not truncated.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def conv(
    features: int,
    kernel_size: int | tuple[int, int],
    strides: int = 1,
    *,
    padding: Any = None,
    kernel_dilation: int = 1,
    use_bias: bool = False,
    kernel_init: Any = he_normal,
    standardize: bool = False,
    **options: Any,
) -> nn.Conv:
    """Returns Flax's convolution, padded so that stride 1 preserves height and width.

    Args:
      features: output channels.
      kernel_size: side, or (height, width), in pixels.
      strides: in both directions, in pixels.
      padding: as of `flax.linen.Conv`; None pads by half of the dilated kernel.
      kernel_dilation: distance of the kernel's taps, in pixels.
      use_bias: adds a bias; published networks have a norm instead.
      kernel_init: initializer of the kernel.
      standardize: normalizes each filter to mean 0 and variance 1 (Qiao et al. 2019, arXiv
        1903.10520).
      **options: the other keywords of `flax.linen.Conv`, such as `feature_group_count` or `name`.

    Raises:
      ImpossibleNetworkError: `features` is less than 1.
    """
    if features < 1:
        raise ImpossibleNetworkError(f"a convolution needs 1 channel or more, not {features}")
    height, width = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    if (height, width) == (1, 1):
        kernel_dilation = 1  # has no effect, and keeps the convolution dense
    spans = [kernel_dilation * (side - 1) for side in (height, width)]
    return nn.Conv(
        features,
        (height, width),
        strides,
        padding=[(span // 2, span - span // 2) for span in spans] if padding is None else padding,
        kernel_dilation=kernel_dilation,
        use_bias=use_bias,
        kernel_init=kernel_init,
        conv_general_dilated=_standardized if standardize else convolution,
        **options,
    )


def _standardized(x: Array, kernel: Array, *arguments: Any, **options: Any) -> Array:
    """Convolves with standardized filters; epsilon is that of BiT (arXiv 1912.11370)."""
    weights = kernel.astype(jnp.float32)
    centered = weights - weights.mean((0, 1, 2))
    filters = centered * lax.rsqrt((centered**2).mean((0, 1, 2)) + 1e-10)
    return convolution(x, filters.astype(kernel.dtype), *arguments, **options)
