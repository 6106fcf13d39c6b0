"""Tests of final values against depth or by category, with published values beside them."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
from matplotlib.axes import Axes

from resjax.analysis import figures as draw
from resjax.analysis.final_values import FAILS, Published, by_category, by_depth

PAPER = Published("Paper", "110 layers", {"identity": 6.61, "gate": (8.7, 0.5), "none": FAILS})


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with draw.style():
        yield


def runs(
    names: tuple[str, ...] = ("identity", "gate", "none"),
    networks: tuple[str, ...] = ("110 layers",),
    **columns: Any,
) -> pd.DataFrame:
    """Returns two seeds of each name and network, with test errors of 10 and 12 %."""
    rows = [
        {"name": name, "network": network, "seed": seed, "test_error": 0.1 + 0.02 * seed}
        for name in names
        for network in networks
        for seed in (0, 1)
    ]
    common = {"data.name": "cifar10", "train_error": 0.0, "parameters": 1.0, "model.depth": 110}
    table = pd.DataFrame(rows).assign(**common, finished=True, diverged=False)
    return table.assign(**columns)


def markers(axes: Axes, marker: str) -> list[tuple[float, float]]:
    """Returns the rounded positions of the markers of a kind."""
    return [
        (round(float(x), 3), round(float(y), 3))
        for line in axes.lines
        if line.get_marker() == marker
        for x, y in line.get_xydata()
    ]


def legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.figure.legends[0].get_texts()]


def test_each_category_has_a_row_with_its_mean_and_deviation() -> None:
    [axes] = by_category(runs(), category="name").axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["identity", "gate", "none"]
    assert axes.yaxis_inverted()
    test, train = (0.11, 0.0), (0.0, 0.0)
    assert markers(axes, "o") == [(t[0], row) for row in (0, 1, 2) for t in (train, test)]
    low, high = axes.containers[1].lines[2][0].get_segments()[0][:, 0]
    assert high - low == pytest.approx(2 * 0.02 / 2**0.5)


def test_series_of_a_category_do_not_cover_each_other() -> None:
    table = runs(networks=("20 layers", "110 layers"))
    [axes] = by_category(table, category="name", series="network").axes
    assert len(set(markers(axes, "o"))) == 3 * 2 * 2
    assert legend(axes) == ["test", "training", "20 layers", "110 layers"]


def test_published_values_of_the_same_data_and_network_are_below_the_measured_ones() -> None:
    [axes] = by_category(runs(), category="name", series="network", published=[PAPER]).axes
    assert markers(axes, "D") == [(0.066, 0.18), (0.087, 1.18)]
    assert markers(axes, ">") == [(1.0, 2.18)]  # at the edge, whatever the limits are
    assert legend(axes)[2:] == ["published: fails to train", "Paper"]


@pytest.mark.parametrize("change", [{"data.name": "digits"}, {"network": "20 layers"}])
def test_published_values_of_other_data_or_networks_have_their_own_panel_and_axis(
    change: dict[str, str],
) -> None:
    published = PAPER._replace(setting="CIFAR-10, 110 layers")
    table = runs(**change)
    left, right = by_category(table, category="name", series="network", published=[published]).axes
    assert not markers(left, "D")
    assert markers(right, "D") == [(0.066, 0), (0.087, 1)]
    assert right.get_title("left") == "published, CIFAR-10, 110 layers"
    assert left.get_xlim() != right.get_xlim()
    assert left.get_ylim() == right.get_ylim()


def test_published_values_of_another_metric_are_not_drawn() -> None:
    other = PAPER._replace(metric="accuracy")
    assert len(by_category(runs(), category="name", published=[other]).axes) == 1


def test_categories_that_were_not_run_are_not_drawn() -> None:
    table = runs(names=("gate",), **{"data.name": "digits"})
    _, right = by_category(table, category="name", series="network", published=[PAPER]).axes
    assert markers(right, "D") == [(0.087, 0)]
    assert "published: fails to train" not in legend(right)


def test_diverged_runs_of_a_category_have_a_cross_at_the_worst_edge() -> None:
    table = runs()
    [axes] = by_category(table.assign(diverged=table["name"] == "none"), category="name").axes
    assert markers(axes, "x") == [(1.0, 2.0)]
    assert len(markers(axes, "o")) == 4
    assert "diverged run" in legend(axes)


def test_categories_have_the_order_that_is_asked_for() -> None:
    [axes] = by_category(runs(), category="name", order=("none", "gate", "other", "identity")).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["none", "gate", "identity"]


def test_published_values_by_depth_are_joined_in_their_own_panel_and_labeled() -> None:
    published = [
        Published("Paper", "residual", {20: 8.75, 110: 6.61}),
        Published("Paper", "plain", {20: 9.8, 110: FAILS}),
        Published("Paper", "of no run", {20: 9.0}),
    ]
    table = runs(networks=("plain", "residual"), **{"data.name": "digits"})
    _, right = by_depth(table, series="network", published=published).axes
    assert markers(right, "D") == [(20.0, 0.087), (110.0, 0.066), (20.0, 0.098)]
    assert markers(right, "^") == [(110.0, 1.0)]
    assert {text.get_text() for text in right.texts} == {"plain", "residual"}
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["20", "110"]


def test_published_values_by_depth_are_right_of_the_measured_ones() -> None:
    published = [Published("Paper", "residual", {20: 8.75, 110: 6.61})]
    table = runs(networks=("residual",))
    [axes] = by_depth(table, series="network", published=published).axes
    assert markers(axes, "D") == [(pytest.approx(113.3), 0.066)]


def test_the_training_metric_is_that_of_the_evaluated_split_if_the_runs_have_it() -> None:
    [axes] = by_category(runs(names=("gate",), train_set_error=0.05), category="name").axes
    assert markers(axes, "o") == [(0.05, 0.0), (0.11, 0.0)]
