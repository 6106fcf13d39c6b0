"""Tests of which layers the experiment on responses compares."""

import runpy
from pathlib import Path

import pandas as pd

FILE = Path(__file__).parents[2] / "experiments" / "layer_responses.py"
EXPERIMENT = runpy.run_path(str(FILE), run_name="experiment")

DEVIATIONS = {
    "stem/BatchNorm_0": 9.0,
    "stage1/block1/BatchNorm_0": 1.0,
    "stage1/block1/BatchNorm_1": 3.0,
    "stage1/block1/shortcut/BatchNorm_0": 9.0,
    "stage2/block1/BatchNorm_0": 2.0,
    "stage2/block1/Conv_0/kernel": float("nan"),
    "head": 9.0,
}


def layers(scale: float = 1.0) -> pd.DataFrame:
    deviations = [scale * value for value in DEVIATIONS.values()]
    columns = {"step": 50, "layer": list(DEVIATIONS), "response_std": deviations}
    return pd.DataFrame(columns).assign(folder="run")


def test_the_layers_of_branches_are_compared_in_order_and_by_rank() -> None:
    found = EXPERIMENT["responses"](layers())
    assert found["response_std"].tolist() == [1, 3, 2]
    assert found["layer_index"].tolist() == [1, 2, 3]
    assert found["rank"].tolist() == [3, 1, 2]


def test_plain_and_residual_networks_are_compared_at_equal_depths_after_the_last_step() -> None:
    rows, tables = [], []
    for shortcut, depths, scale in (("none", (20,), 2.0), ("pad", (20, 110), 1.0)):
        for depth in depths:
            for seed in (0, 1, 2):
                folder = f"{shortcut}-{depth}-{seed}"
                size = (scale + 0.01 * seed) * (0.5 if depth == 110 else 1)
                rows.append(
                    {"folder": folder, "model.shortcut": shortcut, "model.depth": depth}
                    | {"seed": seed, "test_error": 0.1, "train_error": 0.1}
                )
                tables.append(layers(100 * size).assign(folder=folder, step=0))
                tables.append(layers(size).assign(folder=folder))
    runs = pd.DataFrame(rows).assign(finished=True, diverged=False)
    smaller, deeper = EXPERIMENT["claims"](runs, pd.concat(tables))
    assert (smaller.verdict, deeper.verdict) == ("agrees", "agrees")
    assert "residual: 2.02" in smaller.measured
    assert "plain: 4.02" in smaller.measured
