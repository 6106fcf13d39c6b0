"""Tests of claims: what decides a verdict, and what is said when nothing does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from resjax.analysis.claims import (
    AGREES,
    DISAGREES,
    NOT_TESTED,
    UNDECIDED,
    Claim,
    compare,
    judge,
    tally,
    trend,
    within,
    worse_and_better,
)
from resjax.analysis.claims_page import claims_page
from resjax.analysis.runs import training_column
from resjax.errors import UserError

ROOT = Path(__file__).parents[2]


def runs_of(errors: dict[int, list[float]], **columns: Any) -> pd.DataFrame:
    """Returns finished runs with the test errors of each depth, one for each seed."""
    rows = [
        {"model.depth": depth, "seed": seed, "test_error": error}
        for depth, values in errors.items()
        for seed, error in enumerate(values)
    ]
    return pd.DataFrame(rows).assign(**({"finished": True, "diverged": False} | columns))


def deeper(runs: pd.DataFrame, expected: Any = "higher", **options: Any) -> Claim:
    return compare(
        runs,
        "Depth hurts",
        "someone",
        "",
        value="test_error",
        treatment={"model.depth": 56},
        control={"model.depth": 20},
        expected=expected,
        **options,
    )


def test_a_clear_difference_decides_a_claim() -> None:
    runs = runs_of({20: [0.10, 0.11, 0.12], 56: [0.30, 0.32, 0.31]})
    claim = deeper(runs)
    assert claim.verdict == AGREES
    assert claim.measured == (
        "56 layers: 31.00 ± 1.00 %; 20 layers: 11.00 ± 1.00 %; "
        "difference +20.00 ± 1.00 points, 95 % interval 17.52 to 22.48 (3 seeds)"
    )
    assert deeper(runs, "lower").verdict == DISAGREES


def test_three_seeds_that_agree_do_not_suffice_if_they_scatter() -> None:
    assert deeper(runs_of({20: [0.1, 0.1, 0.1], 56: [0.11, 0.2, 0.5]})).verdict == UNDECIDED


def test_two_seeds_decide_nothing() -> None:
    assert judge([1.0, 1.0], "higher") == UNDECIDED
    assert judge([1.0, 1.0, 1.0], "higher") == AGREES


def test_seeds_without_a_value_decide_nothing() -> None:
    assert judge([1.0, 1.0, 1.0, np.nan], "higher") == UNDECIDED


def test_both_intervals_must_exclude_zero() -> None:
    # Student's t interval of these contains 0, the bootstrap's does not.
    assert judge([0.1, 1.0, 4.0], "higher") == UNDECIDED


@pytest.mark.parametrize(
    ("differences", "expected", "verdict"),
    [
        ([0.005, 0.0051, 0.005], "higher", DISAGREES),  # higher, but by less than counts
        ([0.03, 0.031, 0.03], "higher", AGREES),
        ([-0.03, -0.031, -0.03], "lower", AGREES),
        ([0.001, -0.002, 0.001], "same", AGREES),
        ([0.03, 0.031, 0.03], "same", DISAGREES),
        ([-0.03, -0.031, -0.03], "same", DISAGREES),
        ([0.001, 0.02, -0.02], "same", UNDECIDED),
    ],
)
def test_a_margin_is_the_smallest_difference_that_counts(
    differences: list[float], expected: Any, verdict: str
) -> None:
    assert judge(differences, expected, margin=0.01) == verdict


def test_no_two_networks_are_the_same_without_a_margin() -> None:
    with pytest.raises(ValueError, match="needs a margin"):
        judge([0.0, 0.0, 0.0], "same")
    with pytest.raises(ValueError, match=r"margin -0\.1: no such expectation"):
        judge([0.0, 0.0, 0.0], "higher", margin=-0.1)


def test_what_was_not_run_was_not_tested() -> None:
    claim = deeper(runs_of({20: [0.1, 0.1, 0.1]}))
    assert (claim.measured, claim.verdict) == ("no run of 56 layers", NOT_TESTED)


def test_what_has_not_ended_was_not_tested() -> None:
    runs = runs_of({20: [0.1, 0.1, 0.1], 56: [0.2, 0.2, 0.2]})
    runs["finished"] = runs["model.depth"] == 20
    assert deeper(runs).verdict == NOT_TESTED
    claim = trend(runs, "", "", "", value="test_error", where={}, expected="higher")
    assert (claim.measured, claim.verdict) == (
        "no runs of all runs that differ in depth",
        NOT_TESTED,
    )


@pytest.mark.parametrize(
    ("deep", "shallow", "verdict"),
    [
        ([True] * 3, [False] * 3, AGREES),
        ([False] * 3, [True] * 3, DISAGREES),
        ([True, True, False], [False] * 3, UNDECIDED),
        ([True] * 3, [True] * 3, UNDECIDED),
    ],
)
def test_a_setting_is_worse_if_all_its_runs_diverged(
    deep: list[bool], shallow: list[bool], verdict: str
) -> None:
    runs = runs_of({20: [0.1] * 3, 56: [0.2] * 3}).assign(diverged=shallow + deep)
    claim = deeper(runs)
    assert claim.verdict == verdict
    assert f"56 layers: {sum(deep)} of 3 runs diverged" in claim.measured


@pytest.mark.parametrize(("lost", "verdict"), [(56, AGREES), (20, DISAGREES)])
def test_a_diverged_run_is_worse_also_where_more_is_better(lost: int, verdict: str) -> None:
    runs = runs_of({20: [0.1] * 3, 56: [0.2] * 3}).rename(columns={"test_error": "test_accuracy"})
    runs = runs.assign(
        diverged=runs["model.depth"] == lost,
        primary_metric="accuracy",
        lower_is_better=False,
        metric_unit="fraction",
    )
    claim = compare(
        *(runs, "", "", ""),
        value="test_accuracy",
        treatment={"model.depth": 56},
        control={"model.depth": 20},
        expected="lower",
    )
    assert claim.verdict == verdict


@pytest.mark.parametrize(
    ("lower_is_better", "expected"), [(True, ("higher", "lower")), (False, ("lower", "higher"))]
)
def test_what_is_worse_depends_on_the_primary_metric(
    lower_is_better: bool, expected: tuple[str, str]
) -> None:
    metric = {"primary_metric": "score", "metric_unit": ""}
    runs = runs_of({20: [0.1]}).assign(lower_is_better=lower_is_better, **metric)
    assert worse_and_better(runs) == expected


@pytest.mark.parametrize(("value", "seeds"), [("test_error", 2), ("sharpness", 3)])
def test_divergence_decides_claims_about_metrics_by_three_seeds_only(
    value: str, seeds: int
) -> None:
    runs = runs_of({20: [0.1] * seeds, 56: [0.2] * seeds}).rename(columns={"test_error": value})
    claim = compare(
        *(runs.assign(diverged=runs["model.depth"] == 56), "", "", ""),
        value=value,
        treatment={"model.depth": 56},
        control={"model.depth": 20},
        expected="higher",
    )
    assert claim.verdict == UNDECIDED


def test_a_trend_uses_all_depths() -> None:
    runs = runs_of({8: [0.1, 0.11, 0.1], 20: [0.2, 0.21, 0.2], 56: [0.3, 0.31, 0.3]})
    claim = trend(runs, "", "", "", value="test_error", where={}, expected="higher")
    assert claim.verdict == AGREES
    assert claim.measured.startswith("8 layers: 10.33 ± 0.58 %; 20 layers: 20.33")
    assert "change per doubling of depth +7.1" in claim.measured


def test_a_trend_with_a_diverged_run_is_undecided() -> None:
    runs = runs_of({8: [0.1, 0.11, 0.1, 0.11], 56: [0.3, 0.31, 0.3, 0.31]})
    runs.loc[7, ["diverged", "test_error"]] = True, 0.9  # three seeds are left
    claim = trend(runs, "", "", "", value="test_error", where={}, expected="higher")
    assert claim.verdict == UNDECIDED
    assert "56 layers: 30.33 ± 0.58 % (1 diverged)" in claim.measured


def test_a_setting_is_not_compared_with_itself() -> None:
    claim = compare(
        *(runs_of({20: [0.1] * 3}), "", "", ""),
        value="test_error",
        treatment={"model.depth": 20},
        control={"model.depth": 20},
        expected="higher",
    )
    assert claim.verdict == NOT_TESTED


def test_the_training_metric_is_of_the_whole_split_if_all_runs_have_it() -> None:
    runs = runs_of({20: [0.1, 0.2]}).assign(train_error=0.3, train_set_error=[0.1, np.nan])
    assert training_column(runs, "error") == "train_error"
    assert training_column(runs.fillna(0.2), "error") == "train_set_error"


def test_verdicts_are_counted_in_words() -> None:
    made = [Claim("", "", "", "", verdict) for verdict in (AGREES, AGREES, DISAGREES, UNDECIDED)]
    assert tally(made) == "Of 4 claims, 2 agree, 1 disagrees and 1 is undecided"
    assert tally(made[:1]) == "Of 1 claim, 1 agrees"


def test_a_folder_without_sweeps_has_no_page_of_claims(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sweep folder here"):
        claims_page(tmp_path / "reslts", ROOT / "experiments")


def test_docs_claims_is_what_the_committed_runs_say() -> None:
    """`make claims` writes the page anew."""
    page = claims_page(ROOT / "experiments" / "results", ROOT / "experiments")
    assert (ROOT / "docs" / "claims.md").read_text() == page


def test_a_claim_on_several_data_sets_has_adjacent_rows(
    sweep_writer: Callable[..., Path], tmp_path: Path
) -> None:
    for name, data in (("a", "digits"), ("b", "fashion_mnist")):
        sweep_writer(tmp_path / name, depths=(8, 56), points=2, data=data)
    rows = claims_page(tmp_path, ROOT / "experiments").splitlines()
    first, second, third, *_ = (row for row in rows if "layers" in row)
    assert first.split("|")[1] == second.split("|")[1] != third.split("|")[1]
    assert "| digits, width 8, 400 steps of 64 images |" in first
    assert "| fashion_mnist, width 8, 400 steps of 64 images |" in second


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ({"lowest": 0.1}, AGREES),
        ({"lowest": 0.1, "highest": 0.3}, AGREES),
        ({"lowest": 0.1, "highest": 0.15}, DISAGREES),
        ({"lowest": 0.205}, UNDECIDED),
        ({"lowest": 0.1, "highest": 0.205}, UNDECIDED),
    ],
)
def test_a_value_lies_within_bounds(bounds: dict[str, float], verdict: str) -> None:
    runs = runs_of({20: [0.2, 0.21, 0.2]})
    claim = within(runs, "", "", "", value="test_error", where={"model.depth": 20}, **bounds)
    assert claim.verdict == verdict
    assert claim.measured == "20.33 ± 0.58 %, 95 % interval 18.90 to 21.77 (3 seeds)"
    absent = within(runs, "", "", "", value="test_error", where={"model.depth": 8}, **bounds)
    assert (absent.measured, absent.verdict) == ("no value of 8 layers", NOT_TESTED)


def test_a_seed_that_lacks_one_of_its_values_leaves_bounds_undecided() -> None:
    runs = pd.concat([runs_of({20: [0.2, 0.21, 0.2]}), runs_of({20: [np.nan, 0.2, 0.2]})])
    claim = within(runs, "", "", "", value="test_error", where={}, lowest=0.1)
    assert claim.verdict == UNDECIDED


def test_one_seed_has_a_value_and_no_interval() -> None:
    runs = runs_of({20: [0.2], 56: [0.3]})
    deep = {"model.depth": 56}
    claim = within(runs, "", "", "", value="test_error", where=deep, lowest=0.1)
    assert (claim.measured, claim.verdict) == ("30.00 % (1 seed)", UNDECIDED)
    assert deeper(runs).measured.endswith("; difference +10.00 points (1 seed)")


def test_a_measured_value_does_not_have_the_unit_of_the_metric() -> None:
    runs = runs_of({20: [1.0, 1.0, 1.0], 56: [3.0, 3.0, 3.0]})
    runs = runs.rename(columns={"test_error": "sharpness"})
    settings = {"treatment": {"model.depth": 56}, "control": {"model.depth": 20}}
    claim = compare(runs, "", "", "", value="sharpness", **settings, expected="higher")
    assert claim.measured.startswith("56 layers: 3 ± 0; 20 layers: 1 ± 0; difference +2 ± 0, ")
