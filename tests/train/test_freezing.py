"""Patterns of parameters, the phases that follow from them, and the rates of the stages."""

import math
from functools import cache
from itertools import pairwise

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resjax.config import Transfer
from resjax.errors import UserError
from resjax.models.layout import unrolled_paths
from resjax.models.resnet import build
from resjax.train import freezing
from resjax.train.freezing import NEVER

IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)


@cache
def params(loop="unroll", **fields):
    """Shapes of a network with two blocks in each of three stages, unless fields say otherwise."""
    network = build({"depth": 14, "width": 4, "loop": loop, **fields})
    return jax.eval_shape(network.init, jax.random.key(0), IMAGE)["params"]


def starts(loop="unroll", **transfer):
    return freezing.starts(unrolled_paths(params(loop)), Transfer(**transfer))


def refusal(**transfer):
    with pytest.raises(UserError) as refused:
        starts(**transfer)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_stacked_array_holds_the_parameters_of_the_unrolled_network():
    stacked = unrolled_paths(params("scan", depth=20))
    unrolled = unrolled_paths(params(depth=20))
    held = [path for paths in stacked.values() for path in paths]
    assert sorted(held) == sorted(unrolled)
    assert len(stacked) < len(unrolled)
    kernel = stacked["stage2/blocks/Conv_0/kernel"]
    assert kernel == ("stage2/block2/Conv_0/kernel", "stage2/block3/Conv_0/kernel")


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ("", lambda path: False),
        ("stem,stage1", lambda path: path.startswith(("stem/", "stage1/"))),
        (" stem , stage1 ", lambda path: path.startswith(("stem/", "stage1/"))),
        ("stage2/block1", lambda path: path.startswith("stage2/block1/")),
        ("stage3/block2/Conv_0/kernel", lambda path: path == "stage3/block2/Conv_0/kernel"),
        ("*/BatchNorm_?", lambda path: "BatchNorm" in path),
        ("stage[12]", lambda path: path.startswith(("stage1/", "stage2/"))),
    ],
)
def test_a_pattern_freezes_the_parameters_that_it_matches_and_no_others(freeze, frozen):
    found = starts(freeze=freeze)
    assert len(found) > 30
    assert found == {path: NEVER if frozen(path) else 0.0 for path in found}


def test_a_pattern_does_not_match_a_longer_name_that_begins_with_it():
    epochs = freezing.starts(
        {path: (path,) for path in ("stage1/a", "stage10/a")}, Transfer(freeze="stage1")
    )
    assert epochs == {"stage1/a": NEVER, "stage10/a": 0.0}


def test_thaw_takes_precedence_over_freeze():
    found = starts(freeze="*", thaw={"head": 0, "stage3": 2, "stage2/block2": 3.5})
    assert {path: epoch for path, epoch in found.items() if epoch != NEVER} == {
        path: {"head": 0, "stage3": 2, "stage2": 3.5}[path.partition("/")[0]]
        for path in found
        if path.startswith(("head/", "stage3/", "stage2/block2/"))
    }


def test_the_longest_thaw_pattern_wins_and_of_equally_long_ones_the_last():
    found = starts(thaw={"*": 9, "stage3": 2, "stage[3]": 4, "stage1": 5, "stage?": 6, "head": 0})
    by_module = {path.partition("/")[0]: epoch for path, epoch in found.items()}
    assert by_module == {"stem": 9, "stage1": 6, "stage2": 6, "stage3": 4, "head": 0}


@pytest.mark.parametrize(
    ("transfer", "message"),
    [
        (
            {"freeze": "stem,stage5"},
            "transfer.freeze=stage5: matches no parameter; the network has head",
        ),
        ({"thaw": {"heads": 1}}, "transfer.thaw.heads=1: matches no parameter"),
        ({"freeze": "*"}, "transfer.freeze and transfer.thaw: nothing trains at the start"),
        ({"thaw": {"*": 1}}, "nothing trains at the start"),
    ],
)
def test_a_mistake_in_a_pattern_is_one_line(transfer, message):
    assert message in refusal(**transfer)


