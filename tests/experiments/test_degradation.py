"""Tests of the runs and figures of the degradation experiment."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from resjax.analysis.claims import Claim

EXPERIMENT = runpy.run_path(
    str(Path(__file__).parents[2] / "experiments" / "degradation.py"), run_name="experiment"
)
sweep: Callable[..., Any] = EXPERIMENT["sweep"]
figures: Callable[[pd.DataFrame, pd.DataFrame], dict[str, Figure]] = EXPERIMENT["figures"]
claims: Callable[[pd.DataFrame], list[Claim]] = EXPERIMENT["claims"]


def tables(
    depths: tuple[int, ...] = (8, 20, 56),
    shortcuts: tuple[str, ...] = ("none", "pad"),
    seeds: tuple[int, ...] = (0, 1, 2),
    data: str = "digits",
    points: int = 12,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns tables of finished runs in which deeper plain networks are worse."""
    runs, curves = [], []
    for depth in depths:
        for shortcut in shortcuts:
            for seed in seeds:
                sign = 1 if shortcut == "none" else -1
                final = 0.1 + 0.0005 * sign * depth + 0.002 * seed
                folder = f"depth{depth}-{shortcut}-seed{seed}"
                runs.append(
                    {
                        "folder": folder,
                        "seed": seed,
                        "model.depth": depth,
                        "model.shortcut": shortcut,
                        "model.block": "basic",
                        "data.name": data,
                        "train_error": 0.7 * final,
                        "test_error": final,
                        "train_loss": final,
                        "test_loss": final,
                        "parameters": 1000.0 * depth,
                        "finished": True,
                        "diverged": False,
                    }
                )
                step = np.arange(1, points + 1) * 10
                error = final + 0.8 * np.exp(-step / 30)
                curves += [
                    pd.DataFrame(
                        {
                            "folder": folder,
                            "step": step,
                            "split": split,
                            "loss": error,
                            "error": factor * error,
                        }
                    )
                    for split, factor in (("train", 0.7), ("test", 1.0))
                ]
    return pd.DataFrame(runs), pd.concat(curves, ignore_index=True)


def titles(figure: Figure) -> list[str]:
    return [axes.get_title("left") for axes in figure.axes]


def sources(figure: Figure) -> list[str]:
    known = {row.source for row in EXPERIMENT["PUBLISHED"]}
    return [name.get_text() for name in figure.legends[0].get_texts() if name.get_text() in known]


def test_each_depth_is_trained_with_and_without_shortcuts() -> None:
    runs = list(sweep())
    assert len(runs) == 5 * 2 * 5
    assert {run["model.shortcut"] for run in runs if run["model.depth"] == 110} == {"none", "pad"}
    assert len({tuple(run.items()) for run in runs}) == len(runs)


def test_a_config_can_select_runs() -> None:
    assert list(sweep(depths=(8,), shortcuts=("pad",), seeds=(3,))) == [
        {"model.depth": 8, "model.shortcut": "pad", "seed": 3}
    ]


def test_plain_and_residual_networks_have_a_panel_each() -> None:
    drawn = figures(*tables())
    assert list(drawn) == ["degradation", "final_error"]
    assert titles(drawn["degradation"]) == ["plain", "residual"]
    labels = {text.get_text() for text in drawn["degradation"].axes[0].texts}
    assert labels == {"8 layers", "20 layers", "56 layers"}


def test_a_users_shortcut_has_its_own_panel() -> None:
    drawn = figures(*tables(shortcuts=("none", "pad", "my.nets:Gated")))
    names = ["plain", "residual, pad", "residual, my.nets:Gated"]
    assert titles(drawn["degradation"]) == names
    assert {text.get_text() for text in drawn["final_error"].axes[0].texts} == set(names)


def test_different_blocks_are_not_averaged() -> None:
    runs, curves = tables(seeds=(0, 1))
    runs["model.block"] = np.where(runs["seed"] == 0, "basic", "my.nets:Block")
    assert titles(figures(runs, curves)["degradation"]) == [
        "plain, basic blocks",
        "plain, my.nets:Block blocks",
        "residual, basic blocks",
        "residual, my.nets:Block blocks",
    ]


def test_published_errors_have_a_panel_of_their_own_beside_other_data() -> None:
    on_cifar10 = figures(*tables((20, 56), data="cifar10"))["final_error"]
    on_digits = figures(*tables((20, 56)))["final_error"]
    assert titles(on_cifar10) == [""]
    assert titles(on_digits) == ["measured, digits", "published, CIFAR-10"]
    for figure in (on_cifar10, on_digits):
        assert sources(figure) == list(dict.fromkeys(row.source for row in EXPERIMENT["PUBLISHED"]))


