"""Tests of the names, panels, lines and colors of settings."""

import pandas as pd
import pytest

from resjax.analysis.lines import divide, extend
from resjax.analysis.palette import LEGIBLE, PAPER, colors, contrast, dark, legible
from resjax.analysis.setting_names import describe_setting, setting_names


def table(**columns: list[object]) -> pd.DataFrame:
    """Returns a table of runs with these config fields, whose dots are two underscores."""
    runs = pd.DataFrame({name.replace("__", "."): values for name, values in columns.items()})
    return runs.assign(folder=[f"run{index}" for index in runs.index], seed=0)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"model__depth": [20, 56], "model__shortcut": ["none", "pad"]},
            ["plain, 20 layers", "residual, 56 layers"],
        ),
        (
            {"model__shortcut": ["none", "pad", "project"]},
            ["plain", "residual (pad)", "residual (project)"],
        ),
        ({"model__norm": ["batch", "none"]}, ["BN", "no norm"]),
        ({"optimizer__learning_rate": [0.1, 1e-5]}, ["learning rate 0.1", "learning rate 1e-05"]),
        ({"data__flip": [True, False]}, ["flip", "no flip"]),
        (
            {"model__block": ["basic", "relu_preact_basic"]},
            ["basic blocks", "relu preact basic blocks"],
        ),
        # The rate is determined by the norm, and says nothing more.
        (
            {"model__norm": ["batch", "none"] * 2, "optimizer__learning_rate": [0.1, 0.01] * 2},
            ["BN", "no norm"] * 2,
        ),
        ({"model__depth": [20, 20]}, ["all runs", "all runs"]),
    ],
)
def test_settings_have_the_names_that_people_use(
    columns: dict[str, list[object]], expected: list[str]
) -> None:
    assert setting_names(table(**columns)).tolist() == expected


def test_settings_that_differ_never_share_a_name() -> None:
    runs = table(optimizer__learning_rate=[0.1, 0.10000001, 0.1])
    names = setting_names(runs)
    assert names[0] == names[2] != names[1]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"model.depth": 56, "model.shortcut": "none"}, "plain, 56 layers"),
        ({"model.depth": [20, 110], "schedule": "warm-up"}, "warm-up, 20 layers and 110 layers"),
        ({"model.norm": {"none", "batch"}, "seed": 3}, "BN and no norm, seed 3"),
        ({}, "all runs"),
    ],
)
def test_the_setting_of_a_claim_has_such_a_name_too(
    where: dict[str, object], expected: str
) -> None:
    assert describe_setting(where) == expected


def test_a_number_makes_the_lines_and_everything_else_the_panels() -> None:
    lines = divide(
        table(model__depth=[8, 56, 8, 56], model__shortcut=["none", "none", "pad", "pad"])
    )
    assert lines["panel"].tolist() == ["plain", "plain", "residual", "residual"]
    assert lines["label"].tolist() == ["8 layers", "56 layers"] * 2
    assert lines["name"].tolist()[1] == "plain, 56 layers"
    assert lines["color"].nunique() == 2  # a depth has the same color in both panels


def test_many_panels_become_one() -> None:
    lines = divide(table(model__depth=[8] * 9, model__block=[f"my:Block{i}x" for i in "abcdefghi"]))
    assert lines["panel"].unique().tolist() == ["all runs"]
    assert lines["color"].nunique() == 9


def test_a_run_without_measurements_is_in_the_line_of_its_setting() -> None:
    runs = table(model__depth=[8, 56, 8])
    drawn = divide(runs).iloc[:2][["folder", "panel", "label", "color"]]
    assert extend(drawn, runs)["label"].tolist() == ["8 layers", "56 layers", "8 layers"]
    assert extend(drawn.iloc[:1], runs) is None
    assert extend(drawn.assign(label="both"), runs) is None


def test_numbers_in_texts_order_their_colors() -> None:
    ordered, numbers = colors(["56 layers", "8 layers", "20 layers"]), colors([56, 8, 20])
    assert ordered == {f"{number} layers": color for number, color in numbers.items()}
    assert colors(["plain, 8", "residual, 56"])["plain, 8"] == colors(["a"])["a"]


@pytest.mark.parametrize(
    "color", ["#f79143", "#0d0887", "#e69f00", "#56b4e9", "#404040", "#000000"]
)
def test_text_of_each_color_is_legible_on_both_papers(color: str) -> None:
    assert contrast(legible(color), PAPER["light"]) >= LEGIBLE
    assert contrast(dark(color), PAPER["dark"]) >= LEGIBLE


def test_paper_and_ink_are_exchanged_in_the_dark() -> None:
    assert dark("#ffffff") == PAPER["dark"]
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
