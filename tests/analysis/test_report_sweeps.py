"""Tests of a report of several sweeps: each is named, and configs that differ are told apart."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from resjax.analysis import figures as draw
from resjax.analysis.report import write_report
from resjax.analysis.runs import load_runs
from resjax.cli import main
from tests.analysis.test_report import EXPERIMENT, Page

Maker = Callable[..., Path]


@pytest.fixture(autouse=True)
def svg_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    svg = draw._METADATA["svg"]
    monkeypatch.setattr(draw, "_METADATA", {"svg": svg})


def edit_configs(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    for file in (root / "runs").glob("*/config.json"):
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))


@pytest.fixture
def two(sweep_writer: Maker, tmp_path: Path) -> list[Path]:
    """Returns a sweep on digits and one on Fashion-MNIST of an earlier version."""
    options: dict[str, Any] = {"points": 3, "seeds": (0, 1, 2)}
    roots = [
        sweep_writer(tmp_path / "digits" / "depths", depths=(8, 20), **options),
        sweep_writer(
            tmp_path / "fashion", depths=(20,), data="fashion_mnist", steps=600, **options
        ),
    ]

    def earlier(config: dict[str, Any]) -> None:
        del config["model"]["dtype"]
        config["train"]["evaluate_train"] = False

    edit_configs(roots[1], earlier)
    return roots


def test_sweeps_are_named_with_the_settings_in_which_they_differ(
    two: list[Path], tmp_path: Path
) -> None:
    write_report(two[0])
    page = Page(write_report(two))
    assert " depths and fashion Measured: " in " ".join(page.text["header"].split())
    assert "depths/report.html" in " ".join(page.resources)  # the one that has a report
    assert "fashion/report.html" not in " ".join(page.resources)
    assert "12 of 12 runs finished · digits" in page.text["sweeps"]
    assert "6 of 6 runs finished · fashion_mnist" in page.text["sweeps"]
    header, *rows = page.tables["sweeps"]
    assert header == ["field", "depths", "fashion"]
    assert rows == [
        ["model.depth", "8, 20", "20"],
        ["model.dtype", "float32", "–"],
        ["data.name", "digits", "fashion_mnist"],
        ["train.steps", "400", "600"],
        ["train.log_every", "2", "3"],
        ["train.eval_every", "2", "3"],
        ["train.evaluate_train", "–", "False"],
    ]
    settings = pd.read_csv(tmp_path / "settings.csv")
    assert settings["field"].tolist() == [row[0] for row in rows]
    assert not (two[0] / "settings.csv").exists()


def test_a_field_that_is_none_and_that_another_sweep_lacks_is_none(two: list[Path]) -> None:
    edit_configs(two[0], lambda config: config["data"].update(per_class=None))
    edit_configs(two[1], lambda config: config["data"].pop("per_class", None))
    text = Page(write_report(two)).text["config"]
    assert "data.per_classNone" in text


def test_results_of_different_configs_are_not_averaged(two: list[Path], tmp_path: Path) -> None:
    page = Page(write_report(two))
    header, *rows = page.tables["summary"]
    fields = ["sweep", "model.depth", "model.shortcut"]
    assert header == [
        "setting",
        "test error (%)",
        "training error (%)",
        "seeds",
        "parameters",
        *fields,
    ]
    assert [row[0].split(", ")[0] for row in rows] == ["depths"] * 4 + ["fashion"] * 2
    assert {row[3] for row in rows} == {"3"}
    results = pd.read_csv(tmp_path / "results.csv")
    assert (results["seeds"] == 3).all()
    assert set(pd.read_csv(tmp_path / "runs.csv")["sweep"]) == {"depths", "fashion"}
    latex = (tmp_path / "results.tex").read_text()
    assert r"\caption{depths and fashion: error on digits and fashion\_mnist" in latex
    assert "(400 to 600)" in latex
    assert len(re.findall(r"^    fashion & 20 & (?:none|pad) & ", latex, re.M)) == 2
    assert {run["name"] for run in page.data["groups"]} >= {"fashion, residual, 20 layers"}


def test_sweeps_are_compared_at_equal_seed(two: list[Path], tmp_path: Path) -> None:
    rows = Page(write_report(two)).tables["differences"]
    [row] = [row for row in rows if row[:3] == ["fashion", "depths", "residual, 20 layers"]]
    runs = load_runs(*two).set_index(["sweep", "model.depth", "model.shortcut", "seed"])
    errors = 100 * runs["test_error"]
    gaps = errors["fashion", 20, "pad"] - errors["depths", 20, "pad"]
    assert row[3] == f"error (%) {gaps.mean():.2f} ± {gaps.std():.2f}"
    assert row[-1] == "3"
    places = {row[2] for row in rows if row[:2] == ["residual", "plain"]}
    assert places == {"depths, 8 layers", "depths, 20 layers", "fashion, 20 layers"}
    found = pd.read_csv(tmp_path / "differences.csv")
    assert (found.loc[found["field"] == "sweep", "pairs"] == 3).all()


def test_a_field_that_one_sweep_lacks_does_not_hinder_pairs(two: list[Path]) -> None:
    edit_configs(two[0], lambda config: config["data"].update(subset_seed=0))
    rows = Page(write_report(two)).tables["differences"]
    assert [row[-1] for row in rows if row[0] == "fashion"] == ["3", "3"]


FIRST = (
    EXPERIMENT
    + """

