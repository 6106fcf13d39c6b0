"""Shortcuts: what goes around a block's branch.

A shortcut is a Flax module with the fields `features` (channels out), `strides`, `conv` and `norm`;
it takes the block's input (n, h, w, c) and returns what the block adds to its branch. A plain
network is a residual one whose shortcut carries nothing, so blocks know no `if residual`.

Options A, B and C are those of He et al. 2015 [H15] section 3.3; the ablated shortcuts are those of
He et al. 2016 [H16] section 3. The name `shortcut` in an ablation's formula below is option A.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from resjax.models.convolution import conv as convolution
from resjax.models.presets import ImpossibleNetworkError

Images = Float[Array, "n h w c"]


@dataclass(frozen=True)
class Scaled:
    """What a shortcut returns that also scales its branch: `branch + Scaled(x, s)` is s·branch + x.

    So a block that adds its shortcut can be gated or dropped and needs not know.
    """

    carried: Any
    branch_scale: Any

    def __radd__(self, branch: Array) -> Array:
        return self.branch_scale * branch + self.carried

    __add__ = __radd__


def scale_branch(added: Any, factor: Array) -> Scaled:
    """Scales, by `factor`, the branch that `added` will be added to."""
    if isinstance(added, Scaled):
        return Scaled(added.carried, added.branch_scale * factor)
    return Scaled(added, factor)


class Shortcut(nn.Module):
    """The fields that every shortcut has. `conv` and `norm` come bound from the network."""

    features: int
    strides: int = 1
    conv: Any = convolution
    norm: Any = nn.BatchNorm


class NoShortcut(Shortcut):
    """Nothing to add: a plain network."""

    def __call__(self, x: Images) -> Any:
        return 0


def pad(x: Images, features: int, strides: int) -> Images:
    """Option A [H15]: subsamples by `strides` and appends channels of zeros; has no parameters.

    Raises:
      ImpossibleNetworkError: `features` is less than the channels of x.
    """
    missing = features - x.shape[-1]
    if missing < 0:
        raise ImpossibleNetworkError(
            f"an identity shortcut cannot drop {-missing} of {x.shape[-1]} channels"
        )
    return jnp.pad(x[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), (0, missing)))


class Pad(Shortcut):
    """Option A [H15]: the identity, padded with zero channels where the width grows."""

    def __call__(self, x: Images) -> Images:
        return pad(x, self.features, self.strides)


class ProjectAll(Shortcut):
    """Option C [H15]: every shortcut is a 1x1 convolution with BN."""

    @nn.compact
    def __call__(self, x: Images) -> Images:
        return self.norm()(self.conv(self.features, 1, self.strides)(x))


class Project(Shortcut):
    """Option B [H15]: a projection where the shape changes, the identity elsewhere."""

    @nn.compact
    def __call__(self, x: Images) -> Images:
        if self.strides == 1 and x.shape[-1] == self.features:
            return x
        return self.norm()(self.conv(self.features, 1, self.strides)(x))


class ProjectAverage(Shortcut):
    """Option B after 2x2 averages, so that no pixel is skipped: ResNet-D (He et al. 2019)."""

    @nn.compact
    def __call__(self, x: Images) -> Images:
        if self.strides == 1 and x.shape[-1] == self.features:
            return x
        if self.strides > 1:
            window = (self.strides, self.strides)
            x = nn.avg_pool(x, window, window, padding="SAME", count_include_pad=False)
        return self.norm()(self.conv(self.features, 1)(x))


class Scale(Shortcut):
    """Constant scaling [H16 section 3.1]: factor · shortcut(x) + branch_factor · branch(x)."""

    factor: float = 0.5
    branch_factor: float = 1.0

    def __call__(self, x: Images) -> Scaled:
        return Scaled(self.factor * pad(x, self.features, self.strides), self.branch_factor)


class Gate(Shortcut):
    """g(x) = sigmoid(W x + b), W a 1x1 convolution and b starting at `bias` [H16 section 3.2]."""

    bias: float = -6.0

    @nn.compact
    def gate(self, x: Images) -> Images:
        bias_init = nn.initializers.constant(self.bias)
        gate = self.conv(self.features, 1, self.strides, use_bias=True, bias_init=bias_init)
        return jax.nn.sigmoid(gate(x))


class ExclusiveGate(Gate):
    """(1 - g(x)) · shortcut(x) + g(x) · branch(x), as in highway networks."""

    def __call__(self, x: Images) -> Scaled:
        g = self.gate(x)
        return Scaled((1 - g) * pad(x, self.features, self.strides), g)


class ShortcutGate(Gate):
    """(1 - g(x)) · shortcut(x) + branch(x): the branch is left alone."""

    def __call__(self, x: Images) -> Images:
        return (1 - self.gate(x)) * pad(x, self.features, self.strides)


class Convolve(Shortcut):
    """A 1x1 convolution in every block [H16 section 3.3], without the BN of option C."""

    @nn.compact
    def __call__(self, x: Images) -> Images:
        return self.conv(self.features, 1, self.strides)(x)


class DropShortcut(Shortcut):
    """Dropout on the shortcut [H16 section 3.4]; acts where `apply` is given a `dropout` key."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x: Images) -> Images:
        drop = nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))
        return drop(pad(x, self.features, self.strides))


class Survival(nn.Module):
    """Scale of a branch under stochastic depth (Huang et al. 2016, arXiv 1603.09382).

    0 with probability `rate` for each image of a batch, else 1 / (1 - rate), so that the mean is 1
    and evaluation needs no scale. `rate` may be a traced value.
    """

    rate: Any

    def __call__(self, batch: int) -> Float[Array, "n 1 1 1"]:
        keep = 1 - self.rate
        survives = jax.random.bernoulli(self.make_rng("dropout"), keep, (batch, 1, 1, 1))
        return survives / keep
