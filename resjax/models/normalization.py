"""Batch norm over the whole batch or equal groups of it, group norm, and biases in their place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from resjax.models.presets import ImpossibleNetworkError
from resjax.xla.linear import linear_call
from resjax.xla.target import platform


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
        scale, bias = jnp.ones(channels), jnp.zeros(channels)
        if self.use_scale:
            scale = self.param("scale", self.scale_init, (channels,))
        if self.use_bias:
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
        shift = lax.stop_gradient(_shift(grouped, running_mean.value, devices))
        normal, mean, var = _normalized(grouped, scale, bias, shift, self.epsilon, devices)
        if not self.is_initializing():
            if values == 1:
                raise ImpossibleNetworkError(
                    f"{'/'.join(self.path)}: batch norm in training needs more than one value per "
                    f"channel, and images {x.shape[:3]} have one; train on more or larger images"
                )
            if self.unbiased:
                var = var * (values / (values - 1))
            for running, value in ((running_mean, shift + mean), (running_var, var)):
                old = self.momentum * running.value
                running.value = old + (1 - self.momentum) * value.reshape(-1, channels).mean(0)
        return normal.reshape(x.shape).astype(self.dtype or x.dtype)


PIXELS = (-4, -3, -2)  # the axes of a channel's statistics
Devices = tuple[str, tuple[tuple[int, ...], ...] | None] | None


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _normalized(
    x: Float[Array, "*groups n h w c"],
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    shift: Float[Array, "*any c"],
    epsilon: float,
    devices: Devices,
) -> tuple[Float[Array, "*groups n h w c"], Array, Array]:
    """Returns normalized images in float32, and mean and variance of the shifted images.

    The mean of x**2 minus the squared mean of x cancels if the mean is many deviations from zero.
    So a value close to their mean is subtracted first; then one pass over them is enough.

    The gradients (Ioffe & Szegedy 2015, arXiv 1502.03167, section 3) need the images and two sums
    over them, so a plain network stores 5.1 bytes per output of a convolution in bfloat16 and 9.4
    in float32; with JAX's gradients of the same formula it stores 11.1 and 13.5. So they are given
    as the transpose of a tangent, and forward mode works as well.

    Args:
      x: images, in groups that are normalized separately.
      scale: multiplies the normalized images.
      bias: is added to them.
      shift: a value close to the images' mean; it only affects rounding, and is not differentiated.
      epsilon: is added to the variance.
      devices: the axis of a `pmap` and the groups of devices on it that share statistics (None for
        all); None if each device computes its own.
    """
    shifted = _single(x) - shift
    mean, square = _shared(_means(shifted, shifted**2), devices)
    var = square - mean**2
    var = jnp.where(var < 0, 0, var)  # a maximum can lose NaN
    normal = (shifted - mean) * (lax.rsqrt(var + epsilon) * scale) + bias
    return normal, mean, var


@partial(_normalized.defjvp, symbolic_zeros=True)
def _normalized_jvp(epsilon: float, devices: Devices, primals: Any, tangents: Any) -> Any:
    results = _normalized(*primals, epsilon, devices)
    (x, scale, _, shift), (_, mean, var) = primals, results
    changes = [None if isinstance(each, SymbolicZero) else each for each in tangents[:3]]
    constants = x, scale, shift, mean, lax.rsqrt(var + epsilon)
    dnormal, dmean, dvar = linear_call(
        _Tangent(devices), _Gradient(devices), constants, changes, results=3
    )
    return results, (dnormal, dmean, dvar)


@dataclass(frozen=True)
class _Tangent:
    """Returns the tangents of normalized images, mean and variance."""

    devices: Devices

    def __call__(self, constants: Any, tangents: Any) -> tuple[Array, Array, Array]:
        x, scale, shift, mean, inverse = constants
        dx, dscale, dbias = tangents
        normal = (_single(x) - shift - mean) * inverse
        dnormal, dmean, along_normal = jnp.zeros_like(normal), *(jnp.zeros_like(mean),) * 2
        if dx is not None:
            dx = _single(dx)
            dmean, along_normal = _shared(_means(dx, dx * normal), self.devices)
            dnormal = (dx - dmean - normal * along_normal) * (inverse * scale)
        if dscale is not None:
            dnormal += normal * dscale
        if dbias is not None:
            dnormal += dbias
        return dnormal, dmean, 2 * along_normal / inverse


@dataclass(frozen=True)
class _Gradient:
    """Returns the gradients of images, scale and bias: the transpose of `_Tangent`."""

    devices: Devices

    def __call__(self, constants: Any, slopes: Any) -> tuple[Array, Array, Array]:
        x, scale, shift, mean, inverse = constants
        slope, mean_slope, var_slope = slopes
        normal = (_single(x) - shift - mean) * inverse
        slope = jnp.zeros_like(normal) if slope is None else slope
        own = _means(slope, slope * normal)
        along_bias, along_scale = _shared(own, self.devices)
        dx = (slope - along_bias - normal * along_scale) * (inverse * scale)
        pixels = x.size / own[0].size  # a float, as int32 would end at 2^31
        if mean_slope is not None:
            dx += _shared((mean_slope / pixels,), self.devices)[0]
        if var_slope is not None:
            dx += normal * _shared((2 * var_slope / inverse / pixels,), self.devices)[0]
        dbias, dscale = ((pixels * each).reshape(-1, x.shape[-1]).sum(0) for each in own)
        return dx.astype(x.dtype), dscale, dbias


def _shift(x: Float[Array, "*groups n h w c"], running_mean: Array, devices: Devices) -> Array:
    """Returns a value per channel close to the images' mean, the same on all devices.

    On CPU it is the central pixel of the first image, which is close from the first step on. On
    accelerators it is the running mean. Problem: a pixel costs a collective per layer, or a kernel
    on a single GPU. Effect of the running mean: a step of ResNet-20 on four chips of TPU v5e is
    predicted to take about 95 us less, of 2.2 ms. In the first tens of steps of a new network,
    while the running mean is still far off, variances are as exact as those of Flax, which shifts
    by 0.
    """
    if platform() != "cpu":
        return running_mean
    row, column = (side // 2 for side in x.shape[-3:-1])
    pixel = x[..., :1, row : row + 1, column : column + 1, :]
    (shift,) = _shared((_single(pixel),), devices)
    return shift


def _means(*images: Array) -> list[Array]:
    """Returns the means of several arrays of one shape.

    Problem: on a GPU a sum takes two kernels, and XLA shares only the first of them among several
    sums. Effect of a single sum: the second is shared too, and ResNet-20 on an H100 has about 45
    fewer kernels per step (jax 0.10). CPU has no such problem, and the TPU's compiler makes more
    kernels of the single sum.
    """
    if platform() in ("cpu", "tpu"):
        return [each.mean(PIXELS, keepdims=True) for each in images]
    means = jnp.stack(images, -2).mean([axis - 1 for axis in PIXELS], keepdims=True)
    return [means[..., index, :] for index in range(len(images))]


def _single(images: Array) -> Array:
    """Returns images in float32, or in their own precision if that is higher."""
    return images.astype(jnp.promote_types(images.dtype, jnp.float32))


def _shared(means: Sequence[Array], devices: Devices) -> Sequence[Array]:
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
      scalar: add one number to all channels, as Fixup does (Zhang et al. 2019, arXiv 1901.09321).
      use_bias: whether to add anything.
      dtype: of the result.
      bias_init: initializer of the numbers.
      epsilon, scale_init, use_scale: of the norms, for blocks that set them; unused.
    """

    scalar: bool = False
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
        shape = () if self.scalar else x.shape[-1:]
        return x + self.param("bias", self.bias_init, shape).astype(self.dtype)
