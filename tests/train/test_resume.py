"""A resumed run ends like one that nothing interrupted, and nothing damaged is ever used."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import optax
import pytest

import resjax
from resjax.config import Config, Optimizer, to_dict
from resjax.config.schema import Train
from resjax.errors import UserError
from resjax.run_files import ScheduleChange
from resjax.train import checkpoints
from resjax.train.identity import schedule_change
from resjax.train.loop import evaluate, train
from resjax.train.signals import Stopped, StopRequest
from resjax.train.verify import verify

TIMES = ("seconds", "compile_seconds", "images_per_second")


INTERVALS = {
    "train.log_every": 2,
    "train.eval_every": 4,
    "train.checkpoint_every": 4,
    "diagnostics.every": 4,
}


@pytest.fixture(scope="module")
def config(configure):
    return configure(INTERVALS)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The folder of a run that nothing interrupted, with checkpoints."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(config, workdir)
    return workdir


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of that run, which continues from its last intact checkpoint."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").unlink()
    return workdir


def results(workdir):
    """Everything that interruptions must not change."""
    summary = json.loads((workdir / "summary.json").read_text())
    files = [(workdir / name).read_bytes() for name in ("metrics.jsonl", "layers.jsonl")]
    return {name: value for name, value in summary.items() if name not in TIMES}, files


def largest_file(checkpoint):
    """A file that holds arrays."""
    return max(filter(os.path.isfile, checkpoint.rglob("*")), key=os.path.getsize)


def test_a_damaged_checkpoint_is_moved_away_and_the_previous_one_is_restored(
    config, finished, unfinished
):
    path = largest_file(unfinished / "checkpoints" / "10")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    warnings, steps = [], []
    train(config, unfinished, lambda progress: steps.append(progress.step), warn=warnings.append)
    assert len(warnings) == 1
    inside = path.relative_to(unfinished / "checkpoints" / "10")
    assert f"checkpoints/10 is damaged: {inside} changed since it was saved" in warnings[0]
    assert str(unfinished / "damaged" / "checkpoint-10") in warnings[0]
    assert (unfinished / "damaged" / "checkpoint-10").is_dir()
    assert steps[0] == 10  # after a restored 8
    assert results(unfinished) == results(finished)


def test_a_run_without_an_intact_checkpoint_starts_again_with_a_warning(
    config, finished, unfinished
):
    for checkpoint in (unfinished / "checkpoints").iterdir():
        largest_file(checkpoint).unlink()
    warnings = []
    train(config, unfinished, warn=warnings.append)
    assert "the run starts again" in warnings[-1]
    assert len(list((unfinished / "damaged").iterdir())) == len(warnings) - 1
    assert results(unfinished) == results(finished)


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_damaged_metrics_are_restored_from_the_checkpoint(config, finished, unfinished, damage):
    path = unfinished / "metrics.jsonl"
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        changed = content.replace(b"loss", b"lass", 1) if damage == "flipped" else content[:100]
        path.write_bytes(changed)
    warnings = []
    train(config, unfinished, warn=warnings.append)
    assert "its lines are restored from the checkpoint" in warnings[0]
    assert results(unfinished) == results(finished)
    kept = unfinished / "damaged" / "metrics.jsonl"
    assert kept.exists() == (damage != "gone")


def test_a_finished_run_continues_to_more_steps(configure, config, finished):
    workdir = finished.parent / "longer"
    shutil.copytree(finished, workdir)
    seen = []
    longer = configure(INTERVALS | {"train.steps": 14})
    summary = train(longer, workdir, seen.append, change_schedule=True)
    assert (summary["steps"], seen[0].step) == (14, 12)
    lines = (workdir / "metrics.jsonl").read_bytes()
    assert lines.startswith((finished / "metrics.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"14 of 14 steps, and train\.steps=10 leaves none"):
        train(config, workdir)
    assert [run["train.steps"] for run in rows(workdir)] == [14]


def rows(workdir):
    return resjax.load_runs(workdir).to_dict("records")


COSINE = INTERVALS | {"optimizer.schedule": "cosine"}


@pytest.fixture
def half(configure, regression, tmp_path):
    """The folder of a finished run of ten steps of a cosine."""
    train(configure(COSINE), tmp_path / "half")
    return tmp_path / "half"


@pytest.mark.parametrize("steps", [9, 14])
def test_another_number_of_steps_changes_the_schedule_only_with_consent(configure, half, steps):
    shutil.rmtree(half / "checkpoints" / "10")
    (half / "summary.json").unlink()
    changed = configure(COSINE | {"train.steps": steps})
    before = sorted(path.name for path in half.iterdir())
    with pytest.raises(UserError) as refusal:
        train(changed, half)
    message = str(refusal.value)
    assert "has trained 8 steps by the cosine schedule of a run of 10 steps" in message
    assert f"with train.steps={steps} their rates would be others (the last one" in message
    assert "and not 0.0206)" in message
    assert "--change-schedule" in message
    assert sorted(path.name for path in half.iterdir()) == before
    assert "train.schedule_change" not in rows(half)[0]
    if steps == 14:  # killed before its first checkpoint

        def kill(progress):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(changed, half, kill, change_schedule=True)
    summary = train(changed, half, change_schedule=steps == 9)  # consent is given once
    assert summary["steps"] == steps
    assert json.loads((half / "provenance.json").read_text())["schedule_changes"] == [
        {"step": 8, "steps": [10, steps]}
    ]
    assert rows(half)[0]["train.schedule_change"] == f"at step 8, 10 to {steps} steps"


@pytest.mark.parametrize(
    ("fields", "trained", "steps", "changes"),
    [
        ({"schedule": "constant"}, 100, 150, False),
        ({"schedule": "constant", "warmup_steps": 20}, 100, 150, False),
        ({"schedule": "steps", "boundaries": (0.5,)}, 50, 150, False),  # both before the boundary
        ({"schedule": "steps", "boundaries": (0.5,)}, 51, 150, True),
        ({"schedule": "steps", "boundaries": (0.5,)}, 20, 40, False),
        ({"schedule": "steps", "boundaries": (0.5,)}, 30, 40, True),
        ({"schedule": "he2015"}, 100, 150, True),
        ({"schedule": "cosine"}, 2, 150, True),
        ({"schedule": "onecycle"}, 2, 150, True),
        ({"schedule": "cosine"}, 0, 150, False),
        ({"schedule": "steps", "warmup_steps": 10}, 5, 150, False),
        ({"schedule": f"{__name__}:step_at_30"}, 100, 150, False),
        ({"schedule": f"{__name__}:linear"}, 100, 150, True),
    ],
)
def test_only_schedules_that_depend_on_the_number_of_steps_are_changed_by_it(
    fields, trained, steps, changes
):
    config = Config(optimizer=Optimizer(**fields), train=Train(steps=steps))
    saved = to_dict(replace(config, train=Train(steps=100)))
    expected = ScheduleChange(trained, (100, steps)) if changes else None
    assert schedule_change(saved, config, trained) == expected


def step_at_30(learning_rate, steps):
    return optax.piecewise_constant_schedule(learning_rate, {30: 0.1})


def linear(learning_rate, steps):
    return optax.linear_schedule(learning_rate, 0.0, steps)


def test_another_config_is_refused_with_the_fields_that_differ(configure, unfinished):
    with pytest.raises(UserError) as raised:
        train(configure({"seed": 3, "train.eval_every": 6}), unfinished)
    message = str(raised.value)
    assert "seed is 0 there and 3 here" in message
    assert "eval_every is" not in message
    assert "Fields that may change: train.steps, train.log_every, train.eval_every" in message


def test_the_checkpoint_knows_the_config_if_config_json_is_missing(configure, config, unfinished):
    (unfinished / "config.json").unlink()
    with pytest.raises(UserError, match="seed is 0 there and 3 here"):
        train(configure(INTERVALS | {"seed": 3}), unfinished)
    train(config, unfinished)


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_damaged_file_is_named_and_nothing_is_written(config, finished, tmp_path, name):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / name).write_text('{"steps": 1')
    before = sorted(path.name for path in workdir.iterdir())
    with pytest.raises(UserError, match=f"{name}: damaged"):
        train(config, workdir)
    assert sorted(path.name for path in workdir.iterdir()) == before


def stop_at(at):
    """A stop request, and a listener that makes it at a step."""
    stop = StopRequest()

    def listen(progress):
        if progress.step == at:
            stop.signal = signal.SIGTERM

    return stop, listen


@pytest.mark.parametrize("at", [2, 4])
def test_a_stopped_run_saves_and_continues(config, finished, tmp_path, at):
    stop, listen = stop_at(at)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM at step (\d+) of 10, saved") as raised:
        train(config, tmp_path, listen, stop=stop)
    assert raised.value.code == 143
    saved = int(str(raised.value).split("step ")[1].split()[0])
    assert at < saved < 10  # the listener is one dispatch behind
    assert (tmp_path / "checkpoints" / str(saved)).is_dir()
    seen = []
    train(config, tmp_path, seen.append)
    assert seen[0].step == saved + 2
    assert results(tmp_path) == results(finished)


def test_a_stop_request_at_the_last_step_lets_the_run_finish(config, finished, tmp_path):
    stop, listen = stop_at(10)
    train(config, tmp_path, listen, stop=stop)
    assert results(tmp_path) == results(finished)


def test_provenance_keeps_the_first_launch_and_seconds_count_all_launches(config, tmp_path):
    stop, listen = stop_at(4)
    with pytest.raises(Stopped):
        train(config, tmp_path, listen, stop=stop)
    path = tmp_path / "provenance.json"
    first = json.loads(path.read_text())
    newest = max((tmp_path / "checkpoints").iterdir(), key=lambda each: int(each.name))
    before = json.loads((newest / "record" / "metadata").read_text())["seconds"]
    assert before > 0
    start = time.monotonic()
    summary = train(config, tmp_path)
    took = time.monotonic() - start
    then = json.loads(path.read_text())
    assert {name: then[name] for name in first} == first
    assert [each["step"] for each in then["resumed"]] == [int(newest.name)]
    assert before < summary["seconds"] <= before + took + 0.01


@pytest.fixture
def disk(monkeypatch):
    """A disk with `disk.free` bytes; saves that fail are tried again at once."""
    state = SimpleNamespace(free=2**40)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: state)
    monkeypatch.setattr(checkpoints, "RETRY_SECONDS", 0.0)
    return state


def test_training_continues_with_a_warning_while_the_disk_is_full(config, finished, tmp_path, disk):
    def fill(progress):
        disk.free = 0 if progress.step < 8 else 2**40

    warnings = []
    train(config, tmp_path, fill, warn=warnings.append)
    assert "No space left on device" in warnings[0]
    assert results(tmp_path) == results(finished)
    assert (tmp_path / "checkpoints" / "10").is_dir()


def test_a_last_checkpoint_that_cannot_be_saved_is_an_error(config, finished, tmp_path, disk):
    def fill(progress):
        disk.free = 0 if progress.step > 4 else 2**40

    with pytest.raises(UserError) as raised:
        train(config, tmp_path, fill, warn=lambda _: None)
    message = str(raised.value)
    assert "step 10 could not be saved" in message
    assert "No space left on device; the newest checkpoint is of step 4" in message
    assert not (tmp_path / "summary.json").exists()
    disk.free = 2**40
    train(config, tmp_path)
    assert results(tmp_path) == results(finished)


def test_a_run_folder_that_vanishes_is_not_created_again(config, tmp_path):
    def vanish(progress):
        if progress.step == 4 and (tmp_path / "run").exists():
            # A rename, which takes effect at once even while a file is being written.
            os.rename(tmp_path / "run", tmp_path / "elsewhere")

    warnings = []
    with pytest.raises(UserError, match=r"could not be saved|cannot write to this folder"):
        train(config, tmp_path / "run", vanish, warn=warnings.append)
    assert warnings
    assert not (tmp_path / "run").exists()


def test_a_clock_that_jumps_changes_nothing(config, finished, tmp_path, monkeypatch):
    now, jumps = time.time, iter((-86_400, 86_400, -3, 7_200) * 9)
    offset = [0]

    def jump(progress):
        offset[0] += next(jumps)

    monkeypatch.setattr(time, "time", lambda: now() + offset[0])
    stop, listen = stop_at(2)

    def both(progress):
        jump(progress)
        listen(progress)

    with pytest.raises(Stopped):
        train(config, tmp_path, both, stop=stop)
    train(config, tmp_path, jump)
    assert results(tmp_path) == results(finished)


def test_evaluate_restores_the_best_or_a_step_and_skips_damaged_checkpoints(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    errors = {line["step"]: line["error"] for line in lines if line["split"] == "test"}
    kept = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    best = min(kept, key=errors.__getitem__)
    assert errors[best] == min(errors.values())
    assert evaluate(workdir, "best")["test_error"] == errors[best]
    assert evaluate(workdir, "8") == evaluate(workdir, "8") | {"step": 8, "test_error": errors[8]}
    with pytest.raises(UserError, match="no checkpoint of step 7; it has: "):
        evaluate(workdir, "7")
    largest_file(workdir / "checkpoints" / "10").unlink()
    warnings = []
    assert evaluate(workdir, "last", warnings.append)["step"] == 8
    assert "it is skipped" in warnings[0]
    assert (workdir / "checkpoints" / "10").is_dir()


def test_verify_finds_an_intact_run_intact(finished):
    (finding,) = verify(finished)
    assert not finding.damaged
    assert "8, 10" in finding.message
