"""Batch norm over the whole batch or equal groups of it, group norm, and biases in their place."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from resjax.models.presets import ImpossibleNetworkError


class BatchNorm(nn.BatchNorm):
    """Flax's batch norm over `groups` equal parts of the batch, each with its own statistics.

    Under a sharded `jit` a mean over the batch is always over all devices; as many groups as
    devices give the statistics that each device would compute alone. The running statistics follow
    the mean over groups.

    Attributes:
      groups: must divide the batch; unused with running averages.
      unbiased: whether the running variance follows the unbiased variance of the batch, as in
        PyTorch, or the biased one that normalizes the batch, as in Flax. They differ by a factor of
        n / (n - 1) for n values.
      frozen: maps a layer's path to whether it uses its running averages, unchanged, in training.
    """

    groups: int = 1
    unbiased: bool = False
    frozen: Callable[[tuple[str, ...]], bool] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        if self.use_running_average:
            return super().__call__(x)
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", self.scale_init, (channels,))
        bias = self.param("bias", self.bias_init, (channels,))
        if self.frozen is not None and self.frozen(self.path):
            factor = lax.rsqrt(running_var.value + self.epsilon) * scale
            normal = (_single(x) - running_mean.value) * factor + bias
            return normal.astype(self.dtype or x.dtype)
        grouped = x if self.groups == 1 else x.reshape(self.groups, -1, *x.shape[1:])
        devices, values = None, x.size // channels // self.groups
        if self.axis_name and not self.is_initializing():  # weights are drawn outside pmap
            together = self.axis_index_groups
            devices = self.axis_name, together and tuple(map(tuple, together))
            values *= len(together[0]) if together else lax.axis_size(self.axis_name)
        normal, mean, var = _normalized(grouped, scale, bias, self.epsilon, devices)
        if not self.is_initializing():
            if values == 1:
                raise ImpossibleNetworkError(
                    f"{'/'.join(self.path)}: batch norm in training needs more than one value per "
                    f"channel, and images {x.shape[:3]} have one; train on more or larger images"
                )
            if self.unbiased:
                var = var * (values / (values - 1))
            for running, value in ((running_mean, mean), (running_var, var)):
                old = self.momentum * running.value
                running.value = old + (1 - self.momentum) * value.reshape(-1, channels).mean(0)
        return normal.reshape(x.shape).astype(self.dtype or x.dtype)


PIXELS = (-4, -3, -2)  # the axes of a channel's statistics
Devices = tuple[str, tuple[tuple[int, ...], ...] | None] | None


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalized(
    x: Float[Array, "*groups n h w c"],
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    epsilon: float,
    devices: Devices,
) -> tuple[Float[Array, "*groups n h w c"], Array, Array]:
    """Returns the normalized images in float32 and the batch mean and variance over n, h, w.

    The mean of x**2 minus the squared mean of x cancels if the mean is many deviations from zero.
    So a value from within the data, the central pixel of the first image, is subtracted first; then
    one pass over the images is enough.

    The gradients (Ioffe & Szegedy 2015, arXiv 1502.03167, section 3) need the images and two sums
    over them, so a plain network stores 5.1 bytes per output of a convolution in bfloat16 and 9.4
    in float32; with JAX's gradients of the same formula it stores 11.1 and 13.5. Mean and variance
    have no gradients.

    Args:
      x: images, in groups that are normalized separately.
      scale: multiplies the normalized images.
      bias: is added to them.
      epsilon: is added to the variance.
      devices: the axis of a `pmap` and the groups of devices on it that share statistics (None for
        all); None if each device computes its own.
    """
    return _forward(x, scale, bias, epsilon, devices)[0]


def _forward(x: Array, scale: Array, bias: Array, epsilon: float, devices: Devices) -> Any:
    row, column = (side // 2 for side in x.shape[-3:-1])
    pixel = x[..., :1, row : row + 1, column : column + 1, :]
    (shift,) = _shared((_single(pixel),), devices)
    shifted = _single(x) - shift
    mean, square = _shared((_mean(shifted), _mean(shifted**2)), devices)
    var = square - mean**2
    var = jnp.where(var < 0, 0, var)  # a maximum can lose NaN
    inverse = lax.rsqrt(var + epsilon)
    normal = (shifted - mean) * (inverse * scale) + bias
    return (normal, shift + mean, var), (x, scale, shift, mean, inverse)


def _backward(epsilon: float, devices: Devices, saved: Any, slopes: Any) -> Any:
    x, scale, shift, mean, inverse = saved
    slope, *_ = slopes
    normal = (_single(x) - shift - mean) * inverse
    own = _mean(slope), _mean(slope * normal)
    along_bias, along_scale = _shared(own, devices)
    dx = (slope - along_bias - normal * along_scale) * (inverse * scale)
    pixels = x.size / own[0].size  # a float, as int32 would end at 2^31
    dbias, dscale = ((pixels * each).reshape(-1, x.shape[-1]).sum(0) for each in own)
    return dx.astype(x.dtype), dscale, dbias


_normalized.defvjp(_forward, _backward)


def _mean(images: Array) -> Array:
    return images.mean(PIXELS, keepdims=True)


def _single(images: Array) -> Array:
    """Returns images in float32, or in their own precision if that is higher."""
    return images.astype(jnp.promote_types(images.dtype, jnp.float32))


def _shared(means: tuple[Array, ...], devices: Devices) -> tuple[Array, ...]:
    return lax.pmean(means, devices[0], axis_index_groups=devices[1]) if devices else means


class GroupNorm(nn.GroupNorm):
    """Flax's group norm, with 32 groups of channels (Wu & He 2018, arXiv 1803.08494)."""

    use_fast_variance: bool = False  # which cancels

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        if x.shape[-1] % self.num_groups:
            raise ImpossibleNetworkError(
                f"a group norm cannot divide {x.shape[-1]} channels into {self.num_groups} groups; "
                "set a width that is a multiple"
            )
        return super().__call__(x)


class Bias(nn.Module):
    """Adds a learned number to each channel; it takes the place of a norm in networks without one.

    Attributes:
      use_bias: whether to add anything.
      dtype: of the result.
      bias_init: initializer of the numbers.
      epsilon, scale_init, use_scale: of the norms, for blocks that set them; unused.
    """

    use_bias: bool = True
    dtype: Any = jnp.float32
    bias_init: Any = nn.initializers.zeros
    epsilon: float = 0.0
    scale_init: Any = None
    use_scale: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        if not self.use_bias:
            return x
        return x + self.param("bias", self.bias_init, x.shape[-1:]).astype(self.dtype)
