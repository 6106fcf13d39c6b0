"""A deleted block adds nothing, and exchanged blocks have each other's parameters."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resjax.errors import UserError
from resjax.measurements import (
    LesionedModel,
    block_names,
    delete,
    kendall_tau,
    permute,
    random_orders,
)
from resjax.models import layout
from resjax.models.blocks import Block

IMAGES = np.random.default_rng(1).normal(size=(4, 8, 8, 1)).astype(np.float32)
KINDS = ({"shortcut": "none"}, {"shortcut": "project"}, {"block": "preact_basic"})


class NoShortcutBlock(Block):
    def __call__(self, x):
        return self.act(x)


def require_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def outputs(model, variables):
    return jax.jit(model.apply)(variables, IMAGES)


def lesioned(model, variables, *blocks):
    return outputs(LesionedModel(model), delete(model, variables, blocks))


def without(model, variables, stage, block):
    """Returns the network without a block that keeps shapes, and its variables."""
    fewer = [n - (index + 1 == stage) for index, n in enumerate(model.stages)]
    whole = layout.unrolled(variables)
    for collection in ("params", "batch_stats"):
        blocks = dict(whole[collection][f"stage{stage}"])
        for index in range(block, model.stages[stage - 1]):
            blocks[f"block{index}"] = blocks[f"block{index + 1}"]
        del blocks[f"block{model.stages[stage - 1]}"]
        whole[collection] = {**whole[collection], f"stage{stage}": blocks}
    return model.clone(stages=fewer), layout.scanned(whole)


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_a_network_without_a_block_is_one_with_a_deleted_block(network, fields):
    model, variables = network(**fields)
    intact = outputs(model, variables)
    require_close(lesioned(model, variables), intact)
    expected = outputs(*without(model, variables, stage=2, block=3))
    found = lesioned(model, variables, "stage2/block3")
    require_close(found, expected)
    assert not np.allclose(found, intact, rtol=1e-2)


def test_deleting_blocks_of_a_residual_network_scales_their_branches_by_0(network):
    model, variables = network()
    scales = jnp.array([float(name not in ("stage1/block2", "stage3/block1")) for name in
                        block_names(model)])  # fmt: skip
    found = lesioned(model, variables, "stage1/block2", "stage3/block1")
    expected = outputs(model.clone(branch_scale=scales), variables)
    require_close(found, expected)


def test_a_deleted_block_of_a_plain_network_that_changes_the_shape_pads_its_input(network):
    model, variables = network(shortcut="none", depth=8)
    changed = LesionedModel(model).apply(
        delete(model, variables, ["stage2/block1"]), IMAGES, method="features"
    )
    assert changed["stage2"].shape == (4, 4, 4, 8)
    np.testing.assert_array_equal(changed["stage2"][..., :4], changed["stage1"][:, ::2, ::2])
    assert not changed["stage2"][..., 4:].any()


@pytest.mark.parametrize("shortcut", ["none", "pad"])
def test_lesions_do_not_depend_on_the_layout(network, shortcut):
    model, variables = network(shortcut=shortcut, depth=14)
    unrolled = model.clone(loop="unroll"), layout.unrolled(variables)
    for blocks in (["stage1/block1"], ["stage2/block2", "stage3/block2"]):
        found = lesioned(*unrolled, *blocks)
        require_close(found, lesioned(model, variables, *blocks))


def test_a_learned_branch_scale_is_deleted_too(network):
    model, variables = network(branch_scale="learned:0.5", depth=14)
    require_close(lesioned(model, variables), outputs(model, variables))
    off = jax.tree.map(lambda leaf: leaf, variables)
    off["params"]["stage2"]["blocks"]["branch_scale"]["scale"] = np.zeros(1, np.float32)
    found = lesioned(model, variables, "stage2/block2")
    require_close(found, outputs(model, off))


def test_a_block_that_calls_no_shortcut_is_refused(network):
    model, _ = network(depth=8)
    model = model.clone(block=NoShortcutBlock, stages=(1,))
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    with pytest.raises(UserError, match="stage1/block1 calls no shortcut"):
        jax.eval_shape(LesionedModel(model).apply, delete(model, shapes, []), IMAGES)


def test_an_unknown_block_is_refused(network):
    model, variables = network(depth=8)
    with pytest.raises(UserError, match="no block 'stage1/block9'; the network has stage1/block1"):
        delete(model, variables, ["stage1/block9"])


def test_permuted_blocks_have_each_others_parameters(network):
    model, variables = network()
    swapped = permute(model, variables, {2: [3, 2]})
    kernel = ("params", "stage2", "blocks", "Conv_0", "kernel")
    old, new = variables, swapped
    for name in kernel:
        old, new = old[name], new[name]
    np.testing.assert_array_equal(new, old[::-1])
    assert not np.allclose(outputs(model, swapped), outputs(model, variables), rtol=1e-2)
    back = permute(model, swapped, {2: [3, 2]})
    jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.parametrize("convert", [layout.scanned, layout.unrolled], ids=["scan", "unroll"])
def test_the_first_place_gets_the_first_block_of_the_order(network, convert):
    model, variables = network(depth=26)
    found = layout.scanned(permute(model, convert(layout.unrolled(variables)), {1: [4, 2, 3]}))
    old, new = (
        tree["params"]["stage1"]["blocks"]["Conv_1"]["kernel"] for tree in (variables, found)
    )
    np.testing.assert_array_equal(new, old[np.array([2, 0, 1])])


@pytest.mark.parametrize("order", [[2], [1, 2], [2, 2], [2, 4]])
def test_what_is_no_order_of_the_blocks_is_refused(network, order):
    model, variables = network()
    with pytest.raises(UserError, match=r"stage 1: .* is not an order of the blocks \[2, 3\]"):
        permute(model, variables, {1: order})


def test_random_orders_permute_the_equal_blocks_of_each_stage(network):
    model, _ = network(depth=38)
    orders = random_orders(model, 20, np.random.default_rng(0))
    assert [sorted(order) for order in orders.values()] == [[2, 3, 4, 5, 6]] * 3
    assert kendall_tau(orders) < 0.9
    assert kendall_tau(random_orders(model, 0, np.random.default_rng(0))) == 1


def test_kendall_tau_is_that_of_scipy():
    from scipy.stats import kendalltau

    order = [4, 2, 3, 6, 5]
    assert kendall_tau({1: order}) == pytest.approx(kendalltau(order, range(5)).statistic)
    assert kendall_tau({1: [3, 2], 2: [2, 3]}) == 0


def test_a_network_without_equal_blocks_has_no_orders(network):
    model, _ = network(depth=8)
    with pytest.raises(UserError, match="no stage has two equal blocks"):
        random_orders(model, 1, np.random.default_rng(0))


def test_the_documentations_measure_runs(run):
    page = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()
    [code] = re.findall(r"```python\n(def measure.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(code, names)
    rows = names["measure"](run)
    assert [row["block"] for row in rows] == [f"stage{stage}/block1" for stage in (1, 2, 3)]
    assert all(abs(row["rise"]) <= 1 for row in rows)
