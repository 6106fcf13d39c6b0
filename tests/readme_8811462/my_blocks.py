from flax import linen as nn
from resjax.models.blocks import Block


class ReZeroBlock(Block):
    """Starts as its shortcut: one learned scale opens the branch."""

    @nn.compact
    def __call__(self, x):
        y = self.act(self.norm()(self.conv(self.features, 3, self.strides)(x)))
        y = self.norm()(self.conv(self.features, 3)(y))
        scale = self.param("scale", nn.initializers.zeros, ()).astype(y.dtype)
        return self.act(scale * y + self.shortcut(self.features, self.strides)(x))
