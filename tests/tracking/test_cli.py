"""Mistakes at `resjax track` and in the field `track`, and a tracker of the user's own."""

import importlib.util
import re
from pathlib import Path

import pytest

from resjax.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text()


def refused(capsys, *arguments):
    """Returns the one line with which a command is refused."""
    assert main([*map(str, arguments)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line.removeprefix("resjax: error: ")


@pytest.fixture
def finished(fake_run):
    run = fake_run()
    run.train(1, 2)
    run.finish()
    return run


def test_an_unknown_tracker_is_refused(finished, capsys):
    assert refused(capsys, "track", finished.folder, "--to=tensorbord") == (
        "--to=tensorbord: unknown; did you mean 'tensorboard'? (or package.module:Name of your own)"
    )


def test_a_missing_package_names_the_extra(finished, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused(capsys, "track", finished.folder, "--to=wandb") == (
        "--to=wandb: the package wandb is not installed; install it with "
        "pip install 'resjax[tracking]'"
    )


def test_a_folder_without_runs_is_refused(capsys, tmp_path, own_tracker):
    line = refused(capsys, "track", tmp_path, f"--to={own_tracker}")
    assert line.startswith(f"{tmp_path}: no runs here")
    line = refused(capsys, "track", tmp_path / "none", f"--to={own_tracker}")
    assert "no such file or folder" in line


@pytest.fixture
def own_tracker(tmp_path, monkeypatch):
    folder = tmp_path / "code"
    folder.mkdir()
    (code,) = re.findall(r"`my_trackers.py`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    (folder / "my_trackers.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    return "my_trackers:Lines"


def test_an_own_tracker_receives_runs(finished, own_tracker, tmp_path, capsys):
    assert main(["track", str(finished.folder), f"--to={own_tracker}"]) == 0
    first, *lines, last = (finished.folder / "tracking/lines.txt").read_text().splitlines()
    assert first.startswith(f"{finished.id} run {{'name': 'sgd'")
    assert "2 test/error 0.1" in lines
    assert last == "finished  {'steps': 9, 'test_error': 0.1}"
    assert capsys.readouterr().out == f"{finished.folder}: 2 steps with values, finished\n"


def test_an_own_tracker_that_does_not_exist_is_refused(finished, own_tracker, capsys):
    line = refused(capsys, "track", finished.folder, "--to=my_trackers:Line")
    assert line.startswith("--to=my_trackers:Line: cannot be imported: module 'my_trackers' has no")


def test_a_folder_that_cannot_be_written_is_refused(finished, own_tracker, capsys, tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file/out"
    line = refused(capsys, "track", finished.folder, f"--to={own_tracker}", f"--out={out}")
    assert line == f"--out={out}: cannot write to this folder: Not a directory"
    (finished.folder / "tracking").touch()
    assert main(["track", str(finished.folder), f"--to={own_tracker}"]) == 2
    problem, error = capsys.readouterr().err.splitlines()
    assert problem == f"resjax: left out: {finished.folder / 'tracking'}: File exists"
    assert error == "resjax: error: the run could not be tracked"


def test_a_damaged_run_is_left_out_with_one_line(finished, fake_run, own_tracker, capsys):
    damaged = fake_run("damaged", seed=1)
    damaged.train(1)
    (damaged.folder / "summary.json").write_text("{")
    assert main(["track", str(finished.folder.parent), f"--to={own_tracker}"]) == 0
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert line.startswith(f"resjax: left out: {damaged.folder / 'summary.json'}: damaged")
    assert captured.out.splitlines() == [f"{finished.folder}: 2 steps with values, finished"]


@pytest.mark.parametrize("command", ["train", "sweep"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tensorbord", "track=tensorbord: unknown; did you mean 'tensorboard'?"),
        ("my_tracker:None", "track=my_tracker:None: cannot be imported: no module named"),
        ("wandb", "track=wandb: the package wandb is not installed; install it with pip"),
    ],
)
def test_training_with_a_tracker_that_cannot_be_had_is_refused(
    command, value, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", _without_wandb(importlib.util.find_spec))
    config = tmp_path / "config.py"
    config.write_text("from resjax.config import default_config as get_config\n")
    experiment = tmp_path / "experiment.py"
    experiment.write_text("def sweep():\n    yield {}\n")
    files = [experiment] if command == "sweep" else []
    options = [f"--config={config}", f"--config.track={value}", f"--workdir={tmp_path / 'w'}"]
    assert message in refused(capsys, command, *files, *options)
    assert not (tmp_path / "w").exists()


def _without_wandb(find_spec):
    return lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)