def claims(runs):
    from resjax.analysis.claims import compare
    options = {"value": "test_error", "expected": "higher"}
    options |= {"treatment": {"model.depth": 20}, "control": {"model.depth": 8}}
    return [compare(runs, "Depth hurts", "me", "1 %", **options)]
"""
)
SECOND = '"""Another question."""\n' + EXPERIMENT.partition('"""\n\n')[2].replace(
    "by_depth", "other"
)


def test_each_sweep_is_drawn_and_judged_by_its_own_experiment(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for root, text in zip(two, (FIRST, SECOND), strict=True):
        (root / "experiment.py").write_text(text)
    assert main(["report", *map(str, two), "--bold-best"]) == 0
    assert r"\textbf" in (tmp_path / "results.tex").read_text()
    said = capsys.readouterr().out
    for root in two:
        assert f"experiment: executes {root / 'experiment.py'}" in said
    assert "claim of depths: " in said
    page = Page(tmp_path / "report.html")
    assert (tmp_path / "figures" / "depths" / "by_depth.svg").exists()
    assert (tmp_path / "figures" / "fashion" / "other.svg").exists()
    for name in ("figures/depths/by_depth.svg", "figures/fashion/other.svg"):
        assert name in page.resources
    assert len(page.ids) == len(set(page.ids))
    assert "depths: Does depth <help>?" in page.text["sweeps"]
    assert "fashion: Another question" in page.text["sweeps"]
    assert page.tables["claims"][1][0] == "Depth hurts"
    assert pd.read_csv(tmp_path / "claims.csv")["sweep"].tolist() == ["depths"]


def test_an_experiment_that_fails_is_named_and_the_other_sweep_is_drawn(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (two[0] / "experiment.py").write_text(EXPERIMENT.replace('"test_error"', '"test_eror"'))
    (two[1] / "experiment.py").write_text(SECOND)
    assert main(["report", *map(str, two)]) == 2
    [line] = [each for each in capsys.readouterr().err.splitlines() if "error:" in each]
    assert f"{two[0] / 'experiment.py'}:13: KeyError: 'test_eror'; " in line
    assert line.endswith(f"resjax report {two[0]} --experiment={two[0] / 'experiment.py'}")
    assert (tmp_path / "figures" / "depths" / "curves.svg").exists()
    assert (tmp_path / "figures" / "fashion" / "other.svg").exists()


def test_the_experiment_that_is_chosen_draws_all_sweeps_together(
    two: list[Path], tmp_path: Path
) -> None:
    chosen = tmp_path / "chosen.py"
    chosen.write_text(EXPERIMENT.replace('runs["test_error"])', 'runs["sweep"] == "fashion")'))
    page = Page(write_report(two, chosen))
    assert "Does depth" in page.text["header"]
    assert (tmp_path / "figures" / "by_depth.svg").exists()


def test_sweeps_without_experiments_have_curves_each(two: list[Path], tmp_path: Path) -> None:
    write_report(two)
    drawn = sorted(file.relative_to(tmp_path) for file in tmp_path.glob("figures/**/*.svg"))
    assert [*map(str, drawn)] == ["figures/depths/curves.svg", "figures/fashion/curves.svg"]


def test_a_run_of_two_sweeps_stands_once_in_tables_and_in_both_figures(
    sweep_writer: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ("none", "pad")
    roots = [
        sweep_writer(tmp_path / "depths", depths=(8, 20), points=2),
        sweep_writer(tmp_path / "kinds", depths=(20,), shortcuts=(*shared, "project"), points=2),
    ]
    count = EXPERIMENT.replace("    figure =", "    assert len(runs) == COUNT\n    figure =")
    for root, number in zip(roots, ("12", "9"), strict=True):
        (root / "experiment.py").write_text(count.replace("COUNT", number))
    assert main(["report", *map(str, roots)]) == 0
    assert "left out: 6 runs that another sweep has too, with the same" in capsys.readouterr().err
    page = Page(tmp_path / "report.html")
    header, *rows = page.tables["summary"]
    assert header[-2:] == ["model.depth", "model.shortcut"]  # nothing differs between sweeps only
    assert {row[3] for row in rows} == {"3"}
    assert len(page.tables["runs"]) == 1 + 15
    assert "15 of 15 runs finished" in page.text["header"]
    assert [row[-2] for row in rows] == ["8", "8", "20", "20", "20"]


def test_tasks_with_different_primary_metrics_share_a_report(
    two: list[Path], tmp_path: Path
) -> None:
    metric = {"name": "accuracy", "lower_is_better": False, "unit": "fraction"}
    for folder in (two[1] / "runs").iterdir():
        provenance = json.loads((folder / "provenance.json").read_text())
        (folder / "provenance.json").write_text(json.dumps(provenance | {"primary_metric": metric}))
        for name in ("metrics.jsonl", "summary.json"):
            file = folder / name
            file.write_text(file.read_text().replace('error":', 'accuracy":'))
    page = Page(write_report(two))
    header, *rows = page.tables["summary"]
    assert "test accuracy (%)" in header
    assert all(
        (row[header.index("test accuracy (%)")] == "–") == (row[-3] == "depths") for row in rows
    )
    assert not [row for row in page.tables["differences"] if row[:2] == ["fashion", "depths"]]
    assert (tmp_path / "figures" / "fashion" / "curves.svg").exists()
    labels = [metric["label"] for metric in page.data["metrics"]]
    assert labels[:2] == ["error (%)", "accuracy (%)"]


def test_a_folder_without_runs_among_several_is_one_line_and_nothing_is_written(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["report", str(two[0]), str(empty)]) == 2
    assert capsys.readouterr().err == (
        f"resjax: error: {empty}: no runs here (a run is a folder with a config.json)\n"
    )
    assert not (tmp_path / "report.html").exists()


def test_a_sweep_that_is_damaged_is_named_and_left_out(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (two[1] / "runs").glob("*/config.json"):
        file.write_text("[")
    assert main(["report", *map(str, two)]) == 0
    told = capsys.readouterr().err.splitlines()
    assert f"resjax: left out: {two[1]}: no run can be read" in told
    assert len(told) == 7
    assert "no run can be read" in Page(tmp_path / "report.html").text["header"]


def test_the_same_folder_twice_counts_once(two: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(two[0])
    page = Page(write_report([two[0], link, two[0]]))
    assert (two[0] / "report.html").exists()
    assert not (tmp_path / "report.html").exists()
    assert "12 of 12 runs finished" in page.text["header"]
    assert "sweeps" not in page.tables


def test_many_sweeps_are_counted_in_the_title(sweep_writer: Maker, tmp_path: Path) -> None:
    for depth in (8, 14, 20, 26, 32):
        sweep_writer(tmp_path / f"depth{depth}", depths=(depth,), seeds=(0,), points=2)
    page = Page(write_report(tmp_path))
    assert f" 5 sweeps in {tmp_path.name} Measured: " in " ".join(page.text["header"].split())
    assert "depth32" in page.text["sweeps"]


def test_a_folder_above_sweeps_is_a_report_of_them(two: list[Path], tmp_path: Path) -> None:
    shutil.rmtree(two[1] / "runs" / "depth20-none-seed0")
    page = Page(write_report(tmp_path))
    assert page.tables["sweeps"][0] == ["field", "depths", "fashion"]
    assert "17 of 18 runs finished" in page.text["header"]


def test_a_folder_above_one_sweep_has_the_figures_of_its_experiment(
    sweep_writer: Maker, tmp_path: Path
) -> None:
    root = sweep_writer(tmp_path / "above" / "sweep", depths=(8,), seeds=(0,), points=2)
    (root / "experiment.py").write_text(EXPERIMENT)
    assert "Does depth" in Page(write_report(tmp_path / "above")).text["header"]


def test_a_run_folder_beside_a_sweep_is_drawn_with_it(
    two: list[Path], make_run: Maker, tmp_path: Path
) -> None:
    (two[0] / "experiment.py").write_text(EXPERIMENT)
    page = Page(write_report([two[0], make_run("alone", {"points": 2}, depth=56)]))
    assert (tmp_path / "figures" / "curves.svg").exists()
    heads, *_, alone = page.tables["runs"]
    assert alone[heads.index("sweep")] == ""
    assert "sweeps" not in page.tables


def test_paths_are_shown_as_they_are_typed(
    two: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (two[0] / "experiment.py").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    for folders in (["digits/depths"], ["digits/depths", "fashion"]):
        assert main(["report", *folders]) == 0
        assert "executes digits/depths/experiment.py\n" in capsys.readouterr().out
