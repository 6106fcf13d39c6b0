r"""A shortcut of my own: what is added to the branch of every block.

    python -m pytest test_my_shortcut.py
    resjax train --config=quickstart --config.model.shortcut=my_shortcut:MyShortcut \
        --config.model.shortcut_options.start=0.5 --workdir=runs/my_shortcut

The network binds `conv` and `norm`, as for a block, and `python -m pydoc
resjax.models.blocks.Block` lists their keywords.
"""

from flax import linen as nn

from resjax.models.shortcuts import Shortcut, pad


class MyShortcut(Shortcut):
    """The identity, multiplied by a learned number."""

    start: float = 1.0  # an option of the shortcut

    @nn.compact
    def __call__(self, x):  # (n, h, w, c) to (n, h / strides, w / strides, features)
        scale = self.param("scale", nn.initializers.constant(self.start), ()).astype(x.dtype)
        return scale * pad(x, self.features, self.strides)
