"""The two layouts are one network: the same draws, the same training, conversion without loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from resjax.models import layout
from resjax.models.blocks import BasicBlock, Block
from resjax.models.conformance import close
from resjax.models.resnet import build
from resjax.models.shortcuts import DropShortcut
from resjax.xla.compile_options import quick_compile

jit = partial(jax.jit, compiler_options=quick_compile())
IMAGES = np.zeros((1, 8, 8, 3), np.float32)


def equal(these, those):
    """Returns whether names, dtypes and bits are equal."""
    assert jax.tree.structure(these) == jax.tree.structure(those)
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all()),
        these,
        those,
    )
    return all(jax.tree.leaves(same))


def network(loop, stages, block="basic", shortcut="project"):
    depth = {"basic": 8, "preact_bottleneck": 11}[block]
    model = build({}, depth=depth, width=4, block=block, shortcut=shortcut, loop=loop)
    return model.clone(stages=stages)


# Twelve blocks, since block10 must not precede block2; one, since then there is nothing to stack.
DEPTHS = pytest.mark.parametrize("stages", [(12, 2, 1), (1, 1, 1)])
BLOCKS = pytest.mark.parametrize("block", ["basic", "preact_bottleneck"])


@DEPTHS
@BLOCKS
def test_unrolling_undoes_stacking(draw, stages, block):
    variables = draw(network("unroll", stages, block), IMAGES)
    assert equal(layout.unrolled(layout.scanned(variables)), variables)


@DEPTHS
@BLOCKS
def test_stacking_undoes_unrolling(draw, stages, block):
    variables = draw(network("scan", stages, block), IMAGES)
    assert equal(layout.scanned(layout.unrolled(variables)), variables)


@DEPTHS
@BLOCKS
def test_each_layout_fits_its_network(draw, stages, block):
    def shapes(variables):
        return jax.tree.map(np.shape, variables)

    scanned = draw(network("scan", stages, block), IMAGES)
    unrolled = draw(network("unroll", stages, block), IMAGES)
    assert shapes(layout.scanned(unrolled)) == shapes(scanned)
    assert shapes(layout.unrolled(scanned)) == shapes(unrolled)


def test_blocks_are_stacked_in_their_order(draw):
    stage = draw(network("unroll", (12, 1, 1)), IMAGES)["params"]
    stacked = layout.scanned({"params": stage})["params"]["stage1"]["blocks"]
    for index, kernel in enumerate(stacked["Conv_0"]["kernel"]):
        assert (kernel == stage["stage1"][f"block{index + 2}"]["Conv_0"]["kernel"]).all()


def test_variables_that_are_converted_already_do_not_change(draw):
    scanned, unrolled = (draw(network(loop, (2, 2, 1)), IMAGES) for loop in ("scan", "unroll"))
    assert equal(layout.scanned(scanned), scanned)
    assert equal(layout.unrolled(unrolled), unrolled)


def test_converting_does_not_modify_its_argument(draw):
    variables = draw(network("scan", (2, 2, 1)), IMAGES)
    before = jax.tree.map(np.copy, variables)
    layout.unrolled(variables)
    assert equal(variables, before)


class NoisyBlock(Block):
    """A user's block that draws everything: a parameter, and dropout in the branch."""

    @nn.compact
    def __call__(self, x):
        shift = self.param("shift", nn.initializers.normal(), ())
        y = self.norm()(self.conv(self.features, 3, self.strides)(x)) + shift
        y = nn.Dropout(0.3, deterministic=not self.has_rng("dropout"))(y)
        y = nn.Dropout(0.3, deterministic=not self.has_rng("dropout"))(y)
        return self.act(y + self.shortcut(self.features, self.strides)(x))


@pytest.mark.parametrize("block", [BasicBlock, NoisyBlock])
def test_the_same_key_draws_the_same_parameters_in_both_layouts(block):
    scan, unroll = (
        network(loop, (3, 1, 2)).clone(block=block, width=1) for loop in ("scan", "unroll")
    )
    key = jax.random.key(1)
    expected = layout.unrolled(jit(scan.init)(key, IMAGES))
    assert equal(jit(unroll.init)(key, IMAGES), expected)


def train(loop, steps=10, **fields):
    """Losses of ten steps of SGD, and the parameters after them in the unrolled layout."""
    model = network(loop, (4, 3)).clone(**fields)
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    optimizer = optax.sgd(0.05, momentum=0.9)

    def step(carry, key):
        variables, opt_state = carry

        def loss(params):
            given = {**variables, "params": params}
            rngs = {"dropout": key}
            logits, changed = model.apply(
                given, images, train=True, rngs=rngs, mutable=["batch_stats"]
            )
            labels = jnp.arange(16) % 10
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), changed

        (value, changed), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(gradients, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, **changed}, opt_state), value

    variables = jit(model.init)(jax.random.key(1), images)
    keys = jax.random.split(jax.random.key(2), steps)
    start = variables, optimizer.init(variables["params"])
    (variables, _), losses = jit(partial(jax.lax.scan, step))(start, keys)
    return losses, variables if loop == "unroll" else layout.unrolled(variables)


@pytest.mark.parametrize(
    "fields",
    [
        {"stochastic_depth": 0.5},
        {"stochastic_depth": 0.5, "remat": True, "block": NoisyBlock},
        {"shortcut": DropShortcut},
    ],
    ids=["stochastic depth", "a user's dropout with remat", "dropout on the shortcut"],
)
def test_both_layouts_train_alike_for_ten_steps(fields):
    losses, variables = train("scan", **fields)
    expected, expected_variables = train("unroll", **fields)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    close(variables["params"], expected_variables["params"], "parameters", 1e-3)
    assert losses[-1] != losses[0]


def test_each_block_of_a_stage_drops_different_images():
    model = network("scan", (4,)).clone(stochastic_depth=0.5)
    images = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
    seen = []

    def record(call, arguments, keywords, context):
        output = call(*arguments, **keywords)
        if context.module.path[-1:] == ("survival",):
            jax.debug.callback(lambda scale: seen.append(np.asarray(scale).ravel() > 0), output)
        return output

    variables = jit(model.init)(jax.random.key(1), images)
    with nn.intercept_methods(record):
        rngs = {"dropout": jax.random.key(2)}
        model.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
    jax.effects_barrier()
    assert len({tuple(survivors) for survivors in seen}) == 4
