"""Collections that diagnostics create around a block pass through the scan over blocks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resjax.models import layout
from resjax.models.blocks import Block
from resjax.models.conformance import close
from resjax.models.resnet import build
from resjax.xla.compile_options import quick_compile

jit = partial(jax.jit, compiler_options=quick_compile())
IMAGES = np.random.default_rng(0).normal(size=(3, 5, 5, 3)).astype(np.float32)


@jax.custom_vjp
def tap(x, probe):
    """Returns x; the gradient of `probe` is the sum of squares of the gradient of x."""
    return x


tap.defvjp(lambda x, probe: (x, None), lambda _, g: (g, jnp.sum(g.astype(jnp.float32) ** 2)))


def tapped(call, arguments, keywords, context):
    """Taps the output of every block where the collection "probes" is part of the call."""
    module = context.module
    output = call(*arguments, **keywords)
    if not isinstance(module, Block) or context.method_name != "__call__":
        return output
    if module.is_mutable_collection("probes"):
        return tap(output, module.variable("probes", "output", jnp.zeros, ()).value)
    return output


def probed(loop, **fields):
    """Norms of activation gradients by block, gradients of parameters with and without probes."""
    model = build({}, depth=8, width=4, loop=loop, **fields).clone(stages=(3, 2))
    scanned = build({}, depth=8, width=4, loop="scan", **fields).clone(stages=(3, 2))
    variables = jit(scanned.init)(jax.random.key(1), IMAGES)
    variables = variables if loop == "scan" else layout.unrolled(variables)
    apply = partial(model.apply, train=True, rngs={"dropout": jax.random.key(2)})

    def loss(params, probes):
        given = {**variables, "params": params}
        if probes is None:
            logits, _ = apply(given, IMAGES, mutable=["batch_stats"])
        else:
            with nn.intercept_methods(tapped):
                logits, _ = apply(
                    {**given, "probes": probes}, IMAGES, mutable=["batch_stats", "probes"]
                )
        return (logits**2).mean()

    with nn.intercept_methods(tapped):
        _, created = jax.eval_shape(
            partial(apply, mutable=["batch_stats", "probes"]), variables, IMAGES
        )
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), created["probes"])
    plain = jit(jax.grad(loss))(variables["params"], None)
    gradients, squares = jit(jax.grad(loss, argnums=(0, 1)))(variables["params"], zeros)
    return squares, gradients, plain


@pytest.mark.parametrize(
    "fields",
    [{}, {"stochastic_depth": 0.5, "remat": True, "block": "preact_basic"}],
    ids=["plain", "remat and stochastic depth"],
)
def test_a_tap_around_every_block_measures_the_same_gradients_in_both_layouts(fields):
    stacked, gradients, expected = probed("scan", **fields)
    close(gradients, expected, "gradients of parameters with and without the tap", 0)
    assert {name: np.shape(probe["output"]) for name, probe in stacked["stage1"].items()} == {
        "block1": (),
        "blocks": (2,),
    }
    side_by_side, gradients, expected = probed("unroll", **fields)
    close(gradients, expected, "gradients of parameters with and without the tap", 0)
    assert all((leaf > 0).all() for leaf in jax.tree.leaves(side_by_side))
    close(layout.unrolled({"probes": stacked})["probes"], side_by_side, "activation gradients")
