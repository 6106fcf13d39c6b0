"""One run, from its config to its summary: what it writes, and that it can be interrupted."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest

from resjax.config import to_dict
from resjax.errors import UserError
from resjax.train import loop
from resjax.train.loop import History, evaluate, train
from resjax.train.records import JsonLinesFile

BATCH = 16


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def config(configure):
    return configure()


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The folder of a run that nothing interrupted; read only."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(config, workdir)
    return workdir


def what_training_found(workdir):
    """All that must not depend on when and how often a run was started."""
    summary = read_json(workdir / "summary.json")
    del summary["seconds"], summary["compile_seconds"], summary["images_per_second"]
    return summary, (workdir / "metrics.jsonl").read_bytes()


class Interrupt(BaseException):
    """As a KeyboardInterrupt is, nothing that the loop may catch."""


def test_a_run_folder_holds_its_config_provenance_metrics_checkpoints_and_summary(config, finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "provenance.json",
        "metrics.jsonl",
        "checkpoints",
        "summary.json",
    }
    assert read_json(finished / "config.json") == to_dict(config)
    assert read_json(finished / "provenance.json").keys() >= {"commit", "versions", "start"}


def test_metrics_come_at_every_dispatch_and_tests_at_their_times_and_at_the_end(finished):
    found = [(line["step"], line["split"]) for line in read_lines(finished)]
    assert found == [
        (3, "train"),
        (6, "train"),
        (6, "test"),
        (9, "train"),
        (10, "train"),  # the last dispatch is as long as what is left
        (10, "test"),
    ]


def test_a_train_line_has_the_rate_and_every_line_has_loss_and_error(finished):
    for line in read_lines(finished):
        names = {"loss", "error"} | ({"learning_rate"} if line["split"] == "train" else set())
        assert line.keys() == {"step", "split"} | names
        assert 0 <= line["error"] <= 1
        assert line["loss"] > 0


def test_the_summary_tells_the_last_lines_and_the_best_beside_them(finished):
    lines, summary = read_lines(finished), read_json(finished / "summary.json")
    tests = [line for line in lines if line["split"] == "test"]
    assert summary["steps"] == 10
    for split, last in {"train": lines[-2], "test": tests[-1]}.items():
        assert summary[f"{split}_loss"] == last["loss"]
        assert summary[f"{split}_error"] == last["error"]
    best = min(tests, key=lambda line: line["error"])
    assert (summary["best_test_error"], summary["best_test_step"]) == (best["error"], best["step"])
    assert summary.keys() >= {"parameters", "macs", "seconds", "images_per_second"}
    assert summary["parameters"] == 4_934
    assert summary["compile_seconds"] > 0
    assert summary["peak_bytes"] > 2 * 4 * summary["parameters"]  # weights and their momentum


def test_the_best_is_told_beside_the_final_error_and_never_instead(config, tmp_path):
    history = History(config, JsonLinesFile(tmp_path / "metrics.jsonl", ""), 0, None)
    for step, error in [(3, 0.5), (6, 0.1), (9, 0.1), (10, 0.3)]:
        history.add(step, "test", {"loss": error, "error": error})
    history.fetch()
    history.close()
    summary = history.summary()
    assert (summary["best_test_error"], summary["best_test_step"]) == (0.1, 6)
    assert summary["test_error"] == 0.3


def test_another_process_finds_the_same_metrics_to_the_last_byte(config, finished, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    program = (
        "import json, pathlib, sys\n"
        "from resjax.config import from_dict\n"
        "from resjax.train.loop import train\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "train(from_dict(json.loads((folder / 'config.json').read_text())), folder)\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, env=environment)
    assert what_training_found(tmp_path) == what_training_found(finished)


def test_another_seed_finds_other_metrics(configure, finished, tmp_path):
    train(configure({"seed": 1}), tmp_path)
    first, other = read_lines(finished), read_lines(tmp_path)
    assert all(a["loss"] != b["loss"] for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("told", range(1, 7))
def test_a_run_interrupted_anywhere_goes_on_as_if_nothing_had_been(
    config, finished, tmp_path, told
):
    calls = []

    def interrupt(progress):
        calls.append(progress)
        if len(calls) == told:
            raise Interrupt

    with pytest.raises(Interrupt):
        train(config, tmp_path, interrupt)
    assert not (tmp_path / "summary.json").exists()
    train(config, tmp_path)
    assert what_training_found(tmp_path) == what_training_found(finished)


def test_a_run_killed_while_it_wrote_a_line_goes_on_from_its_checkpoint(config, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "10")
    metrics = workdir / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-30])
    told = []
    train(config, workdir, told.append)
    assert [progress.step for progress in told] == [9, 10, 10]
    assert what_training_found(workdir) == what_training_found(finished)


def test_a_checkpoint_is_never_ahead_of_the_metrics(config, tmp_path, monkeypatch):
    written = {}

    def save(checkpoints, state, step, record, save=loop.CheckpointManager._save):
        written[step] = [line["step"] for line in read_lines(tmp_path)]
        save(checkpoints, state, step, record)

    monkeypatch.setattr(loop.CheckpointManager, "_save", save)
    train(config, tmp_path)
    assert written == {6: [3, 6, 6], 10: [3, 6, 6, 9, 10, 10]}


def test_a_finished_run_is_left_as_it_is(config, finished):
    def files():
        found = (path for path in finished.rglob("*") if path.is_file())
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}

    before = files()
    assert train(config, finished) == read_json(finished / "summary.json")
    assert files() == before


def test_another_config_in_the_same_folder_is_refused_by_its_field(configure, finished):
    before = (finished / "config.json").read_bytes()
    another = configure({"optimizer.learning_rate": 0.2, "seed": 3})
    with pytest.raises(UserError, match=r"optimizer\.learning_rate is 0\.1 there and 0\.2") as told:
        train(another, finished)
    assert "seed is 0 there and 3 here" in str(told.value)
    assert "model.depth" not in str(told.value)
    assert "\n" not in str(told.value)
    assert (finished / "config.json").read_bytes() == before


def test_a_data_set_that_is_not_here_is_refused_and_nothing_is_written(configure, tmp_path):
    with pytest.raises(UserError, match="'imagenet2012' is not prepared"):
        train(configure({"data.name": "imagenet2012"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_diverges_may_be_recorded_as_null_and_the_run_goes_on(configure, tmp_path):
    config = configure({"optimizer.learning_rate": 1e30, "train.nonfinite": "record"})
    summary = train(config, tmp_path)
    assert math.isnan(summary["test_loss"])
    assert [line["loss"] for line in read_lines(tmp_path)][-2:] == [None, None]
    on_file = read_json(tmp_path / "summary.json")
    assert (on_file["train_loss"], on_file["test_loss"], on_file["steps"]) == (None, None, 10)
    again = train(config, tmp_path)
    assert math.isnan(again["test_loss"])


def test_metrics_are_fetched_when_the_next_dispatch_is_under_way(config, tmp_path, monkeypatch):
    events = []

    def steps(compiled, state, taken, steps=loop.Program.steps):
        events.append(f"take {taken}")
        return steps(compiled, state, taken)

    monkeypatch.setattr(loop.Program, "steps", steps)
    train(config, tmp_path, lambda progress: events.append(f"told {progress.step}"))
    assert events == [
        "take 3",
        "take 3",
        "told 3",
        "told 6",  # before the checkpoint of step 6
        "told 6",
        "take 3",
        "take 1",
        "told 9",
        "told 10",
        "told 10",
    ]


def test_progress_tells_the_newest_metrics_of_both_splits(config, finished, tmp_path):
    told = []
    train(config, tmp_path, told.append)
    last = told[-1]
    assert (last.step, last.steps) == (10, 10)
    summary = read_json(finished / "summary.json")
    assert last.metrics == {name: summary[name] for name in last.metrics}
    assert last.metrics.keys() == {"train_loss", "train_error", "test_loss", "test_error"}
    assert "test_error" not in told[0].metrics


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    return clock


def test_the_rate_counts_images_that_are_done_and_not_those_under_way(config, tmp_path, clock):
    history = History(config, JsonLinesFile(tmp_path / "metrics.jsonl", ""), 0, None)
    rates = []
    for now, step in [(0, 3), (2, 6), (4, 9), (6, 12)]:  # a dispatch takes 2 s
        clock.now = now
        history.add(step, "train", {"loss": 0.5, "error": 0.5})
        history.fetch(before=step)
        rates.append(history.images_per_second)
    clock.now = 8
    history.fetch()
    history.close()
    rates.append(history.images_per_second)
    steady = 3 * BATCH / 2
    assert rates == pytest.approx([0, steady, steady, steady, steady])


def test_a_resumed_run_counts_only_its_own_images(config, tmp_path, clock):
    history = History(config, JsonLinesFile(tmp_path / "metrics.jsonl", ""), 6, None)
    clock.now = 4
    history.add(9, "train", {"loss": 0.5, "error": 0.5})
    history.fetch()
    history.close()
    assert history.images_per_second == pytest.approx(3 * BATCH / 4)


def test_metrics_go_on_behind_those_of_the_step_that_is_resumed(config, tmp_path):
    path, metrics = tmp_path / "metrics.jsonl", {"loss": 0.5, "error": 0.5}
    behind = ""
    for first_step, steps in [(0, (3, 6, 9)), (6, (9, 10))]:
        history = History(config, JsonLinesFile(path, behind), first_step, None)
        for step in steps:
            history.add(step, "train", metrics)
            history.fetch()
            if step == 6:
                behind = history.synced()
        history.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [3, 6, 9, 10]


def test_a_run_that_averages_its_weights_tells_their_test_error_beside_the_raw_one(
    configure, regression, tmp_path
):
    config = configure({"optimizer.ema_decay": 0.5, "data.flip": False})
    train(config, tmp_path)
    for line in read_lines(tmp_path):
        averaged = {"ema_loss", "ema_error"} & line.keys()
        assert averaged == ({"ema_loss", "ema_error"} if line["split"] == "test" else set())


def test_evaluate_finds_what_the_last_test_line_says(finished):
    last = read_lines(finished)[-1]
    assert evaluate(finished) == {
        "step": 10,
        "test_loss": pytest.approx(last["loss"]),
        "test_error": last["error"],
    }


def test_evaluate_refuses_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        evaluate(tmp_path)
    assert not list(tmp_path.iterdir())


def test_evaluate_refuses_a_run_without_checkpoint(finished, tmp_path):
    shutil.copy(finished / "config.json", tmp_path)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        evaluate(tmp_path)