def test_bottlenecks_are_trained_if_the_sweep_names_them() -> None:
    runs = list(sweep(depths=(20,), shortcuts=("pad",), seeds=(0,), blocks=("bottleneck",)))
    assert [run["model.block"] for run in runs] == ["bottleneck"]


def test_published_errors_of_basic_blocks_are_not_drawn_beside_bottlenecks() -> None:
    runs, curves = tables((20, 56), data="cifar10")
    drawn = figures(runs.assign(**{"model.block": "bottleneck"}), curves)
    assert not sources(drawn["final_error"])


@pytest.mark.parametrize("others", [(), ("basic",)])
def test_claims_about_bottlenecks_name_them_and_quote_no_number_of_basic_blocks(
    others: tuple[str, ...],
) -> None:
    runs = tables((20, 56))[0]
    found = claims(pd.concat([runs.assign(**{"model.block": b}) for b in ("bottleneck", *others)]))
    bottlenecks = [claim for claim in found if claim.statement.endswith(" (bottleneck blocks)")]
    assert len(bottlenecks) == 5
    assert {claim.published for claim in bottlenecks} == {"no number for these blocks"}
    assert len(found) == 5 + 5 * len(others)


def test_claims_about_basic_blocks_quote_the_paper() -> None:
    found = claims(tables((20, 56))[0])
    assert [claim.statement.partition(" (")[2] for claim in found] == [""] * 5
    assert "8.75 % (20 layers) to 6.61 ± 0.16 % (110 layers)" in {c.published for c in found}


def test_published_errors_are_drawn_at_the_depths_that_were_run() -> None:
    runs = tables(depths=(8, 110), shortcuts=("pad",), data="cifar10")
    assert "a-martyn/resnet, best epoch" not in sources(figures(*runs)["final_error"])


def test_networks_that_were_not_run_are_not_drawn() -> None:
    figure = figures(*tables(depths=(20,), shortcuts=("none",), data="cifar10"))["final_error"]
    assert sources(figure) == ["nabla0001/resnet", "a-martyn/resnet, best epoch"]


@pytest.mark.parametrize("row", EXPERIMENT["PUBLISHED"])
def test_published_errors_are_plausible_per_cent(row: Any) -> None:
    assert row.series in ("plain", "residual")
    assert all(4 < error < 20 for error, _ in row.points.values() if np.isfinite(error))


def test_the_papers_error_at_depth_110_is_its_mean_and_not_its_best() -> None:
    papers = [row for row in EXPERIMENT["PUBLISHED"] if row.source == "He et al. 2015"]
    values = {row.series: row.values[110] for row in papers}
    assert values == {"plain": np.inf, "residual": (6.61, 0.16)}


def test_runs_in_progress_have_curves_without_final_errors() -> None:
    runs, curves = tables()
    runs["finished"] = False
    runs[["train_error", "test_error", "train_loss", "test_loss"]] = np.nan
    assert list(figures(runs, curves)) == ["degradation"]


def test_runs_without_measurements_draw_nothing() -> None:
    runs, curves = tables()
    assert list(figures(runs.assign(finished=False), curves.head(0))) == []


def test_another_primary_metric_is_drawn_without_published_errors() -> None:
    runs, curves = tables((20, 56), data="cifar10")
    described = {"primary_metric": "accuracy", "lower_is_better": False, "metric_unit": "fraction"}
    names = {"train_error": "train_accuracy", "test_error": "test_accuracy", "error": "accuracy"}
    drawn = figures(
        runs.rename(columns=names).assign(**described),
        curves.rename(columns=names).assign(**described),
    )
    assert list(drawn) == ["degradation", "final_accuracy"]
    assert drawn["final_accuracy"].axes[0].get_ylabel() == "final accuracy (%)"
    assert not sources(drawn["final_accuracy"])


def test_diverged_runs_have_a_cross_at_their_depth() -> None:
    runs, curves = tables()
    lost = (runs["model.depth"] == 56) & (runs["model.shortcut"] == "none")
    runs.loc[lost, "diverged"] = True
    axes = figures(runs, curves)["final_error"].axes[0]
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [float(line.get_xdata()[0]) for line in crosses] == [56]
    legend = axes.figure.legends[0].get_texts()
    assert "diverged run" in [text.get_text() for text in legend]
