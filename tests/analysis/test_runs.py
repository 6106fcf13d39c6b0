"""Tests of the tables of runs, measurements and layers, and of their statistics."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import resjax
from resjax.analysis.runs import (
    NO_EFFECT,
    REPEATS,
    describe,
    load_curves,
    load_measurements,
    load_runs,
    load_sweeps,
    name_settings,
    primary_metrics,
    status,
    summarize,
    varying,
)
from resjax.config.schema import FIELDS
from resjax.run_files import Metric

Maker = Callable[..., Path]


def test_a_sweep_has_one_row_per_run_in_the_order_of_its_plan(make_sweep: Maker) -> None:
    root = make_sweep(depths=(56, 8), seeds=(1, 0))
    runs = load_runs(root)
    named = [run["folder"] for run in json.loads((root / "sweep.json").read_text())["runs"]]
    assert [str(Path(folder).relative_to(root)) for folder in runs["folder"]] == named
    assert runs["finished"].all()
    assert set(runs["model.depth"]) == {56, 8}


def test_runs_of_earlier_launches_are_not_loaded(make_sweep: Maker, make_run: Maker) -> None:
    root = make_sweep(depths=(8,))
    make_run("sweep/runs/earlier", depth=20)
    assert 20 not in set(load_runs(root)["model.depth"])


def test_a_planned_run_has_no_row_before_it_starts(make_sweep: Maker) -> None:
    root = make_sweep(depths=(8,), shortcuts=("pad",))
    plan = json.loads((root / "sweep.json").read_text())
    plan["runs"].append({"folder": "runs/later", "overrides": {}})
    (root / "sweep.json").write_text(json.dumps(plan))
    assert len(load_runs(root)) == 3


def test_a_run_folder_has_one_row(make_run: Maker) -> None:
    [folder] = load_runs(make_run("run", depth=20))["folder"]
    assert Path(folder).name == "run"


def test_folders_without_a_plan_are_in_natural_order(make_run: Maker, tmp_path: Path) -> None:
    for depth in (110, 20, 8):
        make_run(f"depth{depth}", depth=depth)
    assert load_runs(tmp_path)["model.depth"].tolist() == [8, 20, 110]


def test_nested_config_and_provenance_become_columns(make_run: Maker) -> None:
    run = load_runs(make_run("run", depth=20, seed=3)).iloc[0]
    assert run["seed"] == 3
    assert run["model.shortcut"] == "pad"
    assert run["optimizer.boundaries"] == (0.5, 0.75)
    assert run["commit"].startswith("1f2e3d4c")
    assert run["start"] == "2026-01-05T10:00:03+00:00"


def test_an_unfinished_run_has_a_row_without_results(make_run: Maker) -> None:
    run = load_runs(make_run("run", {"stop": 0.5})).iloc[0]
    assert not run["finished"]
    assert math.isnan(run["test_error"])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_runs(tmp_path / "nowhere")


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runs here"):
        load_runs(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "summary.json", "provenance.json"])
@pytest.mark.parametrize("content", ['{"seed": ', "[]", "\xff"])
def test_a_damaged_file_is_named(make_run: Maker, name: str, content: str) -> None:
    folder = make_run("run")
    (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{name}: damaged"):
        load_runs(folder)


def test_a_damaged_plan_is_named(make_sweep: Maker) -> None:
    root = make_sweep(depths=(8,))
    (root / "sweep.json").write_text('{"runs": [{}]}')
    with pytest.raises(ValueError, match=r"sweep\.json: damaged"):
        load_runs(root)


def test_curves_contain_all_measurements(make_run: Maker) -> None:
    curves = load_curves(make_run("run", {"points": 10}))
    assert curves.groupby("split").size().to_dict() == {"test": 10, "train": 10}
    assert curves["step"].max() == 400
    assert curves.loc[curves["split"] == "train", "learning_rate"].notna().all()
    assert curves.loc[curves["split"] == "test", "learning_rate"].isna().all()


def test_curves_of_a_table_are_those_of_its_runs(make_sweep: Maker) -> None:
    runs = load_runs(make_sweep(points=5)).head(2)
    assert set(load_curves(runs)["folder"]) == set(runs["folder"])


def test_an_incomplete_last_line_is_ignored(make_run: Maker) -> None:
    folder = make_run("run", {"points": 10})
    metrics = folder / "metrics.jsonl"
    whole = load_curves(folder)
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 500, "split": "tr')
    pd.testing.assert_frame_equal(load_curves(folder), whole)


def test_a_complete_last_line_without_newline_counts(make_run: Maker) -> None:
    folder = make_run("run", {"points": 10})
    metrics = folder / "metrics.jsonl"
    whole = load_curves(folder)
    metrics.write_bytes(metrics.read_bytes().removesuffix(b"\n"))
    pd.testing.assert_frame_equal(load_curves(folder), whole)


@pytest.mark.parametrize("damage", ['{"step": 4', "[1]", '{"split": "test"}', "", "\xff"])
def test_a_damaged_line_is_named_by_its_number(make_run: Maker, damage: str) -> None:
    folder = make_run("run", {"points": 10})
    lines = (folder / "metrics.jsonl").read_text().split("\n")
    lines[6] = damage
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="latin-1")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: damaged, line 7"):
        load_curves(folder)


def test_null_is_loaded_as_nan(make_run: Maker) -> None:
    curves = load_curves(make_run("run", {"diverge": 0.5}))
    assert np.isnan(curves.loc[curves["step"] > 200, "loss"]).all()
    assert curves.loc[curves["step"] <= 200, "loss"].notna().all()


def test_the_later_of_two_measurements_of_a_step_counts(make_run: Maker) -> None:
    folder = make_run("run", {"points": 10})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 400, "split": "test", "loss": 1.0, "error": 0.123}\n')
    curves = load_curves(folder)
    last = curves[(curves["step"] == 400) & (curves["split"] == "test")]
    assert last["error"].tolist() == [0.123]


def test_a_run_without_measurements_has_no_curve(make_run: Maker) -> None:
    folder = make_run("run")
    (folder / "metrics.jsonl").unlink()
    assert load_curves(folder).empty


def test_other_logged_values_are_columns(make_run: Maker) -> None:
    folder = make_run("run", {"points": 2})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 401, "split": "test", "loss": 1, "error": 0.1, "top5_error": 0.01}\n')
    assert load_curves(folder)["top5_error"].max() == 0.01


def test_fields_that_change_no_result_separate_no_runs(make_sweep: Maker) -> None:
    runs = load_runs(make_sweep())
    for name in ("diagnostics.every", "data.workers"):
        runs[name] = range(len(runs))
    assert varying(runs) == ["model.depth", "model.shortcut"]


def test_runs_of_a_group_differ_only_in_the_seed(make_sweep: Maker) -> None:
    runs = load_runs(make_sweep())
    assert varying(runs) == ["model.depth", "model.shortcut"]
    results = summarize(runs)
    assert len(results) == 6
    assert (results["seeds"] == 3).all()


def test_runs_with_different_draws_of_examples_form_a_group(make_sweep: Maker) -> None:
    runs = load_runs(make_sweep())
    runs["data.subset_seed"] = runs["seed"]
    assert varying(runs) == ["model.depth", "model.shortcut"]
    assert (summarize(runs)["seeds"] == 3).all()


def test_runs_are_named_by_the_first_setting_that_they_have(make_sweep: Maker) -> None:
    runs = load_runs(make_sweep())
    settings = {
        "deep and plain": {"model.depth": 56, "model.shortcut": "none"},
        "plain": {"model.shortcut": "none"},
        "another": {"model.shortcut_options.factor": 0.5},
    }
    named = runs.assign(name=name_settings(runs, settings)).groupby("name")
    chosen = {name: {*zip(g["model.depth"], g["model.shortcut"], strict=True)} for name, g in named}
    plain = {(depth, "none") for depth in runs["model.depth"]}
    assert chosen.pop("deep and plain") == {(56, "none")}
    assert chosen.pop("plain") == plain - {(56, "none")}
    assert chosen == {
        f"depth {depth}, shortcut {shortcut}": {(depth, shortcut)}
        for depth, shortcut in zip(runs["model.depth"], runs["model.shortcut"], strict=True)
        if shortcut != "none"
    }


def test_every_field_that_changes_results_separates_groups(make_sweep: Maker) -> None:
    runs = load_runs(make_sweep())
    free = {*REPEATS, *NO_EFFECT, "seed", "sweep", "model.name"}
    for field in FIELDS.keys() - free:
        if not field.startswith("diagnostics."):
            told = runs.assign(**{field: range(len(runs))})
            assert field in varying(told)
            assert (summarize(told)["seeds"] == 1).all()
    assert set(REPEATS) == {"data.subset_seed"}


def test_means_and_sample_deviations_are_over_seeds(make_sweep: Maker) -> None:
    runs = load_runs(make_sweep())
    result = summarize(runs).iloc[0]
    errors = runs.loc[
        (runs["model.depth"] == result["model.depth"])
        & (runs["model.shortcut"] == result["model.shortcut"]),
        "test_error",
    ].to_numpy()
    assert result["test_error_mean"] == pytest.approx(errors.mean())
    assert result["test_error_std"] == pytest.approx(
        math.sqrt(((errors - errors.mean()) ** 2).sum() / (len(errors) - 1))
    )


def test_a_single_seed_has_no_deviation(make_run: Maker) -> None:
    result = summarize(load_runs(make_run("run"))).iloc[0]
    assert result["seeds"] == 1
    assert math.isnan(result["test_error_std"])


def test_failures_are_counted_and_not_averaged(make_sweep: Maker) -> None:
    runs = load_runs(
        make_sweep(
            depths=(8,),
            shortcuts=("pad",),
            depth8_pad_seed0={"stop": 0.5},
            depth8_pad_seed1={"diverge": 0.5},
        )
    )
    assert status(runs).tolist() == ["unfinished", "diverged", "finished"]
    result = summarize(runs).iloc[0]
    assert (result["seeds"], result["unfinished"], result["diverged"]) == (1, 1, 1)
    assert result["test_error_mean"] == runs["test_error"].iloc[2]


def test_a_diverged_run_says_when_and_why(make_run: Maker, tmp_path: Path) -> None:
    make_run("recorded", {"diverge": 0.5, "points": 4})
    make_run("stopped", {"stop": 0.5, "diverge": 0.25, "points": 4})
    said = make_run("said", {"stop": 0.5, "points": 4})
    (said / "diverged.json").write_text('{"step": 250, "reason": "a reason"}')
    make_run("killed", {"stop": 0.5, "points": 4})
    recovered = make_run("recovered", {"points": 4})
    text = (recovered / "metrics.jsonl").read_text()
    nothing = '{"step": 50, "split": "train", "loss": null, "error": null, "skipped": 1.0}\n'
    (recovered / "metrics.jsonl").write_text(nothing + text)
    runs = load_runs(tmp_path).set_index("folder").rename(lambda name: Path(name).name)
    assert status(runs).to_dict() == {
        "killed": "unfinished",
        "recorded": "diverged",
        "recovered": "finished",
        "said": "diverged",
        "stopped": "diverged",
    }
    assert runs["finished"].to_dict()["recorded"]
    assert runs["diverged_step"].dropna().to_dict() == {
        "recorded": 300,
        "said": 250,
        "stopped": 200,
    }
    reasons = runs["diverged_reason"].dropna().to_dict()
    assert reasons["said"] == "a reason"
    assert reasons["recorded"] == reasons["stopped"] == "the train loss is not finite"
    assert summarize(runs.reset_index(names="folder"))["diverged"].sum() == 3


def test_an_option_of_some_runs_distinguishes_groups(make_run: Maker, tmp_path: Path) -> None:
    make_run("a")
    folder = make_run("b")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["block_options"] = {"groups": 4}
    (folder / "config.json").write_text(json.dumps(config))
    runs = load_runs(tmp_path)
    assert len(summarize(runs)) == 2
    assert describe(runs, varying(runs)).tolist() == ["all runs", "groups 4.0"]


def test_descriptions_name_the_differences(make_sweep: Maker) -> None:
    runs = load_runs(make_sweep(seeds=(0,)))
    assert describe(runs, varying(runs)).tolist()[:2] == [
        "depth 8, shortcut none",
        "depth 8, shortcut pad",
    ]


def test_committed_results_have_todays_field_names() -> None:
    runs = load_runs(Path(__file__).parents[2] / "experiments" / "results" / "transfer_rates")
    assert set(runs["data.subset_seed"]) == {10}
    assert (runs["transfer.layer_decay"] == 1).all()
    assert status(runs).eq("finished").all()
    assert runs["test_error"].between(0, 1).all()


def test_a_run_names_its_primary_metric_which_was_the_error_before(
    make_tasks: Maker, make_run: Maker
) -> None:
    root = make_tasks()
    make_run("old")
    runs = load_runs(root).set_index("primary_metric")
    assert runs["lower_is_better"].to_dict() == {"angle": True, "accuracy": False, "error": True}
    assert runs["metric_unit"].to_dict() == {
        "angle": "rad",
        "accuracy": "fraction",
        "error": "fraction",
    }
    assert runs["best_test_accuracy"].notna().tolist() == [True, False, False]
    assert runs["test_angle"].notna().tolist() == [False, True, False]


def test_runs_with_different_metrics_share_a_table(make_tasks: Maker) -> None:
    root = make_tasks()
    runs, curves = load_runs(root), load_curves(root)
    assert [metric.name for metric in primary_metrics(runs)] == ["accuracy", "angle"]
    assert primary_metrics(curves) == primary_metrics(runs)
    assert status(runs).tolist() == ["finished", "finished"]
    results = summarize(runs, by=["model.depth"]).set_index("model.depth")
    assert results["seeds"].tolist() == [1, 1]
    assert results["test_angle_mean"].notna().to_dict() == {20: False, 8: True}
    assert curves.groupby("primary_metric")["accuracy"].count().to_dict() == {
        "accuracy": 10,
        "angle": 0,
    }


def test_a_damaged_description_of_the_metric_is_named(make_run: Maker) -> None:
    folder = make_run("run")
    (folder / "provenance.json").write_text('{"primary_metric": {"name": 3}}')
    with pytest.raises(ValueError, match=r"provenance\.json: damaged, primary_metric"):
        load_runs(folder)


@pytest.mark.parametrize(
    ("metric", "label", "text"),
    [
        (Metric("error", unit="fraction"), "error (%)", "12.34 ± 0.50"),
        (Metric("angle", True, "rad"), "angle (rad)", "0.1234 ± 0.005"),
        (Metric("mAP", False, ""), "mAP", "0.1234 ± 0.005"),
    ],
)
def test_fractions_are_shown_in_per_cent_and_other_metrics_in_their_unit(
    metric: Metric, label: str, text: str
) -> None:
    assert metric.label == label
    assert metric.format(0.1234, 0.005) == text
    assert metric.format(math.nan) == "–"


def write_layers(folder: Path, *lines: dict[str, object]) -> Path:
    (folder / "layers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_layers_are_in_network_order_with_a_column_per_diagnostic(
    make_run: Maker,
) -> None:
    folder = write_layers(
        make_run("run"),
        {"step": 10, "layer": "stem/kernel", "gradient_norm": 2, "update_ratio": 0.1},
        {"step": 10, "layer": "head/kernel", "gradient_norm": None},
        {"step": 10, "layer": "head/kernel", "update_ratio": 0.2},
        {"step": 20, "layer": "stem/kernel", "gradient_norm": 1.0},
    )
    layers = resjax.load_layers(folder)
    assert layers.columns.tolist() == ["folder", "step", "layer", "gradient_norm", "update_ratio"]
    assert layers["layer"].tolist() == ["stem/kernel", "head/kernel", "stem/kernel"]
    assert layers["step"].tolist() == [10, 10, 20]
    np.testing.assert_array_equal(layers["gradient_norm"], [2, np.nan, 1])
    np.testing.assert_array_equal(layers["update_ratio"], [0.1, 0.2, np.nan])
    pd.testing.assert_frame_equal(resjax.load_layers(load_runs(folder)), layers)


def test_later_values_of_a_repeated_step_count(make_run: Maker) -> None:
    folder = write_layers(
        make_run("run"),
        {"step": 10, "layer": "stem", "norm": 1.0},
        {"step": 10, "layer": "stem", "norm": 3.0},
        {"step": 10, "layer": "head", "norm": 4.0},
    )
    with (folder / "layers.jsonl").open("a") as file:
        file.write('{"step": 20, "layer": "st')  # being written
    layers = resjax.load_layers(folder)
    assert dict(zip(layers["layer"], layers["norm"], strict=True)) == {"stem": 3.0, "head": 4.0}


def test_a_damaged_line_of_layers_is_named_by_its_number(make_run: Maker) -> None:
    folder = write_layers(make_run("run"), {"step": 10, "norm": 1.0}, {"step": 10, "layer": "stem"})
    with pytest.raises(ValueError, match=r"layers\.jsonl: damaged, line 1"):
        resjax.load_layers(folder)


def test_runs_without_diagnostics_have_no_layers(make_sweep: Maker) -> None:
    layers = resjax.load_layers(make_sweep(points=1))
    assert layers.empty
    assert layers.columns.tolist() == ["folder", "step", "layer"]


def test_measurements_have_a_row_for_each_that_measure_returned(make_sweep: Maker) -> None:
    root = make_sweep(points=2, depths=(8,), shortcuts=("pad",), seeds=(0, 1, 2))
    first, second, third = sorted((root / "runs").iterdir())
    rows = [{"block": "a", "error": 0.5}, {"block": "b", "error": None}, {"tau": 1, "ok": True}]
    for run, steps in ((first, 400), (second, 300)):  # the second has gone on since
        content = {"step": steps, "rows": rows, "code": "c", "checkpoint": "d"}
        (run / "measurements").mkdir()
        (run / "measurements" / "lesions.json").write_text(json.dumps(content))
    table = load_measurements(root, "lesions")
    assert table["folder"].tolist() == [str(first)] * 3
    assert [*table] == ["folder", "block", "error", "tau", "ok"]
    assert table["error"].isna().tolist() == [False, True, True]
    with pytest.raises(ValueError, match=r"^'lesion' has measured none .*; did you mean 'lesions'"):
        load_measurements(root, "lesion")
    with pytest.raises(ValueError, match=r"^'other' has .*; they were measured by lesions$"):
        load_measurements(root, "other")
    (third / "measurements").symlink_to(first / "measurements")
    with pytest.raises(ValueError, match=r"lesions\.json is a link out of .*, and is not read"):
        load_measurements(root, "lesions")
    (third / "measurements").unlink()
    (second / "measurements" / "lesions.json").write_text("[]")
    with pytest.raises(ValueError, match=r"lesions\.json: damaged, not a JSON object"):
        load_measurements(root, "lesions")


def test_the_table_of_measurements_is_empty_if_nothing_is_measured(make_run: Maker) -> None:
    table = load_measurements(make_run("run"), "lesions")
    assert table.empty
    assert [*table] == ["folder"]


def test_runs_of_several_sweeps_know_their_sweep(
    sweep_writer: Maker, make_run: Maker, tmp_path: Path
) -> None:
    sweeps = [
        sweep_writer(tmp_path / name / "sweep", depths=(depth,), seeds=(0,), points=2)
        for name, depth in (("a", 8), ("b", 20))
    ]
    alone = make_run("alone", {"points": 2}, depth=56)
    runs = load_runs(*sweeps, alone)
    assert runs["sweep"].dropna().tolist() == ["a/sweep", "a/sweep", "b/sweep", "b/sweep"]
    assert len(runs) == 5
    assert load_runs(tmp_path)["sweep"].nunique() == 3  # the folder itself holds `alone`
    assert "sweep" not in load_runs(sweeps[0])
    assert "sweep" not in load_runs(sweeps[0], sweeps[0] / "runs")


def test_names_of_sweeps_are_their_last_parts(sweep_writer: Maker, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("x/one", "two")]
    for depth, path in zip((8, 20), paths, strict=True):
        sweep_writer(path, depths=(depth,), seeds=(0,), points=2)
    assert list(load_sweeps(*paths).by_name) == ["one", "two"]


def test_a_run_in_two_sweeps_is_one_row(sweep_writer: Maker, tmp_path: Path) -> None:
    unfinished = {"depth8_pad_seed0": {"stop": 0.5}}
    first = sweep_writer(tmp_path / "first", depths=(8,), points=4, **unfinished)
    second = sweep_writer(tmp_path / "second", depths=(8, 20), points=4, seeds=(0, 1))
    for file in (second / "runs").glob("*/config.json"):
        config = json.loads(file.read_text())
        config["train"]["evaluate_train"] = True  # changes no result
        file.write_text(json.dumps(config))
    edited = second / "runs" / "depth8-none-seed1" / "summary.json"
    edited.write_text(json.dumps(json.loads(edited.read_text()) | {"test_loss": 9.0}))
    told: list[str] = []
    sweeps = load_sweeps(first, second, warn=told.append)
    assert not sweeps.runs.duplicated(["model.depth", "model.shortcut", "seed"]).any()
    assert sweeps.runs["finished"].all()
    assert sweeps.runs["sweep"].value_counts().to_dict() == {"first": 5, "second": 5}
    assert {name: len(each.runs) for name, each in sweeps.by_name.items()} == {
        "first": 6,
        "second": 8,
    }
    assert told == [
        "4 runs that another sweep has too, with the same config and seed: 1 of first (in second), "
        "3 of second (in first); 2 of them ended otherwise there"
    ]
    assert summarize(sweeps.runs)["seeds"].tolist() == [3, 3, 2, 2]


def test_a_run_trained_twice_in_one_sweep_has_two_rows(sweep_writer: Maker, tmp_path: Path) -> None:
    root = sweep_writer(tmp_path / "a", depths=(8,), seeds=(0,), points=2)
    (root / "sweep.json").unlink()
    shutil.copytree(root / "runs" / "depth8-pad-seed0", root / "runs" / "again")
    other = sweep_writer(tmp_path / "b", depths=(8,), seeds=(0,), points=2)
    assert load_runs(root, other)["sweep"].tolist() == ["a"] * 3


def test_fields_that_differ_between_sweeps_are_one_column(
    sweep_writer: Maker, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"depths": (8, 20), "points": 2, "seeds": (0,)}
    first = sweep_writer(tmp_path / "first", **options)
    second = sweep_writer(tmp_path / "second", data="cifar10", **options)
    assert varying(load_runs(first, second)) == ["model.depth", "model.shortcut", "data.name"]
    for file in (second / "runs").glob("*/config.json"):
        config = json.loads(file.read_text())
        del config["model"]["bn_epsilon"]  # a field that the other sweep has
        file.write_text(json.dumps(config))
    runs = load_runs(first, second)
    assert varying(runs) == ["sweep", "model.depth", "model.shortcut"]
    assert varying(runs[runs["sweep"] == "first"]) == ["model.depth", "model.shortcut"]
    assert len(summarize(runs)) == 8
    # Two sweeps of the same settings are averaged together, so all fields stay.
    third = sweep_writer(tmp_path / "third", **options | {"seeds": (1,)})
    runs = load_runs(first, second, third)
    assert "sweep" not in varying(runs)
    assert summarize(runs)["seeds"].tolist() == [2, 2, 1, 1] * 2


def test_a_sweep_of_which_no_run_can_be_read_is_named(sweep_writer: Maker, tmp_path: Path) -> None:
    whole, damaged = (sweep_writer(tmp_path / name, seeds=(0,), points=2) for name in "ab")
    for file in (damaged / "runs").glob("*/config.json"):
        file.write_text("{")
    told: list[str] = []
    assert "sweep" not in load_runs(whole, damaged, warn=told.append)
    assert f"{damaged}: no run can be read" in told
