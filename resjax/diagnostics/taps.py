"""Measures gradients of activations from outside a network, without a change to its modules.

A tap is the identity forward. Backward it passes the gradient g of the activation on, and returns
the sum of g squared as the gradient of a scalar, the probe, that it takes as a second argument. So
the derivative of the loss with respect to a probe is a squared norm, and no activation is stored
that would not be stored anyway.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from resjax.diagnostics.forward import BLOCK, FORWARD, Addition, Recorder
from resjax.models.layout import path_name

PROBES = "probes"
"""The variable collection of probes."""

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
    """A model whose blocks are tapped, and whose forward pass is recorded on request.

    `apply` takes the probes as `variables["params"]["probes"]`, so whatever differentiates with
    respect to parameters measures activation gradients as well. It adds recorded values to
    `variables["batch_stats"]["forward"]`, so whatever passes running statistics on, from one part
    of a batch to the next, sums up the forward passes as well.
    """

    def __init__(self, model: nn.Module, forward: bool = False):
        """`forward` records the forward pass."""
        self._model, self._forward = model, forward

    def apply(self, variables: Mapping[str, Any], *arguments: Any, **keywords: Any) -> Any:
        """Applies the model, with the collection `batch_stats` mutable."""
        params, batch_stats = dict(variables["params"]), dict(variables["batch_stats"])
        probes, sums = params.pop(PROBES), batch_stats.pop(FORWARD)
        own = {**variables, "params": params, "batch_stats": batch_stats, PROBES: probes}
        mutable = [*keywords.pop("mutable"), FORWARD]
        output, updated, recorded = self._apply(own, *arguments, mutable=mutable, **keywords)
        sums = {path: value + recorded[path] for path, value in sums.items()}
        return output, {**updated, "batch_stats": {**updated.get("batch_stats", {}), FORWARD: sums}}

    def zeros(self, variables: Mapping[str, Any], image_shape: Sequence[int]) -> tuple[Any, Any]:
        """Returns the probes and the sums of recorded values, which are zero.

        Args:
          variables: of the model, without either.
          image_shape: (h, w, c).
        """

        def apply(variables: Any, images: Array) -> Any:
            _, probed, recorded = self._apply(variables, images, mutable=[PROBES, FORWARD])
            return probed.get(PROBES, {}), recorded

        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        shapes = jax.eval_shape(apply, variables, images)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def _apply(self, *arguments: Any, **keywords: Any) -> tuple[Any, Any, dict[str, Array]]:
        """Returns the outputs, the updated collections, and the recorded values by path."""
        if not self._forward:
            with nn.intercept_methods(_tap_blocks):
                return *self._model.apply(*arguments, **keywords), {}
        try:
            return self._record(Recorder(), *arguments, **keywords)
        except (TypeError, AttributeError) as error:
            if Addition.__name__ not in str(error):
                raise
            # A user's block does more with its shortcut than add it.
            return self._record(Recorder(additions=False), *arguments, **keywords)

    def _record(
        self, recorder: Recorder, *arguments: Any, **keywords: Any
    ) -> tuple[Any, Any, dict[str, Array]]:
        with recorder.recording(), nn.intercept_methods(_tap_blocks):
            output, updated = self._model.apply(*arguments, **keywords)
        return output, updated, recorder.by_path(updated.pop(FORWARD, {}))


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
