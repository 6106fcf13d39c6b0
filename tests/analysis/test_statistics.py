"""Tests of intervals and paired differences."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from resjax.analysis import statistics
from resjax.analysis.statistics import by_seed, estimate, paired_differences, slopes


def table(**columns: object) -> pd.DataFrame:
    """Returns a table of finished runs, one for each seed 0, 1, ... unless a column says else."""
    count = max(len(column) for column in columns.values() if isinstance(column, list))
    described = {"seed": list(range(count)), "finished": True, "diverged": False}
    return pd.DataFrame(described | columns)


def test_students_interval_is_that_of_the_tables() -> None:
    low, high = statistics.t_interval([1.0, 2.0, 3.0])
    assert high == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4)  # t(0.975, 2 degrees)
    assert low + high == pytest.approx(4)


def test_the_bootstrap_of_three_values_is_their_range() -> None:
    assert statistics.bootstrap_interval([4.0, 1.0, 2.0]) == (1, 4)


def test_the_exact_bootstrap_weighs_every_resample() -> None:
    values = [0.0, 1.0, 5.0, 7.0]
    means = sorted(np.mean(chosen) for chosen in itertools.product(values, repeat=4))
    expected = means[math.ceil(0.025 * 256) - 1], means[math.ceil(0.975 * 256) - 1]
    assert statistics.bootstrap_interval(values) == pytest.approx(expected)


def test_many_values_are_resampled_alike_every_time() -> None:
    values = np.random.default_rng(0).normal(size=40)
    low, high = statistics.bootstrap_interval(values)
    assert (low, high) == statistics.bootstrap_interval(values)
    assert (low, high) == pytest.approx(statistics.t_interval(values), abs=0.05)


def test_few_seeds_cover_the_mean_as_often_as_documented() -> None:
    samples = np.random.default_rng(0).normal(size=(2000, 3))
    covered = {
        interval: np.mean([low <= 0 <= high for low, high in map(interval, samples)])
        for interval in (statistics.t_interval, statistics.bootstrap_interval)
    }
    assert covered[statistics.t_interval] == pytest.approx(0.95, abs=0.015)
    assert covered[statistics.bootstrap_interval] == pytest.approx(0.75, abs=0.03)


def test_one_value_has_a_mean_and_no_interval() -> None:
    found = estimate([0.5])
    assert (found.mean, found.seeds) == (0.5, 1)
    assert np.isnan([found.deviation, *found.interval, *found.bootstrap]).all()


def test_values_that_are_not_finite_are_left_out() -> None:
    assert estimate([1.0, math.nan, 3.0, math.inf])[:3] == (2, pytest.approx(math.sqrt(2)), 2)
    assert estimate([]).seeds == 0


def test_a_setting_is_a_value_or_several_or_none() -> None:
    runs = table(**{"model.block": ["basic", "bottleneck", None]})

    def chosen(block: object) -> list[int]:
        return statistics.select(runs, {"model.block": block})["seed"].tolist()

    assert chosen("basic") == [0]
    assert chosen(["basic", "bottleneck"]) == [0, 1]
    assert chosen(None) == [2]
    assert chosen([None, "basic"]) == [0, 2]
    with pytest.raises(KeyError, match=r"model\.blok: no such column"):
        statistics.select(runs, {"model.blok": "basic"})


def test_pairs_agree_in_seed_and_in_all_that_varies_within_a_setting() -> None:
    runs = table(
        seed=[0, 1, 0, 1] * 2,
        **{"model.depth": [20, 20, 56, 56] * 2, "model.shortcut": ["pad"] * 4 + ["none"] * 4},
        test_error=[0.1, 0.2, 0.3, 0.4, 0.15, 0.21, 0.6, 0.8],
    )
    pairs = paired_differences(
        runs, "test_error", {"model.shortcut": "none"}, {"model.shortcut": "pad"}
    )
    assert list(pairs.columns[:2]) == ["seed", "model.depth"]
    assert pairs["difference"].tolist() == pytest.approx([0.05, 0.01, 0.3, 0.4])
    assert by_seed(pairs).to_dict() == pytest.approx({0: 0.175, 1: 0.205})


def test_pairs_agree_in_the_draw_of_the_examples_if_all_configs_name_one() -> None:
    runs = table(
        seed=[0, 0, 0, 0],
        **{"model.depth": [20, 20, 56, 56], "data.subset_seed": [0, 1, 0, 1]},
        test_error=[0.1, 0.2, 0.4, 0.8],
    )
    deep, shallow = {"model.depth": 56}, {"model.depth": 20}
    pairs = paired_differences(runs, "test_error", deep, shallow)
    assert pairs["difference"].tolist() == pytest.approx([0.3, 0.6])
    older = runs.iloc[[0, 2]].assign(**{"data.subset_seed": [0, None]})
    pairs = paired_differences(older, "test_error", deep, shallow)
    assert pairs["difference"].tolist() == pytest.approx([0.3])


def test_what_changes_with_the_setting_need_not_agree() -> None:
    runs = table(
        seed=[0, 1, 0, 1],
        **{"model.depth": [20, 20, 110, 110], "optimizer.warmup_steps": [0, 0, 400, 400]},
        test_error=[0.1, 0.2, 0.2, 0.4],
    )
    pairs = paired_differences(runs, "test_error", {"model.depth": 110}, {"model.depth": 20})
    assert pairs["difference"].tolist() == pytest.approx([0.1, 0.2])


def test_what_one_setting_names_need_not_agree_where_it_varies_in_the_other() -> None:
    runs = table(
        seed=[0, 1, 0, 1],
        **{"model.norm": ["batch", "batch", "none", "none"]},
        **{"optimizer.learning_rate": [0.1, 0.1, 0.1, 0.05]},  # the best of each seed
        test_error=[0.1, 0.2, 0.2, 0.4],
    )
    control = {"model.norm": "batch", "optimizer.learning_rate": 0.1}
    pairs = paired_differences(runs, "test_error", {"model.norm": "none"}, control)
    assert pairs["difference"].tolist() == pytest.approx([0.1, 0.2])


def test_runs_that_cannot_be_told_apart_are_an_error() -> None:
    runs = table(seed=[0, 0, 0], **{"model.depth": [20, 56, 56]}, test_error=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="several runs of 56 layers have seed 0; name what"):
        paired_differences(runs, "test_error", {"model.depth": 56}, {"model.depth": 20})


def test_a_seed_without_all_pairs_is_not_averaged_with_the_others() -> None:
    pairs = pd.DataFrame({"seed": [0, 0, 1], "difference": [0.1, 0.3, 0.1]})
    assert by_seed(pairs).to_dict() == pytest.approx({0: 0.2})


def test_a_seed_with_a_pair_that_has_no_value_has_no_mean() -> None:
    pairs = pd.DataFrame({"seed": [0, 0, 1, 1], "difference": [0.1, math.nan, 0.1, 0.3]})
    assert by_seed(pairs).to_dict() == pytest.approx({0: math.nan, 1: 0.2}, nan_ok=True)


def test_unfinished_runs_form_no_pair_and_diverged_ones_no_difference() -> None:
    runs = table(
        seed=[0, 1, 2] * 2,
        **{"model.depth": [20] * 3 + [56] * 3},
        test_error=[0.1] * 6,
        finished=[True, True, True, True, False, False],
        diverged=[False, False, False, False, True, False],
    )
    pairs = paired_differences(runs, "test_error", {"model.depth": 56}, {"model.depth": 20})
    assert pairs["seed"].tolist() == [0, 1]
    assert pairs["treatment_diverged"].tolist() == [False, True]
    assert pairs["difference"].isna().tolist() == [False, True]


def test_a_slope_is_the_change_for_a_doubling() -> None:
    depths = [8, 16, 32, 8, 16]
    runs = table(
        seed=[0, 0, 0, 1, 1], **{"model.depth": depths}, test_error=np.log2(depths).tolist()
    )
    assert slopes(runs, "test_error", "model.depth").to_dict() == pytest.approx({0: 1.0})


def test_a_seed_with_an_unfinished_or_a_diverged_run_has_no_slope() -> None:
    runs = table(
        seed=[0, 0, 1, 1, 2, 2],
        **{"model.depth": [8, 16] * 3},
        test_error=[0.1, 0.2] * 3,
        finished=[True, True, True, False, True, True],
        diverged=[False, False, False, False, False, True],
    )
    assert slopes(runs, "test_error", "model.depth").to_dict() == pytest.approx({0: 0.1})


def test_intervals_are_those_of_finished_runs_that_did_not_diverge() -> None:
    runs = table(
        test_error=[0.1, 0.3, 0.8, 0.9],
        finished=[True, True, False, True],
        diverged=[False, False, False, True],
    )
    [row] = statistics.intervals(runs).to_dict("records")
    assert (row["metric"], row["seeds"], row["mean"]) == ("test_error", 2, pytest.approx(0.2))


def test_pairs_with_a_diverged_run_are_counted_and_not_averaged() -> None:
    runs = table(
        seed=[0, 1, 0, 1],
        **{"data.per_class": [None, None, 5.0, 5.0]},
        test_error=[0.1, 0.2, 0.4, 0.9],
        train_error=[0.1, 0.2, 0.4, 0.9],
        diverged=[False, False, False, True],
    )
    for row in statistics.differences(runs).to_dict("records"):
        assert (row["value"], row["baseline"]) == (5, None)
        assert (row["pairs"], row["diverged"], row["mean"]) == (2, 1, pytest.approx(0.3))
    assert len(statistics.differences(runs)) == 2


def test_a_run_that_was_trained_twice_leaves_its_field_out_of_the_table() -> None:
    runs = table(seed=[0, 0, 0], **{"model.depth": [20, 56, 56]}, test_error=[0.1, 0.2, 0.3])
    runs["train_error"] = runs["test_error"]
    assert statistics.differences(runs).empty
    rows = statistics.differences(runs.head(2))
    assert rows["mean"].tolist() == pytest.approx([0.1, 0.1])
