"""Tests of what the experiment on very deep networks trains and concludes."""

import runpy
from pathlib import Path

import pandas as pd
import pytest

FILE = Path(__file__).parents[2] / "experiments" / "very_deep.py"
EXPERIMENT = runpy.run_path(str(FILE), run_name="experiment")


def test_only_chosen_depths_are_also_trained_without_the_warm_up() -> None:
    runs = EXPERIMENT["sweep"](seeds=(0,))
    found = [(run["model.depth"], run["optimizer.schedule"]) for run in runs]
    assert found == [(56, "he2015"), (110, "he2015"), (1202, "he2015"), (110, "steps")]


def test_a_run_starts_when_its_training_error_is_first_below_80_per_cent() -> None:
    errors = {"a": [0.9, 0.79, 0.85, 0.5], "b": [0.9, 0.9, 0.9, 0.8]}
    curves = pd.DataFrame(
        {"folder": folder, "step": 100 * step, "split": split, "error": error - (split == "test")}
        for folder, values in errors.items()
        for step, error in enumerate(values)
        for split in ("train", "test")
    )
    found = EXPERIMENT["starting_steps"](curves)
    assert found.to_dict("records") == [{"folder": "a", "starting_step": 100}]


@pytest.mark.parametrize(
    ("train_error", "verdicts"),
    [(0.001, ["agrees", "agrees"]), (0.5, ["disagrees", "not tested at this scale"])],
)
def test_a_network_that_does_not_train_has_not_overfitted(
    train_error: float, verdicts: list[str]
) -> None:
    rows = [
        {
            "folder": f"{depth}-{seed}",
            "model.depth": depth,
            "seed": seed,
            "train_error": (train_error if depth == 1202 else 0) + 0.0001 * seed,
            "test_error": 0.08 if depth == 1202 else 0.06 + 0.001 * seed,
        }
        for depth in (110, 1202)
        for seed in (0, 1, 2)
    ]
    common = {"optimizer.schedule": "he2015", "finished": True, "diverged": False}
    curves = pd.DataFrame(columns=["folder", "step", "split", "error"])
    claims = EXPERIMENT["claims"](pd.DataFrame(rows).assign(**common), curves)
    assert [claim.verdict for claim in claims[2:]] == verdicts
