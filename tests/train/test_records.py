"""A run's files are whole or not there, and continue from a checkpoint."""

import json
import math
import os
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from resjax.run_files import read_layers, read_measurements
from resjax.train import records


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_json_file_never_appears_in_part(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    seen = []

    def replace(source, target, replace=os.replace):
        seen.append((path.exists(), os.path.dirname(source), Path(source).read_text()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    records.write_json(path, {"seed": 0})
    # The file was complete under another name in the same folder.
    assert seen == [(False, str(tmp_path), path.read_text())]
    assert json.loads(path.read_text()) == {"seed": 0}


def test_a_summary_value_that_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    path = tmp_path / "summary.json"
    ends = {"steps": 3, "images_per_second": 7.5}
    records.write_json(path, {"train_loss": math.nan, "test_loss": math.inf, **ends})
    assert json.loads(path.read_text()) == {"train_loss": None, "test_loss": None, **ends}
    summary = records.read_summary(path)
    assert math.isnan(summary["train_loss"])
    assert summary["steps"] == 3


def test_a_run_without_a_summary_has_not_finished(tmp_path):
    assert records.read_summary(tmp_path / "summary.json") is None


def line(step, split="train", **values):
    return {"step": step, "split": split, **values}


def layer(step, name, **values):
    return {"step": step, "layer": name, **values}


def as_text(*lines):
    return "".join(json.dumps(each) + "\n" for each in lines)


def write_lines(path, lines, behind=""):
    file = records.JsonLinesFile(path, behind)
    for each in lines:
        file.write(each)
    file.close()
    return file


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = records.JsonLinesFile(path, "")
    file.write(line(1, loss=0.5))
    assert read_measurements(path) == [line(1, loss=0.5)]
    file.close()


def test_metrics_continue_after_the_given_lines_and_later_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = [line(1), line(2), line(2, "test")]
    write_lines(path, [*kept, line(3), line(3, "test")])
    write_lines(path, [line(3, again=1)], behind=as_text(*kept))
    assert read_measurements(path) == [*kept, line(3, again=1)]


def test_an_incomplete_line_is_not_read_and_is_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [line(1), line(2)])
    path.write_text(path.read_text() + '{"step": 2, "spl')
    assert read_measurements(path) == [line(1), line(2)]
    write_lines(path, [line(3)], behind=as_text(line(1), line(2)))
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2, 3]


def test_a_loss_that_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [line(1, loss=math.nan), line(2, loss=math.inf)])
    texts = path.read_text().splitlines()
    assert [json.loads(text)["loss"] for text in texts] == [None, None]
    assert all(math.isnan(each["loss"]) for each in read_measurements(path))


LAYERS = [layer(step, name, norm=0.5 * step) for step in (1, 2) for name in ("stem", "head")]


@pytest.fixture
def layers(tmp_path):
    """A layers.jsonl that is one step ahead of the checkpoint whose mark comes with it."""
    path = tmp_path / "layers.jsonl"
    file = write_lines(path, LAYERS)
    write_lines(path, [layer(3, "stem", norm=9.0)], file.text)
    return path, file.mark


def test_layers_continue_from_the_checkpoint_and_later_lines_are_dropped(layers):
    path, mark = layers
    warnings = []
    text = records.recover_layers(path, mark, 2, warnings.append)
    write_lines(path, [layer(3, "stem", norm=1.0)], text)
    assert read_layers(path) == [*LAYERS, layer(3, "stem", norm=1.0)]
    assert warnings == []


@pytest.mark.parametrize("damage", ["line", "missing"])
def test_intact_lines_of_damaged_layers_survive(layers, damage):
    path, mark = layers
    content = path.read_text()
    path.unlink() if damage == "missing" else path.write_text(content.replace("{", "[", 1))
    warnings = []
    text = records.recover_layers(path, mark, 2, warnings.append)
    assert text == ("" if damage == "missing" else as_text(*LAYERS[1:]))
    assert len(warnings) == 1
    assert ("3 intact lines" in warnings[0]) == (damage == "line")
    assert (path.parent / "damaged" / path.name).exists() == (damage == "line")


def test_layers_that_begin_after_a_checkpoint_start_empty(layers):
    assert records.recover_layers(layers[0], None, 2, pytest.fail) == ""


def test_a_mark_does_not_grow_with_the_file(tmp_path):
    sizes = [
        len(json.dumps(write_lines(tmp_path / "layers.jsonl", LAYERS * count).mark))
        for count in (1, 1000)
    ]
    assert sizes[1] - sizes[0] == 3  # more digits of the size


def test_provenance_names_versions_devices_and_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/resjax", "train", "--workdir=runs/a"])
    content = json.loads(json.dumps(records.provenance()))
    assert content.keys() >= {"commit", "dirty", "platform"}
    assert content["versions"].keys() >= {"resjax", "jax", "flax", "optax", "numpy"}
    assert content["python"].startswith("3.")
    assert content["devices"]
    assert content["command"] == "resjax train --workdir=runs/a"
    assert datetime.fromisoformat(content["start"]).tzinfo


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The folder that provenance takes for the source folder; it is no checkout yet."""
    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def test_provenance_names_the_commit_and_whether_files_differ_from_it(source):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        command = ["git", *who, *words]
        return subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)

    (source / "records.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    (source / "untracked").write_text("no source")
    head = git("rev-parse", "HEAD").stdout.strip()
    content = records.provenance()
    assert (content["commit"], content["dirty"]) == (head, False)
    (source / "records.py").write_text("2")
    content = records.provenance()
    assert (content["commit"], content["dirty"]) == (head, True)


def test_provenance_outside_a_checkout_names_no_commit(source):
    content = records.provenance()
    assert (content["commit"], content["dirty"]) == (None, False)


def test_provenance_needs_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert records.provenance()["commit"] is None