@pytest.mark.parametrize("transfer", [{"freeze": "stage2/block2"}, {"thaw": {"stage2/block2": 1}}])
def test_blocks_that_are_scanned_together_cannot_be_frozen_one_by_one(transfer):
    paths = unrolled_paths(params("scan", depth=20))
    with pytest.raises(UserError, match=r"scanned together; set model\.loop=unroll"):
        freezing.starts(paths, Transfer(**transfer))
    freezing.starts(unrolled_paths(params(depth=20)), Transfer(**transfer))


def test_in_a_scanned_stage_the_first_block_or_a_layer_of_all_blocks_can_be_frozen():
    found = starts("scan", freeze="stage2/block1,*/Conv_1")
    assert found["stage2/block1/Conv_0/kernel"] == NEVER
    assert found["stage2/blocks/Conv_0/kernel"] == 0
    assert found["stage2/blocks/Conv_1/kernel"] == NEVER


EPOCHS = st.dictionaries(
    st.text("abc/", min_size=1, max_size=4),
    st.one_of(st.just(NEVER), st.floats(0, 20), st.integers(0, 5)),
).filter(lambda epochs: 0 in epochs.values())


@given(epochs=EPOCHS, steps=st.floats(0.1, 100))
def test_each_parameter_trains_from_the_first_step_that_begins_in_its_epoch(epochs, steps):
    phases = freezing.phases(epochs, steps)
    assert phases[0].first_step == 0
    begins = {path: phase.first_step for phase in phases for path in phase.thaws}
    assert begins == {p: math.ceil(e * steps) for p, e in epochs.items() if e != NEVER}
    for before, after in pairwise(phases):
        assert before.first_step < after.first_step
        assert after.trains == before.trains | after.thaws
        assert not before.trains & after.thaws


@given(chosen=st.sets(st.sampled_from(["a", "b/c", "b/d", "e/f/g"])))
def test_merge_is_the_inverse_of_split(chosen):
    tree = {"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": {"g": 4}}}
    ones, others = freezing.split(tree, chosen.__contains__)
    assert len(jax.tree.leaves(ones)) == len(chosen)
    assert len(jax.tree.leaves(others)) == 4 - len(chosen)
    assert freezing.merge(ones, others) == freezing.merge(others, ones) == tree


def test_a_module_is_frozen_if_none_of_its_own_parameters_trains():
    paths = ("a/n/scale", "a/n/bias", "b/n/scale", "b/n/bias", "b/c/kernel")
    assert freezing.frozen_modules(paths, {"a/n/bias", "b/c/kernel"}) == {"b/n"}


def by_module(factors):
    return {path.partition("/")[0]: factor for path, factor in factors.items()}


def test_layer_decay_counts_from_the_head_and_the_final_norm_belongs_to_the_last_stage():
    paths = unrolled_paths(params(block="preact_basic", shortcut="project"))
    found = freezing.rate_factors(paths, Transfer(layer_decay=0.5), 0.1)
    assert found.keys() == paths.keys()
    assert by_module(found) == {
        **{"head": 1, "norm": 0.5, "stage3": 0.5},
        **{"stage2": 0.25, "stage1": 0.125, "stem": 0.0625},
    }


def test_rates_rise_by_equal_factors_from_the_first_rate_to_that_of_the_head():
    paths = unrolled_paths(params())
    found = by_module(freezing.rate_factors(paths, Transfer(first_rate=1e-5), 0.1))
    rates = [0.1 * found[name] for name in ("stem", "stage1", "stage2", "stage3", "head")]
    assert rates == pytest.approx(np.geomspace(1e-5, 0.1, 5))


def test_by_default_all_factors_are_exactly_one():
    found = freezing.rate_factors(unrolled_paths(params()), Transfer(), 0.1)
    assert set(found.values()) == {1}
