"""Shortcuts: what goes around a block's branch.

A shortcut is a Flax module with the fields `features` (output channels), `strides`, `conv` and
`norm`. It takes the block's input (n, h, w, c) and returns what the block adds to its branch. A
plain network is a residual one whose shortcut carries nothing, so blocks contain no `if residual`.

Options A, B and C are those of He et al. 2015 [H15] section 3.3; the ablated shortcuts are those of
He et al. 2016 [H16] section 3, in whose formulas shortcut(x) is option A.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from resjax.models.convolution import conv as convolution
from resjax.models.presets import ImpossibleNetworkError

Images = Float[Array, "n h w c"]
Layer = Callable[[Images], Images]


@dataclass(frozen=True)
class Scaled:
    """The output of a shortcut that also scales the branch: y + Scaled(x, s) is s * y + x.

    A block can thus be gated or dropped without knowing it.
    """

    carried: Any
    branch_scale: Any

    def __radd__(self, branch: Array) -> Array:
        return self.branch_scale * branch + self.carried

    __add__ = __radd__


def scale_branch(added: Any, factor: Array) -> Scaled:
    """Returns `added`, which will now scale the branch by `factor` too."""
    if isinstance(added, Scaled):
        return Scaled(added.carried, added.branch_scale * factor)
    return Scaled(added, factor)


class Shortcut(nn.Module):
    """Declares the fields of every shortcut; the network binds `conv` and `norm`.

    Attributes:
      features: output channels.
      strides: from the block's input to what is added, in both directions.
      conv, norm: as in `resjax.models.blocks.Block`; with pre-activation, `norm` does nothing.
    """

    features: int
    strides: int = 1
    conv: Callable[..., Layer] = convolution
    norm: Callable[..., Layer] = nn.BatchNorm


class NoShortcut(Shortcut):
    """Adds nothing: a plain network."""

    def __call__(self, x: Images) -> Any:
        return 0


def pad(x: Images, features: int, strides: int) -> Images:
    """Returns option A [H15]: x subsampled by `strides`, with channels of zeros appended.

    Raises:
      ImpossibleNetworkError: x has more than `features` channels.
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
    """Option B after 2x2 average pooling, which skips no pixel: ResNet-D (He et al. 2019)."""

    @nn.compact
    def __call__(self, x: Images) -> Images:
        if self.strides == 1 and x.shape[-1] == self.features:
            return x
        if self.strides > 1:
            window = (self.strides, self.strides)
            x = nn.avg_pool(x, window, window, padding="SAME", count_include_pad=False)
        return self.norm()(self.conv(self.features, 1)(x))


class Scale(Shortcut):
    """Constant scaling [H16 section 3.1]: factor * shortcut(x) + branch_factor * branch(x)."""

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
    """(1 - g(x)) * shortcut(x) + g(x) * branch(x), as in highway networks."""

    def __call__(self, x: Images) -> Scaled:
        g = self.gate(x)
        return Scaled((1 - g) * pad(x, self.features, self.strides), g)


class ShortcutGate(Gate):
    """(1 - g(x)) * shortcut(x) + branch(x): only the shortcut is gated."""

    def __call__(self, x: Images) -> Images:
        return (1 - self.gate(x)) * pad(x, self.features, self.strides)


class Convolve(Shortcut):
    """A 1x1 convolution in each block [H16 section 3.3], without the BN of option C."""

    @nn.compact
    def __call__(self, x: Images) -> Images:
        return self.conv(self.features, 1, self.strides)(x)


class DropShortcut(Shortcut):
    """Dropout on the shortcut [H16 section 3.4], whenever `apply` gets a `dropout` key."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x: Images) -> Images:
        drop = nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))
        return drop(pad(x, self.features, self.strides))


class Survival(nn.Module):
    """Returns a branch's scale under stochastic depth (Huang et al. 2016, arXiv 1603.09382).

    For each image it is 0 with probability `rate`, else 1 / (1 - rate): its mean is 1, so no scale
    is needed in evaluation. `rate` may be a traced value.
    """

    rate: Any

    def __call__(self, x: Images) -> Float[Array, "n 1 1 1"]:
        keep = 1 - self.rate
        survives = jax.random.bernoulli(self.make_rng("dropout"), keep, (len(x), 1, 1, 1))
        return survives / keep


class LearnedScale(nn.Module):
    """Returns a branch's learned scale, one number that begins at `start`.

    A start of 0 gives ReZero (Bachlechner et al. 2020, arXiv 2003.04887) and, in a network without
    norms, SkipInit (De & Smith 2020, arXiv 2002.10444).
    """

    start: Any = 0.0

    @nn.compact
    def __call__(self, x: Images) -> Float[Array, ""]:
        scale = self.param("scale", lambda key: jnp.asarray(self.start, jnp.float32))
        return scale.astype(x.dtype)
