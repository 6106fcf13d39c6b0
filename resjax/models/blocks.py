"""Residual blocks: basic and bottleneck [H15 figure 5], in all orders of activation [H16], Fixup.

A block is a Flax module with the fields of `Block`. It maps images (n, h, w, c) to (n, h / strides,
w / strides, expansion * features), with sizes rounded up. The network binds `conv`, `norm`, `act`
and `shortcut`, so a block knows neither train mode nor dtype nor axis names. A plain block is the
same block with a shortcut that adds nothing.

[H15] He et al. 2015, arXiv 1512.03385; [H16] He et al. 2016, arXiv 1603.05027; [Z19] Zhang et al.
2019, arXiv 1901.09321.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from resjax.models.presets import ImpossibleNetworkError

Images = Float[Array, "n h w c"]
Layer = Callable[[Images], Images]


class Block(nn.Module):
    """Declares the fields that the network binds, and the class attributes that it reads.

    Attributes:
      features: width of the block's stage.
      strides: of the block, in both directions.
      conv: `conv(features, kernel_size, strides=1)(x)`: `flax.linen.Conv` in the network's dtype,
        without a bias and padded so that stride 1 preserves height and width. Keywords:
        `use_bias=True`, `feature_group_count` (as many as channels: depthwise), `kernel_dilation`,
        `padding`, `kernel_init` (by default He et al. 2015), `bias_init` and `name`; see
        `resjax.models.convolution.conv`.
      norm: `norm()(x)`: BN in train or eval mode, or what model.norm sets in its place: group
        normalization, or for `none` a bias for each channel. Keywords: `use_bias=False`,
        `use_scale=False`, `bias_init`, `epsilon` and `name`. `norm(last=True)` is the norm that
        ends a branch, whose scale can start at zero (Goyal et al. 2017, arXiv 1706.02677).
      act: `act(x)`: the nonlinearity, a function.
      shortcut: `shortcut(out_features, strides)(x)`: what is added to the branch, an array or
        something that an array can be added to, so write `y + shortcut(...)(x)`. It takes no
        keywords, and a block calls it once; its options are model.shortcut_options.
      expansion: output channels divided by `features`.
      layers: weight layers on the branch, which count toward the network's depth.
      preactivation: the stem leaves its norm and activation to the blocks, and the network adds
        them after the last stage.
      ends_in_norm: the branch ends in `norm(last=True)`, which can start it at zero.
      activate_last: the network activates the images after the last stage.
    """

    features: int
    strides: int
    conv: Callable[..., Layer]
    norm: Callable[..., Layer]
    act: Layer
    shortcut: Callable[[int, int], Callable[[Images], Any]]

    expansion: ClassVar[int] = 1
    layers: ClassVar[int] = 2
    preactivation: ClassVar[bool] = False
    ends_in_norm: ClassVar[bool] = True
    activate_last: ClassVar[bool] = False


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


def excited(block: Any, y: Images) -> Images:
    """Returns a branch after the block's squeeze-and-excitation, if it has one."""
    if not block.se_reduction:
        return y
    return SqueezeExcite(block.se_reduction, block.conv, block.act)(y)


class BasicBlock(Block):
    """Two 3x3 convolutions [H15 figure 5, left]."""

    se_reduction: int = 0  # of squeeze-and-excitation before the addition; 0 disables it
    antialias: str = "none"  # "average" or "blur": of the activations that are strided

    def weights(self, x: Images) -> Images:
        """Returns the output of the last convolution."""
        strides = self.strides if self.antialias == "none" else 1
        y = self.conv(self.features, 3, strides)(x)
        y = self.act(self.norm()(y))
        y = antialiased(y, self.antialias, self.strides)
        return self.conv(self.features, 3)(y)

    @nn.compact
    def __call__(self, x: Images) -> Images:
        y = self.weights(x)
        y = excited(self, self.norm(last=True)(y))
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

    def weights(self, x: Images) -> Images:
        """Returns the output of the last convolution."""
        first, second = (self.strides, 1) if self.stride_in_1x1 else (1, self.strides)
        inner = self.features * self.group_width // 64 * self.groups
        y = self.act(self.norm()(self.conv(inner, 1, first)(x)))
        strides = second if self.antialias == "none" else 1
        y = self.conv(inner, 3, strides, feature_group_count=self.groups)(y)
        y = self.act(self.norm()(y))
        y = antialiased(y, self.antialias, second)
        return self.conv(self.features * self.expansion, 1)(y)

    @nn.compact
    def __call__(self, x: Images) -> Images:
        y = self.weights(x)
        y = excited(self, self.norm(last=True)(y))
        return self.act(y + self.shortcut(self.features * self.expansion, self.strides)(x))


