"""Made-up runs look like real ones, so `figures` can be tried before anything is trained."""

import re
from pathlib import Path

import pytest

from resjax import cli
from resjax.analysis.runs import load_curves, load_runs
from resjax.config import default_config, override, resolve
from resjax.sweeps import made_up
from resjax.sweeps.conformance import check_experiment
from resjax.sweeps.experiment import Run
from resjax.train.loop import train

ROOT = Path(__file__).parents[2]
CONFIG = f"--config={ROOT / 'configs' / 'quickstart.py'}"
EXPERIMENT = '''"""Depth."""
from matplotlib.figure import Figure
from resjax.sweeps import param, product

def sweep(depths=(8, 14), seeds=(0,)):
    return product(param("model.depth", depths), param("seed", seeds))

def figures(runs, curves):
    {}
    return {{"depth": Figure()}}
'''


def columns(path):
    runs = load_runs(path)
    return [set(table) for table in (runs, load_curves(runs))]


def test_made_up_runs_have_the_columns_of_real_ones(tmp_path, monkeypatch, smallest):
    monkeypatch.syspath_prepend(ROOT / "tests" / "tasks")
    further = {
        "task.name": "angle_task:Angle",
        "optimizer.ema_decay": 0.9,
        "train.nonfinite": "skip",
    }
    config = resolve(override(default_config(), smallest | further))
    train(config, tmp_path / "real")
    with made_up.made_up_runs({"run": config}) as folder:
        assert columns(folder) == columns(tmp_path / "real")
        assert load_runs(folder)["finished"].all()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("task", "metrics"),
    [("segmentation", {"loss", "miou", "accuracy"}), ("detection", {"loss", "ap", "ap50"})],
)
def test_the_metrics_of_tasks_with_masks_and_boxes_are_found(task, metrics):
    config = resolve(override(default_config(), {"data.name": "scenes", "task.name": task}))
    assert set(made_up._find_metrics(config).names) == metrics


def test_the_metrics_of_our_own_tasks_are_those_that_tracing_finds(monkeypatch, smallest):
    config = resolve(override(default_config(), smallest))
    with made_up.made_up_runs({"run": config}) as known:
        expected = columns(known)
    monkeypatch.setattr(made_up, "KNOWN", {})
    with made_up.made_up_runs({"run": config}) as traced:
        assert columns(traced) == expected


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Returns a function that launches a sweep with a statement in `figures`."""
    trained = []
    monkeypatch.setattr("resjax.sweeps.local.launch", lambda *_: trained.append(1) or 2)

    def launch(statement, *fields):
        (tmp_path / "depth.py").write_text(EXPERIMENT.format(statement))
        typed = ["sweep", str(tmp_path / "depth.py"), CONFIG, f"--workdir={tmp_path / 'w'}"]
        code = cli.main([*typed, *fields])
        return code, bool(trained), capsys.readouterr().err

    return launch


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ('runs["model.dept"]', r"depth.py:9: KeyError: 'model.dept', in figures\(\) on made-up"),
        ("return [Figure()]", r"depth.py: figures\(\) returned list; return a dict"),
        ('return {"a": 1}', r"figures\(\)\['a'\] is a int, not a Matplotlib figure"),
        ('return {"../a": Figure()}', "'../a' cannot be the name of a file"),
        ('f = Figure(); f.suptitle("$\\\\frac{$"); return {"f": f}', "ValueError: .*frac"),
    ],
)
def test_an_error_in_figures_ends_a_launch_before_training(sweep, tmp_path, statement, message):
    code, trained, error = sweep(statement)
    assert (code, trained) == (2, False)
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_figures_that_need_more_than_tables_do_not_keep_a_sweep_from_training(sweep):
    code, trained, error = sweep('open(runs["folder"][0] + "/checkpoints/x")')
    assert (code, trained) == (1, True)
    assert "needs files that made-up runs do not have" in error


def test_the_checks_of_an_experiment_say_what_they_checked(tmp_path, capsys):
    (tmp_path / "depth.py").write_text(EXPERIMENT.format("assert len(runs) == 2"))
    assert check_experiment(tmp_path / "depth.py", "quickstart") == [
        "sweep() yields 2 different runs, which are all possible",
        "figures() draws depth from runs with made-up numbers",
        "claims() judges 0 claims by the same runs",
    ]
    assert capsys.readouterr().out.count("depth.py: ") == 3


def test_figures_without_a_fault_are_not_mentioned(sweep):
    code, trained, error = sweep("assert len(runs) == 2 and len(curves) > 4")
    assert (code, trained) == (1, True)  # the replaced launch returns two failures
    assert "figures()" not in error


@pytest.mark.parametrize(("most", "seeds"), [(20, 10), (19, 9), (8, 4), (4, 3), (1, 3)])
def test_a_large_sweep_has_made_up_runs_of_every_setting_and_at_least_three_seeds(
    monkeypatch, smallest, most, seeds
):
    monkeypatch.setattr(made_up, "MOST_RUNS", most)
    config = resolve(override(default_config(), smallest))
    each = [(depth, seed) for seed in range(10) for depth in (8, 14)]
    runs = [Run({"model.depth": depth, "seed": seed}, config) for depth, seed in each]
    assert made_up.select_seeds(runs) == [run for run in runs if run.overrides["seed"] < seeds]


def test_a_large_sweep_without_seeds_is_tried_on_all_of_its_runs(monkeypatch, smallest):
    monkeypatch.setattr(made_up, "MOST_RUNS", 2)
    config = resolve(override(default_config(), smallest))
    runs = [Run({"model.depth": depth}, config) for depth in (8, 14, 20)]
    assert made_up.select_seeds(runs) == runs


def test_figures_of_a_large_sweep_are_tried_on_some_of_its_seeds(sweep, monkeypatch):
    monkeypatch.setattr(made_up, "MOST_RUNS", 8)
    tried = "assert sorted(runs['seed']) == [0, 0, 1, 1, 2, 2, 3, 3]"
    code, trained, error = sweep(tried, "--config.sweep.seeds=0,1,2,3,4,5")
    assert (code, trained) == (1, True)
    assert "figures()" not in error
