"""The local launcher, with training replaced by a function that only writes files."""

import errno
import json
import os
import shutil

import pytest

from resjax.cli import main
from resjax.config import default_config, override, to_dict
from resjax.errors import UserError
from resjax.run_files import CLASSIFICATION_ERROR, Metric
from resjax.sweeps import local
from resjax.sweeps.experiment import plan
from resjax.sweeps.launchers import Options
from resjax.train import records
from resjax.train.progress import Progress
from resjax.train.signals import StopRequest


def launch(plan, workdir, command, workers=1, retries=0):
    """Trains in this process, where training is replaced."""
    return local.launch(plan, workdir, command, Options(workers, retries), StopRequest())


SWEEP = """
from resjax.sweeps import param, product

def sweep(seeds=(0, 1), depths=(8, 14)):
    return product(param("seed", seeds), param("model.depth", depths))
"""


@pytest.fixture
def planned(tmp_path):
    """Returns a function that plans two seeds and two depths on the base config with overrides."""
    experiment = tmp_path / "depth.py"
    experiment.write_text(SWEEP)
    return lambda **fields: plan(
        experiment,
        override(default_config(), {name.replace("__", "."): v for name, v in fields.items()}),
    )


@pytest.fixture
def trained(monkeypatch):
    """Replaces training; `trained.runs` lists the (depth, seed) that were trained, in order."""
    runs = []

    def train(config, workdir, on_progress=None, stop=None, claim=None):
        runs.append((config.model.depth, config.seed))
        if config.model.depth in train.failing:
            raise MemoryError("no room\nat all")
        steps = config.train.steps
        values = {"test_error": 0.25, "test_angle": 3.5}
        summary = {"steps": steps, **values, "images_per_second": 7.0}
        on_progress(Progress(steps, steps, values, 7.0, train.primary))
        workdir.mkdir(exist_ok=True)
        records.write_json(workdir / "config.json", to_dict(config))
        entry = {"primary_metric": train.primary._asdict()}
        records.write_json(workdir / "provenance.json", entry)
        records.write_json(workdir / "summary.json", summary)
        return summary

    train.failing = ()
    train.primary = CLASSIFICATION_ERROR
    train.runs = runs
    monkeypatch.setattr("resjax.train.loop.train", train)
    return train


def folders(workdir):
    return sorted((workdir / "runs").iterdir())


def test_runs_that_differ_only_in_seed_are_trained_one_after_the_other(planned, trained, tmp_path):
    assert launch(planned(), tmp_path / "w", "resjax sweep") == 0
    assert trained.runs == [(8, 0), (8, 1), (14, 0), (14, 1)]


def test_launching_again_skips_finished_runs(planned, trained, tmp_path, capsys):
    for _ in range(2):
        launch(planned(), tmp_path / "w", "resjax sweep")
    assert len(trained.runs) == 4
    again = capsys.readouterr().out.splitlines()[4:]
    assert all("finished before" in line and "test error 25.00 %" in line for line in again)


def test_lines_show_the_primary_metric_of_the_task(planned, trained, tmp_path, capsys):
    trained.primary = Metric("angle", unit="rad")
    for _ in range(2):
        launch(planned(), tmp_path / "w", "resjax sweep")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all("test angle 3.5 rad" in line and "error" not in line for line in lines)


def test_launching_again_trains_missing_runs(planned, trained, tmp_path):
    launch(planned(), tmp_path / "w", "resjax sweep")
    shutil.rmtree(folders(tmp_path / "w")[0])
    launch(planned(), tmp_path / "w", "resjax sweep")
    assert len(trained.runs) == 5


def test_a_run_with_another_config_is_not_finished(planned, trained, tmp_path):
    launch(planned(), tmp_path / "w", "resjax sweep")
    config = folders(tmp_path / "w")[0] / "config.json"
    config.write_text(config.read_text().replace("digits", "other"))
    launch(planned(), tmp_path / "w", "resjax sweep")
    assert len(trained.runs) == 5


def test_another_base_config_has_its_own_run_folders(planned, trained, tmp_path):
    launch(planned(), tmp_path / "w", "resjax sweep")
    launch(planned(model__width=8), tmp_path / "w", "resjax sweep")
    assert len(folders(tmp_path / "w")) == len(trained.runs) == 8


def test_a_failed_run_is_reported_and_the_others_go_on(planned, trained, tmp_path, capsys):
    trained.failing = (8,)
    assert launch(planned(), tmp_path / "w", "resjax sweep") == 2
    assert len(trained.runs) == 4
    lines = capsys.readouterr().out.splitlines()
    assert sum("failed: MemoryError: no room at all" in line for line in lines) == 2
    assert sum("finished" in line for line in lines) == 2
    reports = list(tmp_path.glob("w/runs/*depth8*/error.txt"))
    assert ["Traceback" in path.read_text() for path in reports] == [True, True]


