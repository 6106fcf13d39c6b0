"""The head of RetinaNet: classes and boxes for the anchors of every level of a feature pyramid.

Lin et al. 2017, arXiv 1708.02002, with the details of torchvision's RetinaNet.
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from resjax.models.heads import Features
from resjax.models.normalization import GroupNorm
from resjax.models.pyramid import FeaturePyramid

Images = Float[Array, "n h w c"]

PRIOR = 0.01  # probability of an object that the classifier starts with at every anchor
DEPTH = 4  # convolutions before the last one


class RetinaNetHead(nn.Module):
    """Applies two small networks, for classes and for boxes, to every level of a pyramid.

    Attributes:
      classes: number of classes, that of no object (0) included, as in torchvision.
      anchors: at each pixel of a level.
      channels: of the pyramid and of the small networks.
      stages: how many of the network's last stages have a level.
      coarse_from: see `FeaturePyramid`.
      group_norm: whether their convolutions are followed by a group norm, as in torchvision's
        second version, or have a bias.
      conv: the network's own.
    """

    classes: int
    anchors: int
    channels: int = 256
    stages: int = 3
    coarse_from: str = "pyramid"
    group_norm: bool = False
    conv: Any = None

    @nn.compact
    def __call__(self, features: Features) -> dict[str, list[Array]]:
        """Returns logits and box deltas by level, the finest first.

        Returns:
          "class": arrays (n, h, w, anchors, classes); "box": arrays (n, h, w, anchors, 4), as
          `resjax.tasks.boxes.encode` encodes them; both in float32.
        """
        pyramid = FeaturePyramid(
            self.conv, self.channels, self.stages, self.coarse_from, name="fpn"
        )
        levels = pyramid(features)
        start = -math.log((1 - PRIOR) / PRIOR)
        options = {"conv": self.conv, "channels": self.channels, "group_norm": self.group_norm}
        classify = Tower(self.anchors * self.classes, start, **options, name="classification")
        locate = Tower(self.anchors * 4, 0.0, **options, name="regression")
        return {
            "class": [self._divided(classify(level)) for level in levels],
            "box": [self._divided(locate(level)) for level in levels],
        }

    def _divided(self, outputs: Images) -> Float[Array, "n h w anchors values"]:
        values = outputs.reshape(*outputs.shape[:3], self.anchors, -1)
        return values.astype(jnp.promote_types(values.dtype, jnp.float32))


class Tower(nn.Module):
    """Four 3x3 convolutions with ReLU, and one more to the outputs, the same for all levels.

    Attributes:
      outputs: channels of the last convolution.
      start: its first bias.
      conv, channels, group_norm: see `RetinaNetHead`.
    """

    outputs: int
    start: float
    conv: Any
    channels: int
    group_norm: bool

    def setup(self) -> None:
        small = {"kernel_init": nn.initializers.normal(0.01), "use_bias": not self.group_norm}
        self.convs = [self.conv(self.channels, 3, **small) for _ in range(DEPTH)]
        self.norms = [GroupNorm(epsilon=1e-5) for _ in range(DEPTH)] if self.group_norm else []
        self.last = self.conv(
            self.outputs,
            3,
            use_bias=True,
            kernel_init=nn.initializers.normal(0.01),
            bias_init=nn.initializers.constant(self.start),
        )

    def __call__(self, x: Images) -> Images:
        for index, conv in enumerate(self.convs):
            x = conv(x)
            if self.group_norm:
                x = self.norms[index](x)
            x = nn.relu(x)
        return self.last(x)
