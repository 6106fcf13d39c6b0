"""Tests of the runs and figures of the transfer experiment."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from resjax.config import load

ROOT = Path(__file__).parents[2]
EXPERIMENT = runpy.run_path(str(ROOT / "experiments" / "transfer.py"), run_name="experiment")
METHODS: tuple[str, ...] = EXPERIMENT["METHODS"]
sweep: Callable[..., Any] = EXPERIMENT["sweep"]
figures: Callable[[pd.DataFrame, pd.DataFrame], dict[str, Figure]] = EXPERIMENT["figures"]
method_of: Callable[[pd.DataFrame], pd.Series] = EXPERIMENT["method_names"]

# The columns of a run's table that depend on the method.
COLUMNS: dict[str, dict[str, Any]] = {
    "from scratch": {"transfer.weights": None},
    "frozen features": {"transfer.freeze": "*", "transfer.thaw.head": 0.0},
    "fine-tuned": {},
    "gradually thawed": {"transfer.thaw.head": 0.0, "transfer.thaw.*": 2.0},
}
ERRORS = dict(zip(METHODS, (0.3, 0.2, 0.1, 0.15), strict=True))


def table(
    targets: tuple[str, ...] = ("fashion_mnist", "digits"),
    examples: tuple[int | None, ...] = (5, 20, None),
    rates: tuple[float, ...] = (0.1,),
) -> pd.DataFrame:
    """Returns finished runs with errors that depend on the examples and the method."""
    rows = [
        {
            "folder": f"{target}-{count}-{method}-{rate}-{seed}",
            "seed": seed,
            "data.name": target,
            "data.per_class": count,
            "data.subset_seed": seed if count else 0,
            "optimizer.learning_rate": rate,
            "transfer.weights": "runs/pretrained",
            "transfer.freeze": "",
            "transfer.thaw.head": np.nan,
            "transfer.thaw.*": np.nan,
            **COLUMNS[method],
            **dict.fromkeys(
                ("train_loss", "train_error", "test_loss", "test_error"),
                ERRORS[method] / (1 + (count or 1000)) ** 0.5 + 0.01 * seed,
            ),
            "parameters": 1000.0,
            "finished": True,
            "diverged": False,
        }
        for target in targets
        for count in examples
        for method in METHODS
        for rate in rates
        for seed in (0, 1, 2)
    ]
    return pd.DataFrame(rows)


def drawn(runs: pd.DataFrame) -> Figure:
    (figure,) = figures(runs, pd.DataFrame()).values()
    return figure


def test_each_method_learns_each_target_from_each_number_of_examples() -> None:
    runs = list(sweep())
    assert len(runs) == 2 * 4 * 4 * 3
    assert len({str(run) for run in runs}) == len(runs)


def test_all_methods_train_for_the_same_steps_on_the_same_examples() -> None:
    fields = ("data.name", "data.per_class", "data.subset_seed", "train.steps", "seed")
    drawn_by_method = [
        [[run.get(field) for field in fields] for run in sweep(methods=(method,))]
        for method in METHODS
    ]
    assert all(drawn == drawn_by_method[0] for drawn in drawn_by_method)


def test_a_batch_is_never_larger_than_the_training_split() -> None:
    (run,) = sweep(("fashion_mnist",), ("from scratch",), (5,), (0,))
    assert run["data.batch_size"] == 25
    others = sweep(("fashion_mnist", "digits"), ("from scratch",), (20, 100, None), (0,))
    assert not any("data.batch_size" in run for run in others)


def test_each_seed_draws_its_own_examples() -> None:
    runs = list(sweep(("digits",), ("fine-tuned",), (5,)))
    assert [(run["seed"], run["data.subset_seed"]) for run in runs] == [(0, 0), (1, 1), (2, 2)]


def test_rates_are_chosen_on_images_and_draws_that_the_experiment_does_not_use() -> None:
    config = load(f"{ROOT / 'configs' / 'transfer_fashion.py'}:rates")
    assert (config.data.train_split, config.data.test_split) == ("train[:80%]", "train[80%:]")
    chosen_on = {run["data.subset_seed"] for run in sweep(**config.sweep.transfer.to_dict())}
    assert not chosen_on & {run.get("data.subset_seed") for run in sweep()}


def test_pretrained_methods_start_from_the_same_weights_and_a_new_head() -> None:
    (scratch,) = sweep(("digits",), ("from scratch",), (5,), (0,))
    assert not any(field.startswith("transfer.") for field in scratch)
    others = [next(sweep(("digits",), (method,), (5,), (0,))) for method in METHODS[1:]]
    starts = {(run["transfer.weights"], run["transfer.head"]) for run in others}
    assert starts == {("runs/pretrained", "new")}


@pytest.mark.parametrize(
    ("target", "count", "examples"),
    [("fashion_mnist", 5, 25), ("fashion_mnist", None, 30_000), ("digits", 20, 200)],
)
def test_thawing_begins_at_fractions_of_the_steps_for_any_length_of_an_epoch(
    target: str, count: int | None, examples: int
) -> None:
    thaw = EXPERIMENT["thaw_epochs"](target, count)
    batch = min(EXPERIMENT["BATCH"], examples)
    steps = [np.ceil(epoch * examples / batch) for epoch in thaw.values()]
    total = EXPERIMENT["STEPS"][count]
    assert steps == [0, total / 4, total / 2]


def test_methods_are_recognized_by_their_configs() -> None:
    runs = table(targets=("digits",), examples=(5,))
    assert method_of(runs).unique().tolist() == list(METHODS)


def test_each_target_has_a_panel_with_a_line_per_method() -> None:
    figure = drawn(table())
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["Fashion-MNIST, the other classes", "handwritten digits"]
    for axes in figure.axes:
        assert {text.get_text() for text in axes.texts} == set(METHODS)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["5", "20", "all"]


def test_draws_are_averaged_and_methods_are_not() -> None:
    figure = drawn(table(targets=("digits",), examples=(5, 20)))
    heights = [line.get_ydata()[0] for line in figure.axes[0].lines if len(line.get_ydata()) == 2]
    expected = [ERRORS[method] / 6**0.5 + 0.01 for method in METHODS]
    assert heights[: len(METHODS)] == pytest.approx(expected)


def test_rates_are_the_axis_if_several_were_tried() -> None:
    axes = drawn(table(examples=(20,), rates=(0.01, 0.1))).axes[0]
    assert axes.get_xlabel() == "learning rate"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.01", "0.1"]


def test_runs_in_progress_draw_nothing() -> None:
    assert figures(table().assign(finished=False), pd.DataFrame()) == {}


def test_diverged_runs_have_a_cross_and_no_error_bar() -> None:
    runs = table(targets=("digits",), examples=(5, 20))
    lost = (runs["data.per_class"] == 20) & (method_of(runs) == "fine-tuned")
    figure = drawn(runs.assign(diverged=lost))
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [round(float(line.get_xdata()[0])) for line in crosses] == [1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["diverged run"]
