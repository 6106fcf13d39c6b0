"""Every experiment plans what it claims to plan, and draws and judges made-up runs of it."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import pytest

from resjax.analysis.claims import VERDICTS
from resjax.analysis.experiment_figures import load_experiment, load_tables
from resjax.analysis.runs import load_runs
from resjax.config import load
from resjax.config.python_files import import_function
from resjax.sweeps.experiment import Plan, plan
from resjax.sweeps.made_up import made_up_measurements, made_up_runs

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "experiments" / "results" / "digits"
FILES = sorted((ROOT / "experiments").glob("*.py"))
EXPERIMENTS = [file for file in FILES if file.stem not in ("transfer", "dense")]  # own configs


def planned(file: Path, config: str) -> Plan:
    path = str(ROOT / "configs" / f"{config}.py")
    return plan(file, load(path), path)


def name(file: Path) -> str:
    return file.stem


@pytest.mark.parametrize("file", FILES, ids=name)
def test_an_experiment_states_its_claim_and_its_source(file: Path) -> None:
    experiment = load_experiment(file)
    assert len(experiment.title) < 100
    assert re.search(r"(19|20)\d\d", experiment.claim), "a year"
    assert re.search(r"arXiv \d{4}\.\d{4,5}", experiment.claim), "an arXiv number"
    assert experiment.draw is not None
    assert f"| `{file.stem}` |" in (ROOT / "docs" / "experiments.md").read_text()


@pytest.mark.parametrize("file", EXPERIMENTS, ids=name)
def test_by_default_an_experiment_is_the_papers_with_several_seeds(file: Path) -> None:
    runs = planned(file, "cifar10").runs
    assert len({run.name for run in runs}) == len(runs)
    assert len({run.config.seed for run in runs}) >= 3
    assert {run.config.data.name for run in runs} == {"cifar10"}
    assert {run.config.train.steps for run in runs} == {64_000}


@pytest.mark.parametrize("file", EXPERIMENTS, ids=name)
def test_an_experiment_runs_within_minutes_on_the_quickstart_data(file: Path) -> None:
    """A step of 64 images takes about 0.5 ms per layer on two cores: at most five minutes."""
    runs = planned(file, "quickstart").runs
    assert len({run.config.seed for run in runs}) >= 3
    assert {run.config.data.name for run in runs} == {"digits"}
    steps = sum(run.config.train.steps * (run.config.model.depth or 0) for run in runs)
    assert steps <= 650_000


class Minutes(NamedTuple):
    """How long the runs of a sweep took, each in a process with one core."""

    runs: int
    training: float
    measuring: float

    @property
    def two_workers(self) -> float:
        return (self.training + self.measuring) / 2


def committed_minutes(folder: Path, names: Collection[str] | None = None) -> Minutes:
    """Returns the times of a committed sweep, of runs with these names or of all of them."""
    training = measuring = 0.0
    runs = [
        each for each in (folder / "runs").iterdir() if names is None or bare(each.name) in names
    ]
    for run in runs:
        if (run / "summary.json").exists():  # a diverged run has none
            training += json.loads((run / "summary.json").read_text())["seconds"] / 60
        for found in run.glob("measurements/*.json"):
            measuring += json.loads(found.read_text())["seconds"] / 60
    return Minutes(len(runs), training, measuring)


def bare(run: str) -> str:
    """Returns the name of a run without the digest of its config."""
    return run.rpartition("-")[0]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=name)
def test_the_quickstart_of_an_experiment_takes_at_most_15_minutes_on_two_cores(file: Path) -> None:
    """By the times of the committed runs of the same networks and seeds, with other load."""
    names = {bare(run.name) for run in planned(file, "quickstart").runs}
    found = committed_minutes(DIGITS / file.stem, names)
    assert found.runs >= len(names)
    assert found.two_workers <= 15


def test_the_results_page_has_the_times_of_the_committed_sweeps() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    for folder in DIGITS.iterdir():
        found = committed_minutes(folder)
        measuring = f"{found.measuring:.1f}" if found.measuring else "–"
        row = f"| {found.runs} | {found.training:.1f} | {measuring} | {found.two_workers:.1f} |"
        assert f"| `{folder.name}` {row}" in page
    for folder in (DIGITS.parent / "fashion").iterdir():
        found = committed_minutes(folder)
        row = rf"\| `{folder.name}` \|[^|]+\| {found.runs} \| {found.training:.0f} \|"
        assert re.search(row, page), row


@pytest.mark.parametrize("file", EXPERIMENTS, ids=name)
def test_an_experiment_draws_and_judges_its_runs(file: Path) -> None:
    experiment = load_experiment(file)
    runs = planned(file, "quickstart").runs
    with made_up_runs({run.name: run.config for run in runs}) as folder:
        tables = load_tables(load_runs(folder), None)
        measured = made_up_measurements(tables.runs, DIGITS / file.stem, file.stem)
        tables = tables._replace(measurements=measured)
        if experiment.lacks_measurements(tables):
            pytest.skip("no run is measured yet")
        assert experiment.figures(tables)
        claims = experiment.claims(tables)
    assert len({claim.statement for claim in claims}) == len(claims)
    assert {claim.verdict for claim in claims} <= set(VERDICTS)


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_backbones_of_dense_tasks_are_drawn_and_judged(task: str) -> None:
    file = ROOT / "experiments" / "dense.py"
    runs = plan(file, load(f"{ROOT / 'configs' / 'scenes.py'}:{task}")).runs
    assert len(runs) == 18
    with made_up_runs({run.name: run.config for run in runs}) as folder:
        tables = load_tables(load_runs(folder), None)
        experiment = load_experiment(file)
        assert set(experiment.figures(tables)) == {"curves", "backbones"}
        claims = experiment.claims(tables)
    assert len(claims) == 2
    assert all(claim.measured for claim in claims)


def test_pretrained_backbones_of_dense_tasks_are_those_of_their_depth_and_shortcut() -> None:
    sweep = import_function(ROOT / "experiments" / "dense.py", "sweep", "yield overrides")
    runs = list(sweep(depths=(8, 20), pretrained="runs/{shortcut}-{depth}", seeds=(0,)))
    assert len(runs) == 8
    for run in runs[4:]:
        expected = f"runs/{run['model.shortcut']}-{run['model.depth']}"
        assert (run["transfer.weights"], run["transfer.head"]) == (expected, "new")