class BNAfterAddition(Block):
    """The branch ends in a convolution, and the sum is normalized [H16 figure 4 (b)]."""

    ends_in_norm: ClassVar[bool] = False

    @nn.compact
    def __call__(self, x: Images) -> Images:
        y = excited(self, self.weights(x))
        total = y + self.shortcut(self.features * self.expansion, self.strides)(x)
        return self.act(self.norm()(total))


class ReLUBeforeAddition(Block):
    """The branch ends in an activation, the sum is not activated [H16 figure 4 (c)]."""

    # A norm that starts at zero would never get a gradient through the activation.
    ends_in_norm: ClassVar[bool] = False

    @nn.compact
    def __call__(self, x: Images) -> Images:
        y = self.weights(x)
        y = excited(self, self.act(self.norm()(y)))
        return y + self.shortcut(self.features * self.expansion, self.strides)(x)


class ReLUPreActivation(Block):
    """The branch begins with an activation and ends in a norm [H16 figure 4 (d)].

    If the shape changes, the shortcut starts after the activation too. The stem ends in an
    activation already, which the first block's branch and shortcut share [H16 appendix].
    """

    activate_last: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: Images) -> Images:
        out, active = self.features * self.expansion, self.act(x)
        y = self.weights(active)
        y = excited(self, self.norm(last=True)(y))
        changes = self.strides != 1 or x.shape[-1] != out
        return y + self.shortcut(out, self.strides)(active if changes else x)


class BNAfterAdditionBasicBlock(BNAfterAddition, BasicBlock): ...


class BNAfterAdditionBottleneckBlock(BNAfterAddition, BottleneckBlock): ...


class ReLUBeforeAdditionBasicBlock(ReLUBeforeAddition, BasicBlock): ...


class ReLUBeforeAdditionBottleneckBlock(ReLUBeforeAddition, BottleneckBlock): ...


class ReLUPreActBasicBlock(ReLUPreActivation, BasicBlock): ...


class ReLUPreActBottleneckBlock(ReLUPreActivation, BottleneckBlock): ...


class PreActBlock(Block):
    """Applies norm and activation before the weights [H16 figure 4 (e)].

    If the shape changes, and in the network's first block (`share`), the shortcut starts after the
    first activation, which it shares with the branch [H16 appendix].
    """

    share: bool = False

    preactivation: ClassVar[bool] = True
    ends_in_norm: ClassVar[bool] = False

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


class FixupBlock(Block):
    """A block without normalization, which starts as its shortcut [Z19].

    `norm` is the bias before every convolution and activation: for model.norm=fixup one number, as
    in [Z19]. The last convolution starts at zero; the others have the usual initial values times
    L^(-1 / (2m - 2)), for L blocks of m layers. If the shape changes, the shortcut starts after the
    first bias (the authors' code).
    """

    network_blocks: int = 1  # L, which the network sets

    ends_in_norm: ClassVar[bool] = False

    def convolutions(self) -> Sequence[tuple[int, int, int]]:
        """Returns the features, kernel size and stride of each convolution."""
        return (self.features, 3, self.strides), (self.features, 3, 1)

    @nn.compact
    def __call__(self, x: Images) -> Images:
        *inner, last = self.convolutions()
        variance = 2 * self.network_blocks ** (-1 / len(inner))
        small = nn.initializers.variance_scaling(variance, "fan_in", "normal")
        y = biased = self.norm()(x)
        for shape in inner:
            y = self.act(self.norm()(self.conv(*shape, kernel_init=small)(y)))
            y = self.norm()(y)
        y = self.conv(*last, kernel_init=nn.initializers.zeros)(y)
        scale = self.param("scale", nn.initializers.ones, ()).astype(y.dtype)
        y = self.norm(last=True)(scale * y)
        out = self.features * self.expansion
        changes = self.strides != 1 or x.shape[-1] != out
        return self.act(y + self.shortcut(out, self.strides)(biased if changes else x))


class FixupBasicBlock(FixupBlock):
    """Two 3x3 convolutions [Z19 figure 1, right]."""


class FixupBottleneckBlock(FixupBlock):
    """1x1, 3x3 and 1x1 convolutions, with the stride in the 3x3 [Z19, the authors' code]."""

    expansion: ClassVar[int] = 4
    layers: ClassVar[int] = 3

    def convolutions(self) -> Sequence[tuple[int, int, int]]:
        out = self.features * self.expansion
        return (self.features, 1, 1), (self.features, 3, self.strides), (out, 1, 1)
