"""Lesions of a network, as the experiment makes them, and what it concludes from them."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

import resjax
from resjax.analysis.claims import AGREES, DISAGREES
from resjax.analysis.experiment_figures import Tables, load_experiment, load_tables
from resjax.analysis.runs import load_runs
from resjax.config import load
from resjax.run_files import CLASSIFICATION_ERROR
from resjax.sweeps.experiment import plan
from resjax.sweeps.made_up import made_up_runs

ROOT = Path(__file__).parents[2]
FILE = ROOT / "experiments" / "near_identity.py"
CONFIG = str(ROOT / "configs" / "quickstart.py")


@pytest.fixture(scope="module")
def experiment(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("near_identity")


@pytest.fixture(scope="module")
def rows(experiment: ModuleType) -> list[dict[str, Any]]:
    """What `measure` returns if each deleted block costs one per cent."""
    fields = {"family": "cifar", "depth": 20, "width": 4, "loop": "scan"}
    model = resjax.build(fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)

    def evaluate(variables: Any, model: Any = None) -> dict[str, float]:
        keeps = jax.tree.leaves(variables.get("lesions", {}))
        return {"loss": 1.0, "error": 0.05 + 0.01 * sum(float((1 - k).sum()) for k in keeps)}

    run = SimpleNamespace(
        model=model,
        variables=variables,
        evaluate=evaluate,
        config=SimpleNamespace(seed=0),
        task=SimpleNamespace(dataset=SimpleNamespace(class_names="0123456789")),
    )
    return experiment.measure(run)


def test_each_block_is_deleted_once(rows: list[dict[str, Any]]) -> None:
    one = [row for row in rows if row["lesion"] == "one deleted"]
    names = [f"stage{stage}/block{block}" for stage in (1, 2, 3) for block in (1, 2, 3)]
    assert [row["block"] for row in one] == names
    assert {row["block"] for row in one if row["changes_shape"]} == {
        "stage2/block1",
        "stage3/block1",
    }
    assert [row["error"] for row in one] == pytest.approx([0.06] * 9)
    assert [row["error"] for row in rows if row["lesion"] == "none"] == [0.05]


def test_several_blocks_are_deleted_and_pairs_swapped(rows: list[dict[str, Any]]) -> None:
    several = [row for row in rows if row["lesion"] == "several deleted"]
    for row in several:
        assert row["error"] == pytest.approx(0.05 + 0.01 * row["deleted"])
    assert {row["deleted"] for row in several} == set(range(1, 9))
    swapped = [row for row in rows if row["lesion"] == "swapped"]
    assert [row["tau"] for row in swapped if row["swaps"] == 1] == pytest.approx([1 / 3] * 5)


@pytest.fixture(scope="module")
def judged(rows: list[dict[str, Any]]) -> Callable[[float, float], tuple[Any, Tables]]:
    """A function from the harm of a lesion to plain and residual networks to made-up tables."""
    runs = plan(FILE, load(CONFIG), CONFIG).runs

    def tables(plain: float, residual: float) -> Any:
        with made_up_runs({run.name: run.config for run in runs}) as folder:
            loaded = load_tables(load_runs(folder), None)
        measured = loaded.runs[["folder", "model.shortcut", "seed"]].merge(
            pd.DataFrame(rows), how="cross"
        )
        harm = measured["model.shortcut"].map({"none": plain, "pad": residual})
        error = 0.05 + (measured["error"] - 0.05) * harm + 1e-4 * measured["seed"]
        error -= 0.01 * harm * (measured["tau"].fillna(1) - 1)
        error += 0.01 * harm * measured["changes_shape"].eq(True)
        measured = measured.assign(error=error)[["folder", *rows_columns(measured)]]
        return loaded._replace(measurements=measured)

    def rows_columns(measured: pd.DataFrame) -> list[str]:
        return [name for name in measured if name not in ("folder", "model.shortcut", "seed")]

    return tables


def test_claims_follow_the_measurements(judged: Callable[..., Any]) -> None:
    experiment = load_experiment(FILE)
    for plain, residual, verdict in ((5, 1, AGREES), (1, 5, DISAGREES)):
        claims = experiment.claims(judged(plain, residual))
        assert [claim.verdict for claim in claims[:2]] == [verdict] * 2
        assert [claim.verdict for claim in claims[2:5]] == [AGREES] * 3
    assert "difference +" in claims[0].measured


def test_a_loss_is_a_share_of_what_a_network_has_above_chance(experiment: ModuleType) -> None:
    def lost(intact: float, after: float) -> float:
        lesions = [
            {"lesion": "none", "error": intact, "chance": 0.9},
            {"lesion": "one deleted", "error": after, "changes_shape": False, "block": "a"},
        ]
        table = pd.DataFrame(lesions).assign(folder="run")
        effects = experiment.lesion_effects(table, CLASSIFICATION_ERROR)
        return float(effects["lost_error"].iloc[0])

    assert lost(0.1, 0.5) == pytest.approx(0.5)
    assert lost(0.7, 0.8) == pytest.approx(0.5)
    assert np.isnan(lost(0.85, 0.9))  # a network that has learned nothing


def test_figures_show_each_kind_of_lesion(judged: Callable[..., Any]) -> None:
    figures = load_experiment(FILE).figures(judged(5, 1))
    assert set(figures) == {"identity", "one_deleted", "several_deleted", "swapped"}
    axes = figures["swapped"].axes[0]
    assert axes.get_xlim()[0] > axes.get_xlim()[1]  # from the order of training on
