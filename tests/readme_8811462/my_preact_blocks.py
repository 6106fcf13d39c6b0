from flax import linen as nn
from resjax.models.blocks import Block


class OneConvBlock(Block):
    """Norm and activation before the one convolution of the branch."""

    layers = 1
    preactivation = True

    @nn.compact
    def __call__(self, x):
        y = self.act(self.norm()(x))
        y = self.conv(self.features, 3, self.strides)(y)
        return y + self.shortcut(self.features, self.strides)(x)
