"""Batch normalisation whose statistics may be those of parts of a batch; group normalisation."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from resjax.models.presets import ImpossibleNetworkError


class BatchNorm(nn.BatchNorm):
    """Flax's, over `groups` equal parts of the batch, each normalised by statistics of its own.

    Under a sharded `jit` a mean over the batch is over all devices, whatever one does; as many
    groups as devices give the statistics that each device would compute alone. The running
    statistics are those of the mean over groups.

    Attributes:
      groups: must divide the batch. Of no meaning where running averages are used.
      frozen: of a layer's path, whether it uses and keeps its running averages in training too.
    """

    groups: int = 1
    frozen: Callable[[tuple[str, ...]], bool] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        if self.frozen is not None and self.frozen(self.path):
            return super().__call__(x, use_running_average=True)
        if self.groups == 1 or self.use_running_average:
            return super().__call__(x)
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", self.scale_init, (channels,))
        bias = self.param("bias", self.bias_init, (channels,))

        grouped = x.astype(jnp.float32).reshape(self.groups, -1, *x.shape[1:])
        mean = grouped.mean((1, 2, 3))
        var = jnp.maximum((grouped**2).mean((1, 2, 3)) - mean**2, 0)
        if not self.is_initializing():
            for running, value in ((running_mean, mean), (running_var, var)):
                old = self.momentum * running.value
                running.value = old + (1 - self.momentum) * value.mean(0)
        spread = (slice(None), None, None, None)  # (groups, c) over a group's images
        normal = (grouped - mean[spread]) * (lax.rsqrt(var + self.epsilon) * scale)[spread] + bias
        return normal.reshape(x.shape).astype(self.dtype or x.dtype)


class GroupNorm(nn.GroupNorm):
    """Flax's, in 32 groups of channels (Wu & He 2018, arXiv 1803.08494)."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        if x.shape[-1] % self.num_groups:
            raise ImpossibleNetworkError(
                f"a group norm has {self.num_groups} groups and cannot divide {x.shape[-1]} "
                "channels among them; set a width that is a multiple"
            )
        return super().__call__(x)
