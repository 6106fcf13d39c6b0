"""Tests of values against a position, in panels."""

import numpy as np
import pandas as pd
import pytest

from resjax.analysis.profiles import profiles


def table(**seeds: list[float]) -> pd.DataFrame:
    """Returns the values of several seeds at the positions 0, 1, ..."""
    tables = [pd.DataFrame({"x": range(len(v)), "value": v}) for v in seeds.values()]
    return pd.concat(tables).assign(panel="plain", series=20)


def line(rows: pd.DataFrame, log: bool = False) -> list[list[float]]:
    [axes] = profiles(rows, xlabel="block", ylabel="norm", log=log).axes
    return [[float(x), float(y)] for x, y in axes.lines[0].get_xydata()]


def test_seeds_are_averaged_and_have_a_band() -> None:
    [axes] = profiles(table(a=[1, 2], b=[3, 4]), xlabel="block", ylabel="norm").axes
    assert axes.lines[0].get_xydata().tolist() == [[0, 2], [1, 3]]
    low = axes.collections[0].get_paths()[0].vertices[:, 1].min()
    assert low == pytest.approx(2 - np.sqrt(2))


def test_on_a_logarithmic_axis_the_mean_is_the_geometric_one() -> None:
    assert line(table(a=[1, 10], b=[100, 10]), log=True) == [[0, pytest.approx(10)], [1, 10]]


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_a_point_that_a_seed_lacks_is_left_out(lost: float) -> None:
    assert line(table(a=[1, 2, 3], b=[1, 2, lost])) == [[0, 1], [1, 2]]


def test_panels_and_lines_keep_their_names_and_share_their_axes() -> None:
    rows = pd.concat([table(a=[1, 2]), table(a=[5, 6]).assign(panel="residual", series=56)])
    left, right = profiles(rows, xlabel="block", ylabel="norm", label="{}-layer").axes
    assert [axes.get_title() or axes.get_title("left") for axes in (left, right)] == [
        "plain",
        "residual",
    ]
    assert [[text.get_text() for text in axes.texts] for axes in (left, right)] == [
        ["20-layer"],
        ["56-layer"],
    ]
    assert left.get_ylim() == right.get_ylim()


@pytest.mark.parametrize(("values", "ticks"), [([1.0, 8.0], {1, 2, 5}), ([1.0, 1e6], {1, 1e6})])
def test_a_logarithmic_axis_has_ticks_between_its_decades_if_they_are_few(
    values: list[float], ticks: set[float]
) -> None:
    [axes] = profiles(table(a=values), xlabel="block", ylabel="norm", log=True).axes
    low, high = axes.get_ylim()
    shown = {float(tick) for tick in axes.get_yticks() if low <= tick <= high}
    assert ticks <= shown
    assert len(shown) <= 8


def test_labels_too_long_to_stand_beside_panels_are_in_a_legend() -> None:
    names = {20: "depth 20, shortcut none, norm batch", 56: "depth 56, shortcut none, norm batch"}
    rows = pd.concat([table(a=[1, 2]).assign(series=name) for name in names.values()])
    rows = pd.concat([rows, rows.assign(panel="residual")])
    figure = profiles(rows, xlabel="block", ylabel="norm")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(names.values())
    assert not any(axes.texts for axes in figure.axes)
