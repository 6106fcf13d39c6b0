"""One run, from its config to its summary: the files it writes, and that it can be interrupted."""

import json
import math
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from resjax.config import to_dict
from resjax.errors import UserError
from resjax.train import history, lock, loop
from resjax.train import trainer as trainers
from resjax.train.history import History
from resjax.train.lock import read_holder, try_claim
from resjax.train.loop import evaluate, train
from resjax.train.trainer import trainer_for

BATCH = 16


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


pytestmark = pytest.mark.usefixtures("compile_as_users")  # runs are equal to the last byte here


@pytest.fixture(scope="module")
def config(configure):
    return configure()


@pytest.fixture(scope="module")
def finished(compile_as_users, config, tmp_path_factory):
    """The folder of a run that nothing interrupted; tests only read it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(config, workdir)
    return workdir


def results(workdir):
    """Returns everything that must not depend on interruptions."""
    summary = read_json(workdir / "summary.json")
    del summary["seconds"], summary["compile_seconds"], summary["images_per_second"]
    return summary, (workdir / "metrics.jsonl").read_bytes()


class Interrupt(BaseException):
    """Like KeyboardInterrupt, it is not an Exception, so the loop must not catch it."""


def test_a_run_folder_holds_its_config_provenance_metrics_checkpoints_and_summary(config, finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "provenance.json",
        "metrics.jsonl",
        "checkpoints",
        "summary.json",
    }
    assert read_json(finished / "config.json") == {"schema_version": 2, **to_dict(config)}
    assert read_json(finished / "provenance.json").keys() >= {"commit", "versions", "start"}


def test_every_dispatch_has_a_line_and_tests_have_one_at_their_interval_and_at_the_end(finished):
    found = [(line["step"], line["split"]) for line in read_lines(finished)]
    assert found == [
        (3, "train"),
        (6, "train"),
        (6, "test"),
        (9, "train"),
        (10, "train"),  # the last dispatch has the steps that are left
        (10, "test"),
    ]


def test_every_line_has_loss_and_error_and_training_lines_have_the_learning_rate(finished):
    for line in read_lines(finished):
        names = {"loss", "error"} | ({"learning_rate"} if line["split"] == "train" else set())
        assert line.keys() == {"step", "split"} | names
        assert 0 <= line["error"] <= 1
        assert line["loss"] > 0


def test_the_summary_has_the_last_lines_and_beside_them_the_best(finished):
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


def make_history(config, workdir, metrics="", first_step=0):
    return History(trainer_for(config), workdir, metrics, "", first_step, None, print)


def sums(error):
    """Metrics as a dispatch returns them."""
    return {"sums": {"loss": (5 * error, 5.0), "error": (5 * error, 5.0)}}


def test_the_best_error_is_beside_the_final_one_and_never_instead(config, tmp_path):
    made = make_history(config, tmp_path)
    for step, error in [(3, 0.5), (6, 0.1), (9, 0.1), (10, 0.3)]:
        made.add(step, "test", sums(error))
    made.fetch()
    made.close()
    summary = made.summary()
    assert (summary["best_test_error"], summary["best_test_step"]) == (0.1, 6)
    assert summary["test_error"] == 0.3


def test_another_process_writes_the_same_metrics_to_the_last_byte(config, finished, tmp_path):
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
    assert results(tmp_path) == results(finished)


def test_another_seed_has_other_metrics(configure, finished, tmp_path):
    train(configure({"seed": 1}), tmp_path)
    first, other = read_lines(finished), read_lines(tmp_path)
    assert all(a["loss"] != b["loss"] for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("at_call", [1, 3, 4, 6])  # before and after each checkpoint
def test_a_run_that_is_interrupted_anywhere_has_the_results_of_one_that_is_not(
    config, finished, tmp_path, at_call
):
    calls = []

    def interrupt(progress):
        calls.append(progress)
        if len(calls) == at_call:
            raise Interrupt

    with pytest.raises(Interrupt):
        train(config, tmp_path, interrupt)
    assert not (tmp_path / "summary.json").exists()
    train(config, tmp_path)
    assert results(tmp_path) == results(finished)


def test_a_run_that_is_killed_while_it_writes_a_line_resumes_from_its_checkpoint(
    config, finished, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "10")
    metrics = workdir / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-30])
    seen, told = [], []
    train(config, workdir, seen.append, told.append)
    assert [progress.step for progress in seen] == [9, 10, 10]
    assert results(workdir) == results(finished)
    _, compiling, _, last = told
    assert compiling == (
        "compiling 8 layers (cifar) for batches of 16 8 x 8 x 1 images: dispatches of 1 or 3 "
        "training steps and evaluation ..."
    )
    assert last == "continues from step 6 of 10"


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


def test_a_finished_run_of_an_earlier_version_is_recognized_by_its_fields_of_then(
    config, finished, tmp_path
):
    shutil.copytree(finished, tmp_path / "old")
    saved = to_dict(config)
    del saved["task"], saved["diagnostics"], saved["model"]["stem_pool"]
    saved["data"]["subset"] = saved["data"].pop("subset_seed")
    (tmp_path / "old" / "config.json").write_text(json.dumps(saved))
    assert train(config, tmp_path / "old") == read_json(finished / "summary.json")


def test_another_config_in_the_same_folder_is_refused_with_the_fields_that_differ(
    configure, finished
):
    before = (finished / "config.json").read_bytes()
    another = configure({"optimizer.learning_rate": 0.2, "seed": 3})
    with pytest.raises(
        UserError, match=r"optimizer\.learning_rate is 0\.1 there and 0\.2"
    ) as refusal:
        train(another, finished)
    assert "seed is 0 there and 3 here" in str(refusal.value)
    assert "model.depth" not in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert (finished / "config.json").read_bytes() == before


def test_a_dataset_that_is_not_prepared_is_refused_and_nothing_is_written(configure, tmp_path):
    with pytest.raises(UserError, match="'imagenet2012' is not prepared"):
        train(configure({"data.name": "imagenet2012"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("regression")
def test_a_loss_that_diverges_is_null_under_record_and_the_run_continues(configure, tmp_path):
    config = configure({"optimizer.learning_rate": 1e30, "train.nonfinite": "record"})
    summary = train(config, tmp_path)
    assert math.isnan(summary["test_loss"])
    assert [line["loss"] for line in read_lines(tmp_path)][-2:] == [None, None]
    on_file = read_json(tmp_path / "summary.json")
    assert (on_file["train_loss"], on_file["test_loss"], on_file["steps"]) == (None, None, 10)
    again = train(config, tmp_path)
    assert math.isnan(again["test_loss"])


def test_what_is_compiled_is_told_before_it_is(configure, regression, tmp_path, monkeypatch):
    events = []

    def compile_for(*arguments, compile_for=trainers.compile_for):
        events.append("compiled")
        return compile_for(*arguments)

    monkeypatch.setattr(trainers, "compile_for", compile_for)
    train(
        configure({"data.crop_padding": 0, "data.flip": False}),
        tmp_path,
        announce=lambda text: events.append(text.split()[0]),
    )
    assert events[1:3] == ["compiling", "compiled"]


def test_metrics_are_fetched_while_the_next_dispatch_runs(config, tmp_path, monkeypatch):
    events = []

    def run(runner, state, dispatch, run=loop.StepRunner.run):
        events.append(f"run {dispatch.steps}")
        return run(runner, state, dispatch)

    monkeypatch.setattr(loop.StepRunner, "run", run)
    train(config, tmp_path, lambda progress: events.append(f"fetch {progress.step}"))
    assert events == [
        "run 3",
        "run 3",
        "fetch 3",
        "fetch 6",  # before the checkpoint of step 6
        "fetch 6",
        "run 3",
        "run 1",
        "fetch 9",
        "fetch 10",
        "fetch 10",
    ]


def test_progress_has_the_latest_metrics_of_both_splits(config, finished, tmp_path):
    seen = []
    train(config, tmp_path, seen.append)
    last = seen[-1]
    assert (last.step, last.steps) == (10, 10)
    summary = read_json(finished / "summary.json")
    assert last.metrics == {name: summary[name] for name in last.metrics}
    assert last.metrics.keys() == {"train_loss", "train_error", "test_loss", "test_error"}
    assert "test_error" not in seen[0].metrics
    assert [(each.step, each.test_step) for each in seen] == [
        (3, None),
        (6, None),
        (6, 6),
        (9, 6),  # whose test error is that of step 6
        (10, 6),
        (10, 10),
    ]


def test_the_lock_has_the_progress_at_the_last_beat_and_stays_with_a_caller(config, tmp_path):
    notes = []

    def beat(progress):
        claim.beat()
        notes.append(read_holder(tmp_path))

    with try_claim(tmp_path) as claim:
        train(config, tmp_path, beat, claim=claim)
        assert read_holder(tmp_path)["token"] == claim.token
    assert [each["step"] for each in notes] == [3, 6, 6, 9, 10, 10]
    assert {(each["state"], each["steps"]) for each in notes} == {("training", 10)}
    assert notes[0]["seconds_left"] is None
    assert notes[3]["seconds_left"] > 0
    assert notes[-1]["seconds_left"] == 0
    assert notes[-1]["images_per_second"] > 0


def test_a_run_whose_lock_is_lost_while_it_was_paused_writes_no_summary(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(lock, "TIMEOUT_SECONDS", -1.0)  # as if it had been paused for long
    monkeypatch.setattr(lock, "end_process", lambda _: sys.exit(lock.EXIT_LOST))
    with pytest.raises(SystemExit), try_claim(tmp_path) as claim:
        train(config, tmp_path, lambda _: (tmp_path / "lock").unlink(missing_ok=True), claim=claim)
    assert not (tmp_path / "summary.json").exists()


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(history, "time", clock)
    return clock


def test_the_rate_counts_the_images_of_finished_dispatches_only(config, tmp_path, clock):
    made = make_history(config, tmp_path)
    rates = []
    for now, step in [(0, 3), (2, 6), (4, 9), (6, 12)]:  # a dispatch takes 2 s
        clock.now = now
        made.add(step, "train", sums(0.5))
        made.fetch(before=step)
        rates.append(made.images_per_second)
    clock.now = 8
    made.fetch()
    made.close()
    rates.append(made.images_per_second)
    steady = 3 * BATCH / 2
    assert rates == pytest.approx([0, steady, steady, steady, steady])


def test_a_resumed_run_counts_only_its_own_images(config, tmp_path, clock):
    made = make_history(config, tmp_path, first_step=6)
    clock.now = 4
    made.add(9, "train", sums(0.5))
    made.fetch()
    made.close()
    assert made.images_per_second == pytest.approx(3 * BATCH / 4)


def test_a_resumed_run_appends_metrics_to_those_up_to_its_step(config, tmp_path):
    text = ""
    for first_step, steps in [(0, (3, 6, 9)), (6, (9, 10))]:
        made = make_history(config, tmp_path, text, first_step)
        for step in steps:
            made.add(step, "train", sums(0.5))
            made.fetch()
            if step == 6:
                text, _ = made.sync()
        made.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [3, 6, 9, 10]


def test_a_run_with_an_ema_has_its_test_metrics_beside_those_of_the_parameters(
    configure, regression, tmp_path
):
    config = configure({"optimizer.ema_decay": 0.5, "data.flip": False})
    train(config, tmp_path)
    for line in read_lines(tmp_path):
        averaged = {"ema_loss", "ema_error"} & line.keys()
        assert averaged == ({"ema_loss", "ema_error"} if line["split"] == "test" else set())


@pytest.fixture
def evaluated(configure, regression, tmp_path):
    """The folder of a run of softmax regression on shifted images, with `train.evaluate_train`."""
    config = configure({"train.evaluate_train": True})
    train(config, tmp_path / "evaluated")
    return tmp_path / "evaluated"


def test_the_whole_training_split_is_evaluated_beside_the_means_over_steps(evaluated, configure):
    lines = [line for line in read_lines(evaluated) if line["split"] != "train"]
    assert [(line["step"], line["split"]) for line in lines] == [
        (6, "train_set"),
        (6, "test"),
        (10, "train_set"),
        (10, "test"),
    ]
    trainer, restored = loop.restore_run(evaluated, "last", print)
    arrays = jax.device_get(trainer.source.example_arrays()[0])
    pixels = (arrays["image"] / 255 - trainer.statistics.mean) / trainer.statistics.std
    head = restored.state.params["head"]
    logits = pixels.reshape(1437, -1) @ head["kernel"] + head["bias"]
    [_, _, last, _] = lines
    assert last["error"] == pytest.approx(np.mean(logits.argmax(1) != arrays["label"]))
    summary = read_json(evaluated / "summary.json")
    assert summary["train_set_error"] == last["error"] != summary["train_error"]


def test_evaluating_the_training_split_changes_nothing_else(evaluated, configure, tmp_path):
    train(configure(), tmp_path / "other")
    others = [line for line in read_lines(evaluated) if line["split"] != "train_set"]
    assert others == read_lines(tmp_path / "other")


def test_evaluate_returns_the_metrics_of_the_last_line_of_a_split(evaluated):
    *_, train_set, test = read_lines(evaluated)
    for split, line in {"train": train_set, "test": test}.items():
        assert evaluate(evaluated, split=split) == {
            "step": 10,
            f"{line['split']}_loss": pytest.approx(line["loss"]),
            f"{line['split']}_error": line["error"],
        }


def test_evaluate_returns_the_metrics_of_the_last_test_line(finished):
    last = read_lines(finished)[-1]
    assert evaluate(finished) == {
        "step": 10,
        "test_loss": pytest.approx(last["loss"]),
        "test_error": last["error"],
    }


def test_evaluate_refuses_a_folder_that_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        evaluate(tmp_path)
    assert not list(tmp_path.iterdir())


def test_evaluate_refuses_a_run_without_a_checkpoint(finished, tmp_path):
    shutil.copy(finished / "config.json", tmp_path)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        evaluate(tmp_path)
