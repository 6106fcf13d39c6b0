"""Surfaces of the loss: how they are judged, and drawn."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from resjax.analysis.claims import AGREES, DISAGREES
from resjax.analysis.experiment_figures import load_experiment, load_tables
from resjax.analysis.runs import load_runs
from resjax.config import load
from resjax.sweeps.experiment import plan
from resjax.sweeps.made_up import made_up_runs

ROOT = Path(__file__).parents[2]
FILE = ROOT / "experiments" / "loss_landscape.py"
CONFIG = str(ROOT / "configs" / "quickstart.py")
ALONG = np.linspace(-1, 1, 9)


@pytest.fixture(scope="module")
def experiment(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("loss_landscape")


def surface(loss: Callable[[Any, Any], Any]) -> pd.DataFrame:
    x, y = np.meshgrid(ALONG, ALONG, indexing="ij")
    return pd.DataFrame({"x": x.ravel(), "y": y.ravel(), "loss": loss(x, y).ravel()})


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda x, y: 1 + x**2 + 3 * y**2, 0),
        (lambda x, y: 5 - x**2 - 3 * y**2, 1),
        (lambda x, y: 5 + 4 * x**2 - y**2, 1 / 4),
        (lambda x, y: 5 + x * y, 1),  # a saddle in the direction of the diagonals
        (lambda x, y: np.full_like(x, 2), 0),
    ],
)
def test_nonconvexity_compares_negative_curvature_with_the_largest(
    experiment: ModuleType, loss: Callable[..., Any], expected: float
) -> None:
    found = experiment.nonconvexity(experiment.as_grid(surface(loss), "loss"))
    assert found == pytest.approx(expected, abs=1e-6)


def test_points_that_are_not_finite_are_left_out(experiment: ModuleType) -> None:
    points = surface(lambda x, y: 5 + 4 * x**2 - y**2)
    points.loc[3, "loss"] = np.nan
    found = experiment.nonconvexity(experiment.as_grid(points, "loss"))
    assert found == pytest.approx(1 / 4)


def tables(chaotic: str) -> Any:
    """Returns made-up tables in which one kind of network has a wavy surface if it is deep."""
    runs = plan(FILE, load(CONFIG), CONFIG).runs
    with made_up_runs({run.name: run.config for run in runs}) as folder:
        loaded = load_tables(load_runs(folder), None)
    parts = []
    for run in loaded.runs.to_dict("records"):
        waves = run["model.shortcut"] == chaotic and run["model.depth"] == 56

        def loss(x: Any, y: Any, waves: bool = waves, seed: int = run["seed"]) -> Any:
            return 2 + seed / 100 + x**2 + y**2 + waves * np.sin(9 * x + seed) * np.cos(9 * y)

        negative = 0.5 if waves else 0.1 + run["seed"] / 100
        values = pd.DataFrame({"rank": [1, 2, -1], "eigenvalue": [2.0, 1.0, -negative]})
        density = pd.DataFrame({"spectrum": [2.0, 0.1, -negative], "weight": [0.1, 0.7, 0.2]})
        parts.append(pd.concat([surface(loss), values, density]).assign(folder=run["folder"]))
    return loaded._replace(measurements=pd.concat(parts))


def test_claims_follow_the_surfaces() -> None:
    experiment = load_experiment(FILE)
    assert {claim.verdict for claim in experiment.claims(tables("none"))} == {AGREES}
    verdicts = [claim.verdict for claim in experiment.claims(tables("pad"))]
    assert verdicts[0] == verdicts[2] == verdicts[4] == DISAGREES


def test_surfaces_are_drawn_as_contours_and_in_three_dimensions() -> None:
    figures = load_experiment(FILE).figures(tables("none"))
    assert set(figures) == {"contours", "surfaces", "spectrum"}
    titles = [axes.get_title("left") for axes in figures["contours"].axes[:4]]
    assert titles == [
        "plain, 20 layers",
        "plain, 56 layers",
        "residual, 20 layers",
        "residual, 56 layers",
    ]
    assert [axes.name for axes in figures["surfaces"].axes[:4]] == ["3d"] * 4
    figures["surfaces"].draw_without_rendering()
