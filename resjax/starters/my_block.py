"""A block of my own: ReZero (Bachlechner et al. 2020, arXiv 2003.04887).

    python -m pytest test_my_block.py
    resjax train --config=quickstart --config.model.block=my_block:MyBlock --workdir=runs/my_block

The network binds `conv`, `norm`, `act` and `shortcut`, and `python -m pydoc
resjax.models.blocks.Block` lists their keywords. If the branch has other than two weight layers,
set the class attribute `layers`; if the output has more than `features` channels, `expansion`.
"""

from flax import linen as nn

from resjax.models.blocks import Block


class MyBlock(Block):
    """Two 3x3 convolutions, multiplied by a learned number that begins at `start`."""

    start: float = 0.0  # an option: --config.model.block_options.start=0.1

    @nn.compact
    def __call__(self, x):  # (n, h, w, c) to (n, h / strides, w / strides, features)
        y = self.act(self.norm()(self.conv(self.features, 3, self.strides)(x)))
        y = self.norm(last=True)(self.conv(self.features, 3)(y))
        scale = self.param("scale", nn.initializers.constant(self.start), ()).astype(y.dtype)
        return self.act(scale * y + self.shortcut(self.features, self.strides)(x))
