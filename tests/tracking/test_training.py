"""The field `track`: a follower beside the training of a small network."""

import json
import signal
import subprocess
import sys
import time

import pytest

from resjax.config import default_config, digest, override, resolve
from resjax.errors import UserError
from resjax.sweeps.experiment import plan
from resjax.tracking.process import wait_for_followers
from resjax.train.loop import train
from resjax.train.signals import Stopped, StopRequest

SMALLEST = {
    "model.depth": 8,
    "model.width": 4,
    "data.batch_size": 16,
    "train.steps": 12,
    "train.log_every": 2,
    "train.eval_every": 4,
    "train.checkpoint_every": 4,
    "diagnostics.every": 4,
}


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Waits longer for followers, which have a low priority, than a user's run does."""
    monkeypatch.setattr("resjax.tracking.process.END_SECONDS", 300.0)


def smallest(**fields):
    return resolve(override(default_config(), SMALLEST | fields))


def stop_at(stop, step):
    """Returns a listener that requests a stop as a signal does."""

    def listen(progress):
        if progress.step >= step:
            stop.signal = signal.SIGTERM

    return listen


def test_a_run_that_is_stopped_and_resumed_is_one_run_with_every_value(
    tracker, tmp_path, require_shown, read_shown
):
    config, run, stop = smallest(track=tracker), tmp_path / "run", StopRequest()
    with pytest.raises(Stopped):
        train(config, run, stop_at(stop, 6), stop=stop)
    wait_for_followers()
    shown = read_shown(tracker, run / "tracking")
    require_shown(run, shown, tracker)
    assert shown.state == "unfinished"
    train(config, run)
    wait_for_followers()
    shown = read_shown(tracker, run / "tracking")
    require_shown(run, shown, tracker)
    assert shown.state == "finished"
    assert shown.values["train/loss"].keys() == {2, 4, 6, 8, 10, 12}


def test_the_tracker_is_no_part_of_a_runs_identity(tmp_path):
    assert digest(smallest(track="wandb")) == digest(smallest())
    experiment = tmp_path / "trackers.py"
    experiment.write_text('def sweep():\n    yield {"track": "wandb"}\n    yield {}\n')
    with pytest.raises(UserError, match="two of its runs are the same: track=wandb and without"):
        plan(experiment, override(default_config(), SMALLEST))


FAILING = """
import sys

class Exits:
    def __init__(self, run):
        sys.exit(3)

class Hangs:
    def __init__(self, run):
        import time
        time.sleep(600)
"""


@pytest.mark.parametrize(
    ("name", "problem"),
    [("Exits", "the follower ended with code 3"), ("Hangs", "the follower is still writing")],
)
def test_a_tracker_that_fails_or_hangs_does_not_hinder_training(
    name, problem, tmp_path, monkeypatch
):
    (tmp_path / "my_tracker.py").write_text(FAILING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("resjax.tracking.process.END_SECONDS", 300.0 if name == "Exits" else 0.5)
    followers = []
    monkeypatch.setattr(
        "resjax.tracking.process.subprocess.Popen",
        lambda *args, _start=subprocess.Popen, **kw: (
            followers.append(_start(*args, **kw)) or followers[-1]
        ),
    )
    warnings = []
    summary = train(
        smallest(track=f"my_tracker:{name}", **{"diagnostics.every": 0}),
        tmp_path / "run",
        warn=warnings.append,
    )
    assert summary["steps"] == 12
    wait_for_followers()
    for follower in followers:
        follower.kill()
        follower.wait()
    [warning] = warnings
    assert problem in warning
    assert f"`resjax track {tmp_path / 'run'} --to=my_tracker:{name}` writes what is" in warning


def test_the_reason_of_a_failure_is_shown(tmp_path, monkeypatch, read_shown):
    pytest.importorskip("tensorboard", reason="needs the extra `tracking`")

    def fail(progress):
        if progress.step == 8:
            raise MemoryError("no room\nat all")

    run = tmp_path / "run"
    with pytest.raises(MemoryError):
        train(smallest(track="tensorboard"), run, fail)
    wait_for_followers()
    assert (
        read_shown("tensorboard", run / "tracking").state == "failed: MemoryError: no room at all"
    )


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_is_one_run_with_every_value(
    tracker, tmp_path, require_shown, read_shown
):
    run = tmp_path / "run"
    config = tmp_path / "config.py"
    config.write_text("from resjax.config import default_config as get_config\n")
    fields = SMALLEST | {"train.steps": 4000, "track": tracker}
    options = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "resjax", "train", f"--config={config}", f"--workdir={run}"]
    with subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL) as process:
        while not (run / "checkpoints/8").exists():
            time.sleep(0.05)
        process.kill()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] < 4000
    options[3] = f"--config.train.steps={max(steps) + 40}"
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    shown = read_shown(tracker, run / "tracking")
    require_shown(run, shown, tracker)
    assert shown.state == "finished"
