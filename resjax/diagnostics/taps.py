"""Measures gradients of activations from outside a network, without a change to its modules.

A tap is the identity forward. Backward it passes the gradient g of the activation on, and returns
the sum of g squared as the gradient of a scalar, the probe, that it takes as a second argument. So
the derivative of the loss with respect to a probe is a squared norm, and no activation is stored
that would not be stored anyway.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from resjax.models.layout import path_name

PROBES = "probes"
"""The variable collection of probes."""

BLOCK = re.compile(r"stage\d+/(block\d+|blocks)")
NAME = "activation_gradient"


@jax.custom_vjp
def tap(x: Array, probe: Float[Array, ""]) -> Array:
    """Returns `x`. The gradient of `probe` is the sum of squares of the gradient of `x`."""
    return x


def _forward(x: Array, probe: Array) -> tuple[Array, None]:
    return x, None


def _backward(_: None, gradient: Array) -> tuple[Array, Array]:
    return gradient, jnp.sum(gradient.astype(jnp.float32) ** 2)


tap.defvjp(_forward, _backward)


class TappedModel:
    """A model whose blocks are tapped, and whose parameters hold the probes too.

    `apply` takes the probes as `variables["params"]["probes"]`, so whatever differentiates with
    respect to parameters measures activation gradients as well.
    """

    def __init__(self, model: nn.Module):
        self._model = model

    def apply(self, variables: Mapping[str, Any], *arguments: Any, **keywords: Any) -> Any:
        params = dict(variables["params"])
        probes = params.pop(PROBES)
        with nn.intercept_methods(_tap_blocks):
            return self._model.apply(
                {**variables, "params": params, PROBES: probes}, *arguments, **keywords
            )

    def probes(self, variables: Mapping[str, Any], image_shape: Sequence[int]) -> Any:
        """Returns the probes, which are zero, for variables that have none.

        Args:
          variables: of the model.
          image_shape: (h, w, c).
        """

        def apply(variables: Any, images: Array) -> Any:
            with nn.intercept_methods(_tap_blocks):
                return self._model.apply(variables, images, mutable=[PROBES])[1]

        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        shapes = jax.eval_shape(apply, variables, images).get(PROBES, {})
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def norms(probes: Any) -> dict[str, Float[Array, "*blocks"]]:
    """Returns the norms of activation gradients by block, from the gradients of the probes."""
    return {
        path_name(path).removesuffix(f"/{NAME}"): jnp.sqrt(squares)
        for path, squares in jax.tree.leaves_with_path(probes)
    }


def _tap_blocks(call: Any, arguments: Any, keywords: Any, context: Any) -> Any:
    """An interceptor of methods that taps the output of every block."""
    output = call(*arguments, **keywords)
    module: nn.Module = context.module
    if context.method_name != "__call__" or not BLOCK.fullmatch("/".join(module.path)):
        return output
    scope = module.scope
    if not (scope.has_variable(PROBES, NAME) or scope.is_mutable_collection(PROBES)):
        return output
    probe = scope.variable(PROBES, NAME, jnp.zeros, ())
    return tap(output, probe.value)