def test_an_odd_file_concerns_its_run_alone(planned, trained, tmp_path, capsys):
    launch(planned(), tmp_path / "w", "resjax sweep")
    fieldless, file, folder, whole = folders(tmp_path / "w")
    summary = json.loads((fieldless / "summary.json").read_text())
    del summary["images_per_second"]
    records.write_json(fieldless / "summary.json", summary)
    shutil.rmtree(file)
    file.touch()
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    capsys.readouterr()
    assert launch(planned(), tmp_path / "w", "resjax sweep") == 2
    states = dict(line.split("  ")[:2] for line in capsys.readouterr().out.splitlines())
    assert states[fieldless.name] == states[whole.name] == "finished before"
    assert states[file.name].startswith("failed: ")
    assert states[folder.name].startswith("failed: ")


def test_an_error_that_cannot_be_written_down_ends_neither_the_launch_nor_its_count(
    planned, trained, tmp_path, capsys
):
    trained.failing = (8,)
    plan = planned()
    for run in plan.runs:
        (tmp_path / "w" / "runs" / run.name / "error.txt").mkdir(parents=True)
    assert launch(plan, tmp_path / "w", "resjax sweep") == 2
    assert len(trained.runs) == 4
    lines = capsys.readouterr().out.splitlines()
    assert sum("failed: MemoryError: no room at all; error.txt: " in line for line in lines) == 2


def test_a_thread_that_dies_is_a_failure_and_the_others_train_what_is_left(
    planned, tmp_path, monkeypatch
):
    trained = []
    monkeypatch.setattr(local.Worker, "attempt", lambda self, *run: trained.append(run))

    printed = []

    def print_line(run):
        printed.append(run)
        if len(printed) == 1:
            raise ZeroDivisionError

    monkeypatch.setattr("resjax.sweeps.status.print_line", print_line)
    with pytest.raises(ZeroDivisionError):
        launch(planned(), tmp_path / "w", "resjax sweep", workers=2)
    assert len(trained) == 4


def test_a_diverged_run_is_reported_with_step_and_reason(
    planned, trained, tmp_path, capsys, monkeypatch
):
    def diverge(config, workdir, on_progress=None, stop=None, claim=None):
        workdir.mkdir(exist_ok=True)
        content = {"step": 50, "reason": "the loss is not finite"}
        records.write_json(workdir / "diverged.json", content)
        raise UserError("the loss is not finite; lower the rate")

    monkeypatch.setattr("resjax.train.loop.train", diverge)
    assert launch(planned(), tmp_path / "w", "resjax sweep") == 4
    lines = capsys.readouterr().out.splitlines()
    assert all("  diverged: step 50: the loss is not finite  " in line for line in lines)


def test_a_traceback_is_removed_when_its_run_succeeds(planned, trained, tmp_path):
    trained.failing = (8, 14)
    launch(planned(), tmp_path / "w", "resjax sweep")
    assert list(tmp_path.glob("w/runs/*/error.txt"))
    trained.failing = ()
    launch(planned(), tmp_path / "w", "resjax sweep")
    assert not list(tmp_path.glob("w/runs/*/error.txt"))


def test_an_interrupt_stops_the_sweep(planned, trained, tmp_path, monkeypatch):
    def interrupted(config, workdir, on_progress=None, stop=None, claim=None):
        trained.runs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("resjax.train.loop.train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch(planned(), tmp_path / "w", "resjax sweep")
    assert len(trained.runs) == 1


def test_the_sweep_folder_records_its_runs_and_command(planned, trained, tmp_path):
    launch(planned(), tmp_path / "w", "resjax sweep depth.py")
    sweep = json.loads((tmp_path / "w" / "sweep.json").read_text())
    assert (sweep["experiment"], sweep["command"]) == ("depth", "resjax sweep depth.py")
    assert sweep["runs"][1]["overrides"] == {"seed": 0, "model.depth": 14}
    assert all((tmp_path / "w" / run["folder"]).is_dir() for run in sweep["runs"])
    assert (tmp_path / "w" / "experiment.py").read_text() == SWEEP


def test_a_sweep_can_be_launched_from_its_own_copy_of_the_experiment(planned, trained, tmp_path):
    launch(planned(), tmp_path / "w", "resjax sweep")
    launch(plan(tmp_path / "w" / "experiment.py", default_config()), tmp_path / "w", "")
    assert (tmp_path / "w" / "experiment.py").read_text() == SWEEP
    assert len(trained.runs) == 4


def test_a_disk_that_refuses_is_an_error_in_one_line(planned, trained, tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    launch(planned(), tmp_path / "w", "resjax sweep")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        UserError, match=r"w: cannot write to this folder: No space left on device; fix"
    ):
        launch(planned(), tmp_path / "w", "resjax sweep")


def test_a_missing_dataset_is_refused_before_anything_is_written(trained, tmp_path, capsys):
    (tmp_path / "depth.py").write_text(SWEEP)
    (tmp_path / "config.py").write_text("from resjax.config import default_config as get_config")
    typed = ["sweep", str(tmp_path / "depth.py"), f"--config={tmp_path / 'config.py'}"]
    assert main([*typed, f"--workdir={tmp_path / 'w'}", "--config.data.name=imagenet2012"]) == 2
    assert "not prepared" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
    assert not trained.runs
