"""Tests of how the gradient-flow experiment reads norms and judges them."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

FILE = Path(__file__).parents[2] / "experiments" / "gradient_flow.py"
EXPERIMENT = runpy.run_path(str(FILE), run_name="experiment")
SEEDS = (0, 1, 2)


def layers(**norms: list[list[float]]) -> pd.DataFrame:
    """Returns the norms of each run as lists of blocks, one for each step."""
    return pd.DataFrame(
        {"folder": folder, "step": 50 * step, "layer": layer, "activation_gradient_norm": norm}
        for folder, steps in norms.items()
        for step, blocks in enumerate(steps)
        for layer, norm in [
            *((f"stage1/block{index + 1}", norm) for index, norm in enumerate(blocks)),
            ("stage1/block1/Conv_0/kernel", np.nan),
        ]
    )


def test_norms_are_relative_to_the_last_block_and_other_layers_are_left_out() -> None:
    found = EXPERIMENT["block_gradients"](layers(run=[[8.0, 4.0, 2.0]]))
    assert found["relative"].tolist() == [4, 2, 1]
    assert found["position"].tolist() == [0, 0.5, 1]


def test_a_change_is_positive_if_the_gradient_grows_towards_the_input() -> None:
    norms = [[100.0, 1.0], [1.0, 1.0], [0.1, 1.0], [0.001, 1.0]]
    [change] = EXPERIMENT["gradient_changes"](layers(run=norms)).to_dict("records")
    assert change["initial"] == pytest.approx(2)
    assert change["lowest"] == pytest.approx(-3)
    assert change["typical"] == pytest.approx(-1)


@pytest.mark.parametrize("lost", [0.0, np.nan])
def test_a_norm_that_is_zero_or_not_finite_has_no_change(lost: float) -> None:
    changes = EXPERIMENT["gradient_changes"](layers(run=[[1.0, 1.0], [lost, 1.0]]))
    assert np.isnan(changes["lowest"]).all()


def judged(initial: float, later: float, train_error: float = 0.5) -> dict[str, str]:
    """Returns the verdicts if the first block's gradient is so many times that of the last."""
    runs, norms = [], {}
    for depth in (8, 56):
        for seed in SEEDS:
            folder = f"depth{depth}-seed{seed}"
            factor = 1 + 0.01 * seed
            norms[folder] = [[initial * factor, 1.0], [later * factor, 1.0]]
            error = train_error * (depth == 56) + 0.001 * seed
            runs.append(
                {"folder": folder, "model.depth": depth, "seed": seed, "train_error": error}
            )
    common: dict[str, Any] = {"model.shortcut": "none", "model.norm": "batch"}
    table = pd.DataFrame(runs).assign(**common, test_error=0.5, finished=True, diverged=False)
    return {
        claim.statement: claim.verdict for claim in EXPERIMENT["claims"](table, layers(**norms))
    }


def test_a_gradient_of_one_size_is_healthy_and_degradation_has_another_cause() -> None:
    verdicts = list(judged(2, 0.5).values())
    assert verdicts[:4] == ["agrees"] * 4


def test_a_vanishing_gradient_disagrees() -> None:
    verdicts = list(judged(0.01, 0.001).values())
    assert verdicts[:3] == ["disagrees"] * 3


def test_an_exploding_gradient_does_not_vanish_but_is_not_healthy() -> None:
    verdicts = list(judged(1000, 1000).values())
    assert verdicts[:3] == ["agrees", "agrees", "disagrees"]


def test_networks_that_were_not_run_are_not_judged() -> None:
    verdicts = list(judged(1, 1).values())
    assert verdicts[5:] == ["not tested at this scale"] * 2
