"""A block as a user may write it: it does not derive from ours."""

from typing import Any

from flax import linen as nn


class Gated(nn.Module):
    """A basic block whose branch is scaled by one learned gate."""

    features: int
    strides: int
    conv: Any
    norm: Any
    act: Any
    shortcut: Any

    @nn.compact
    def __call__(self, x):
        y = self.act(self.norm()(self.conv(self.features, 3, self.strides)(x)))
        y = self.norm()(self.conv(self.features, 3)(y))
        gate = self.param("gate", nn.initializers.constant(0.5), ())
        return self.act(gate * y + self.shortcut(self.features, self.strides)(x))
