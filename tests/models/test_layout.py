"""The two layouts hold one network: converting there and back changes nothing."""

import jax
import numpy as np
import pytest

from resjax.models import layout
from resjax.models.resnet import build

IMAGES = np.zeros((1, 8, 8, 3), np.float32)


def equal(these, those):
    """The same names, dtypes and bits."""
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


# Twelve blocks, as block10 must not come before block2; one, as then there is nothing to stack.
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
def test_each_layout_is_what_its_network_asks_for(draw, stages, block):
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


def test_what_has_the_other_layout_already_stays(draw):
    scanned, unrolled = (draw(network(loop, (2, 2, 1)), IMAGES) for loop in ("scan", "unroll"))
    assert equal(layout.scanned(scanned), scanned)
    assert equal(layout.unrolled(unrolled), unrolled)


def test_converting_leaves_the_given_variables_alone(draw):
    variables = draw(network("scan", (2, 2, 1)), IMAGES)
    before = jax.tree.map(np.copy, variables)
    layout.unrolled(variables)
    assert equal(variables, before)
