"""Tests of the data of the interactive chart: the numbers of the figures, in a bounded size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from resjax.analysis import chart_data as chart
from resjax.analysis.figures import average_curves
from resjax.analysis.lines import divide
from resjax.analysis.runs import load_curves, load_layers, load_runs

Maker = Callable[..., Path]


def data_of(root: Path) -> dict[str, Any]:
    runs = load_runs(root)
    return chart.chart_data(runs, load_curves(runs), load_layers(runs), divide(runs))


def test_means_and_bands_are_those_of_the_figures(make_sweep: Maker) -> None:
    special = {"depth8_pad_seed0": {"stop": 0.5}, "depth8_none_seed1": {"diverge": 0.5}}
    root = make_sweep(points=10, **special)
    data = data_of(root)
    lines, curves = divide(load_runs(root)), load_curves(root)
    means = {(m["metric"], m["split"], m["group"]): m for m in data["means"]}
    for metric, scale in (("error", 100), ("loss", 1)):
        for index, group in enumerate(data["groups"]):
            folders = lines.loc[lines["name"] == group["name"], "folder"]
            for split in ("train", "test"):
                own = curves[curves["folder"].isin(folders) & (curves["split"] == split)]
                expected, shown = average_curves(own, metric), means[metric, split, index]
                assert data["steps"][shown["steps"]] == tuple(expected.step)
                assert shown["mean"] == pytest.approx(scale * expected.mean, rel=1e-3)
                assert shown["std"] == pytest.approx(scale * expected.deviation, rel=1e-3)
                assert (shown["seeds"],) == expected.seeds
    outside = {run["name"]: run["diverged"] for run in data["runs"] if run["outside"]}
    assert outside == {"depth8-pad-seed0": False, "depth8-none-seed1": True}


def test_the_data_of_ten_thousand_runs_is_bounded_and_has_the_failures() -> None:
    count, steps = 10_000, np.arange(0, 800, 100)
    folders = np.array([f"run{index}" for index in range(count)])
    runs = pd.DataFrame({"folder": folders, "seed": np.arange(count) // 200})
    runs["optimizer.learning_rate"] = 0.001 * (1 + np.arange(count) % 200)
    runs["diverged"] = np.arange(count) == 9_000
    curves = pd.DataFrame(
        {"folder": folders.repeat(8), "step": np.tile(steps, count), "split": "test"}
    ).assign(loss=1.0, error=0.5)
    layers = pd.DataFrame(columns=["folder", "step", "layer"])
    data = chart.chart_data(runs, curves, layers, divide(runs))
    assert len(data["groups"]) == chart.MOST_LINES
    assert (data["settings"], data["all"]) == (200, count)
    assert len(chart.to_json(data)) < 700_000
    assert [run["name"] for run in data["runs"] if run["diverged"]] == ["run9000"]
