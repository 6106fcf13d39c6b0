"""Heads: modules that turn the features of a network's stages into its outputs.

A head is a Flax module that takes the dict of `ResNet.features` ({"stem": ..., "stage1": ..., ...})
and returns what the network returns. The network binds its own `conv`, `norm` and `act` to the
fields of these names that a head declares and leaves at None.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from resjax.models.convolution import he_normal

Features = dict[str, Float[Array, "n h w c"]]


class ClassificationHead(nn.Dense):
    """Averages the last stage over the image and maps the mean to one logit per class.

    Attributes:
      features: the number of classes; 0 returns the mean itself and creates no parameters.
    """

    kernel_init: Any = he_normal

    @nn.compact
    def __call__(self, features: Features) -> Float[Array, "n classes"]:
        *_, last = features.values()
        pooled = last.mean((1, 2))
        pooled = pooled.astype(jnp.promote_types(pooled.dtype, jnp.float32))
        return super().__call__(pooled) if self.features else pooled


def bind(head: nn.Module, changed: Mapping[str, Any], /, **bound: Any) -> nn.Module:
    """Returns the head of a running network.

    Fields named in `bound` are filled if they are None; fields named in `changed` are replaced.
    Names that the head has no field for are ignored.
    """
    fields = {name: value for name, value in bound.items() if getattr(head, name, ...) is None}
    fields |= {name: value for name, value in changed.items() if hasattr(head, name)}
    return head.clone(parent=head.scope, **fields) if fields else head
