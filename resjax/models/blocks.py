"""Residual blocks: basic and bottleneck [H15 figure 5], and their pre-activation forms [H16].

A block is a Flax module with the fields of `Block`. It maps images (n, h, w, c) to (n, h / strides,
w / strides, expansion * features), with sizes rounded up. The network binds `conv`, `norm`, `act`
and `shortcut`, so a block knows neither train mode nor dtype nor axis names. A plain block is the
same block with a shortcut that adds nothing.

[H15] He et al. 2015, arXiv 1512.03385; [H16] He et al. 2016, arXiv 1603.05027.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from resjax.models.presets import ImpossibleNetworkError

Images = Float[Array, "n h w c"]


class Block(nn.Module):
    """Declares the fields that the network binds, and the class attributes that it reads.

    Attributes:
      features: width of the block's stage.
      strides: of the block, in both directions.
      conv: `conv(features, kernel_size, strides=1)(x)`, `flax.linen.Conv` without a bias and padded
        so that stride 1 preserves height and width. It takes Flax's keywords: `use_bias=True`,
        `feature_group_count` (as many as channels: depthwise), `kernel_dilation`, `padding`,
        `kernel_init`, `bias_init`, `name`. The network sets `dtype`.
      norm: `norm()(x)`, BN or what model.norm sets in its place: group normalization, or for `none`
        a bias for each channel; `norm(last=True)` for the norm that ends a branch, whose scale can
        start at zero (Goyal et al. 2017, arXiv 1706.02677). It takes `use_bias`, `use_scale` and
        `name`.
      act: the nonlinearity, a function.
      shortcut: `shortcut(out_features, strides)(x)` returns what is added to the branch, an array
        or something that an array can be added to: write `y + shortcut(...)(x)`.
      expansion: output channels divided by `features`.
      layers: weight layers on the branch, which count toward the network's depth.
      preactivation: the stem leaves its norm and activation to the blocks, and the network adds
        them after the last stage.
    """

    features: int
    strides: int
    conv: Any
    norm: Any
    act: Any
    shortcut: Any

    expansion: ClassVar[int] = 1
    layers: ClassVar[int] = 2
    preactivation: ClassVar[bool] = False


ANTIALIASING = "none", "average", "blur"


def blur(x: Images) -> Images:
    """Halves height and width after a 3x3 binomial filter (Zhang 2019, arXiv 1904.11486)."""
    for axis in (1, 2):
        padded = jnp.pad(x, [(int(each == axis),) * 2 for each in range(4)], mode="reflect")
        rows = [
            lax.slice_in_dim(padded, tap, tap + x.shape[axis], 2, axis=axis) for tap in range(3)
        ]
        x = (rows[0] + 2 * rows[1] + rows[2]) / 4
    return x


def antialiased(x: Images, kind: str, strides: int) -> Images:
    """Returns the images after the low-pass filter that strides in place of the convolution before.

    Raises:
      ImpossibleNetworkError: there is no such filter, or the stride is not 1 or 2.
    """
    if kind not in ANTIALIASING or strides > 2:
        known = ", ".join(ANTIALIASING)
        raise ImpossibleNetworkError(
            f"antialias is one of {known}, with strides of 2; not {kind!r}"
        )
    if strides == 1 or kind == "none":
        return x
    if kind == "blur":
        return blur(x)
    return nn.avg_pool(x, (2, 2), (2, 2), padding="SAME", count_include_pad=False)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate on its mean over the image (Hu et al. 2018, 1709.01507)."""

    reduction: int
    conv: Any
    act: Any

    @nn.compact
    def __call__(self, x: Images) -> Images:
        channels = x.shape[-1]
        mean = x.mean((1, 2), keepdims=True)
        squeezed = self.conv(channels // self.reduction, 1, use_bias=True)(mean)
        return x * jax.nn.sigmoid(self.conv(channels, 1, use_bias=True)(self.act(squeezed)))


class BasicBlock(Block):
    """Two 3x3 convolutions [H15 figure 5, left]."""

    se_reduction: int = 0  # of squeeze-and-excitation before the addition; 0 disables it
    antialias: str = "none"  # "average" or "blur": of the activations that are strided

    @nn.compact
    def __call__(self, x: Images) -> Images:
        strides = self.strides if self.antialias == "none" else 1
        y = self.conv(self.features, 3, strides)(x)
        y = self.act(self.norm()(y))
        y = antialiased(y, self.antialias, self.strides)
        y = self.conv(self.features, 3)(y)
        y = self.norm(last=True)(y)
        if self.se_reduction:
            y = SqueezeExcite(self.se_reduction, self.conv, self.act)(y)
        return self.act(y + self.shortcut(self.features, self.strides)(x))


class BottleneckBlock(Block):
    """1x1, 3x3 and 1x1 convolutions [H15 figure 5, right]; with groups, a ResNeXt block.

    The stride is in the 3x3 ("v1.5", as in torchvision) or in the first 1x1 ("v1", as in [H15]).
    """

    groups: int = 1  # of the 3x3 convolution (Xie et al. 2017, arXiv 1611.05431)
    group_width: int = 64  # channels per group in a stage of 64 features
    stride_in_1x1: bool = False
    se_reduction: int = 0
    antialias: str = "none"

    expansion: ClassVar[int] = 4
    layers: ClassVar[int] = 3

    @nn.compact
    def __call__(self, x: Images) -> Images:
        first, second = (self.strides, 1) if self.stride_in_1x1 else (1, self.strides)
        inner = self.features * self.group_width // 64 * self.groups
        out = self.features * self.expansion
        y = self.act(self.norm()(self.conv(inner, 1, first)(x)))
        strides = second if self.antialias == "none" else 1
        y = self.conv(inner, 3, strides, feature_group_count=self.groups)(y)
        y = self.act(self.norm()(y))
        y = antialiased(y, self.antialias, second)
        y = self.norm(last=True)(self.conv(out, 1)(y))
        if self.se_reduction:
            y = SqueezeExcite(self.se_reduction, self.conv, self.act)(y)
        return self.act(y + self.shortcut(out, self.strides)(x))


class PreActBlock(Block):
    """Applies norm and activation before the weights [H16 figure 4 (e)].

    If the shape changes, and in the network's first block (`share`), the shortcut starts after the
    first activation, which it shares with the branch [H16 appendix].
    """

    share: bool = False

    preactivation: ClassVar[bool] = True

    def split(self, x: Images) -> tuple[Images, Images]:
        """Returns the input of the branch and the input of the shortcut."""
        active = self.act(self.norm()(x))
        changes = self.strides != 1 or x.shape[-1] != self.features * self.expansion
        return active, active if self.share or changes else x


class PreActBasicBlock(PreActBlock):
    """Two 3x3 convolutions, each after norm and activation [H16]."""

    @nn.compact
    def __call__(self, x: Images) -> Images:
        y, shared = self.split(x)
        y = self.conv(self.features, 3, self.strides)(y)
        y = self.conv(self.features, 3)(self.act(self.norm()(y)))
        return y + self.shortcut(self.features, self.strides)(shared)


class PreActBottleneckBlock(PreActBlock):
    """1x1, 3x3 and 1x1 convolutions, each after norm and activation [H16].

    The stride is in the first 1x1 [H16, the authors' code] or in the 3x3, as in BiT.
    """

    stride_in_1x1: bool = True

    expansion: ClassVar[int] = 4
    layers: ClassVar[int] = 3

    @nn.compact
    def __call__(self, x: Images) -> Images:
        out = self.features * self.expansion
        first, second = (self.strides, 1) if self.stride_in_1x1 else (1, self.strides)
        y, shared = self.split(x)
        y = self.conv(self.features, 1, first)(y)
        y = self.conv(self.features, 3, second)(self.act(self.norm()(y)))
        y = self.conv(out, 1)(self.act(self.norm()(y)))
        return y + self.shortcut(out, self.strides)(shared)
