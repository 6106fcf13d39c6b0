"""Tests of what the experiment on pre-activation concludes about each kind of block."""

import runpy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

FILE = Path(__file__).parents[2] / "experiments" / "preactivation_depth.py"
EXPERIMENT = runpy.run_path(str(FILE), run_name="experiment")


def runs_of(kind: str, gains: dict[int, float]) -> pd.DataFrame:
    """Returns runs of both units; pre-activation lowers the error by the gain at each depth."""
    rows: list[dict[str, Any]] = [
        {
            "folder": f"{kind}-{depth}-{unit}-{seed}",
            "model.depth": depth,
            "model.block": f"{unit}{kind}",
            "seed": seed,
            "test_error": 0.2 - (gain if unit else 0) + 0.0001 * seed * (1 + depth / 100),
            "train_loss": 0.1 - (gain if unit else 0) + 0.0001 * seed * (1 + depth / 100),
        }
        for depth, gain in gains.items()
        for unit in ("", "preact_")
        for seed in (0, 1, 2)
    ]
    return pd.DataFrame(rows).assign(finished=True, diverged=False)


def verdicts(runs: pd.DataFrame) -> dict[str, str]:
    return {claim.statement: claim.verdict for claim in EXPERIMENT["claims"](runs)}


BOTTLENECKS = (
    "At great depth, pre-activation has a lower test error than the original unit",
    "At great depth, pre-activation trains to a lower training loss",
    "The deeper the network, the more pre-activation lowers the test error",
)
BASIC = (
    "Pre-activation has a lower test error than the original unit (basic blocks)",
    "The deeper the network, the more pre-activation lowers the test error (basic blocks)",
)


@pytest.mark.parametrize(("sign", "verdict"), [(1, "agrees"), (-1, "disagrees")])
def test_each_kind_of_block_is_judged_by_its_own_runs(sign: int, verdict: str) -> None:
    bottlenecks = runs_of("bottleneck", {20: 0.01 * sign, 110: 0.05 * sign})
    assert verdicts(bottlenecks) == dict.fromkeys(BOTTLENECKS, verdict)
    basic = runs_of("basic", {20: -0.01 * sign, 56: -0.05 * sign})
    other = {"agrees": "disagrees", "disagrees": "agrees"}[verdict]
    assert verdicts(basic) == dict.fromkeys(BASIC, other)
    both = verdicts(pd.concat([basic, bottlenecks], ignore_index=True))
    assert both == dict.fromkeys(BOTTLENECKS, verdict) | dict.fromkeys(BASIC, other)


def test_basic_blocks_of_one_depth_are_compared_at_this_depth_as_the_paper_does() -> None:
    assert verdicts(runs_of("basic", {110: 0.05})) == {BASIC[0]: "agrees"}
    [claim] = EXPERIMENT["claims"](runs_of("basic", {110: 0.05}))
    assert claim.published == "110 layers: 6.37 against 6.61 % (CIFAR-10)"


def test_blocks_of_other_kinds_are_not_judged() -> None:
    assert verdicts(runs_of("other", {110: 0.05})) == {}
