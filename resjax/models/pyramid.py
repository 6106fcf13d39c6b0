"""A feature pyramid on the stages of a network (Lin et al. 2017, arXiv 1612.03144).

Levels are called by their stride as in the paper: P3 has stride 8, each further level twice the
stride of the one before.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from resjax.models.heads import Features

Images = Float[Array, "n h w c"]


class FeaturePyramid(nn.Module):
    """Adds to the features of a stage the enlarged ones of the next, from the last stage up.

    Two coarser levels follow, by 3x3 convolutions of stride 2, as in RetinaNet (Lin et al. 2017,
    arXiv 1708.02002) and torchvision's `LastLevelP6P7`.

    Attributes:
      conv: the network's own.
      channels: of every level.
      stages: how many of the last stages have a level.
      coarse_from: what the first coarser level is computed from: "pyramid", the coarsest level of
        the pyramid, as in torchvision's first RetinaNet, or "backbone", the last stage, as in its
        second and in the paper.
    """

    conv: Any
    channels: int = 256
    stages: int = 3
    coarse_from: str = "pyramid"

    @nn.compact
    def __call__(self, features: Features) -> list[Images]:
        """Returns the levels from the finest to the coarsest, in float32 or the network's type."""
        *_, last = stages = [value for name, value in features.items() if name != "stem"]
        chosen = stages[-self.stages :]
        levels: list[Images] = []
        above = None
        for index, stage in reversed([*enumerate(chosen)]):
            lateral = self.conv(self.channels, 1, use_bias=True, name=f"inner{index}")(stage)
            if above is not None:
                lateral = lateral + enlarge_nearest(above, lateral.shape[1:3])
            above = lateral
            smooth = self.conv(self.channels, 3, use_bias=True, name=f"layer{index}")
            levels.insert(0, smooth(lateral))
        source = levels[-1] if self.coarse_from == "pyramid" else last
        coarse = self.conv(self.channels, 3, 2, use_bias=True, name="coarse1")(source)
        coarser = self.conv(self.channels, 3, 2, use_bias=True, name="coarse2")(nn.relu(coarse))
        return [*levels, coarse, coarser]


def enlarge_nearest(images: Images, size: tuple[int, int]) -> Images:
    """Returns images of (height, width) whose pixels are the nearest ones, as PyTorch rounds.

    Pixel i of n is pixel floor(i * m / n) of the m before.
    """
    for axis, after in zip((1, 2), size, strict=True):
        before = images.shape[axis]
        images = jnp.take(images, jnp.arange(after) * before // after, axis=axis)
    return images


def pyramid_sides(sides: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the (height, width) of all levels for those of the stages that have one."""
    coarse = sides[-1]
    for _ in range(2):
        coarse = (-(-coarse[0] // 2), -(-coarse[1] // 2))
        sides = [*sides, coarse]
    return sides
