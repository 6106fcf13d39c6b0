"""What TensorBoard and W&B show, read back by their own formats."""

import os
import signal
import subprocess
import sys
import time

import pytest

from resjax.cli import main
from resjax.tracking import find_tracker
from resjax.tracking.follower import UNFINISHED, RunFollower, Target


def only(tracker):
    return pytest.mark.parametrize("tracker", [tracker], indirect=True)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def follow_four_steps(run, tracker):
    """Returns a follower that has read four steps, and the texts of the files after two."""
    follower = RunFollower(run.folder, Target(tracker, find_tracker(tracker, "--to")))
    run.train(1, 2)
    checkpoint = run.texts
    run.train(3, 4)
    follower.update()
    return follower, checkpoint


def test_a_replay_shows_every_value_once_with_config_histograms_and_state(
    fake_run, tracker, require_shown, read_shown, capsys
):
    run = fake_run("8 layers", model__depth=8, data__flip=True)
    run.train(0, 1, 2, 3)
    run.finish(parameters=77)
    for _ in range(2):
        assert main(["track", str(run.folder.parent), f"--to={tracker}"]) == 0
    first, _, second, _ = capsys.readouterr().out.splitlines()
    assert first == f"{run.folder}: 4 steps with values, finished"
    assert second == f"{run.folder}: unchanged"
    shown = read_shown(tracker, run.folder / "tracking")
    require_shown(run.folder, shown, tracker)
    assert shown.histograms == {"gradient_norm/all_layers": {0: 3, 1: 3, 2: 2, 3: 3}}
    assert shown.state == "finished"
    if tracker == "tensorboard":
        assert shown.config["model.depth"] == 8
        assert shown.config["data.flip"] is True
        assert shown.values["summary/parameters"] == {3: 77}
    else:
        assert shown.config["model"]["depth"] == 8
        assert shown.config["data"]["flip"] is True


def test_the_truth_is_shown_after_kills_of_follower_and_training(
    fake_run, tracker, require_shown, read_shown
):
    run = fake_run()
    run.train(1, 2)
    checkpoint = run.texts
    run.train(3, 4)
    target = Target(tracker, find_tracker(tracker, "--to"))
    script = (
        "import sys; from pathlib import Path; from resjax.tracking import find_tracker\n"
        "from resjax.tracking.follower import RunFollower, Target\n"
        "name, run = sys.argv[1:]\n"
        "RunFollower(Path(run), Target(name, find_tracker(name, ''))).update()\n"
        "print('followed', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, tracker, str(run.folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == b"followed\n"
        process.kill()
    run.start(*checkpoint)  # the training was killed too, and is resumed
    run.train(3, shift=0.5)
    follower = RunFollower(run.folder, target)
    follower.update()
    run.train(4, shift=0.5)
    run.finish()
    follower.update()
    shown = read_shown(tracker, run.folder / "tracking")
    require_shown(run.folder, shown, tracker)
    assert shown.state == "finished"


def test_a_rewind_while_following_leaves_one_copy(fake_run, tracker, require_shown, read_shown):
    run = fake_run()
    follower, checkpoint = follow_four_steps(run, tracker)
    run.start(*checkpoint)
    run.train(3, shift=0.25)
    follower.update()
    follower.update(UNFINISHED)
    require_shown(run.folder, read_shown(tracker, run.folder / "tracking"), tracker)


@only("tensorboard")
def test_a_running_tensorboard_drops_what_a_resume_rewound(fake_run, tracker):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fake_run()
    follower, checkpoint = follow_four_steps(run, tracker)
    running = EventAccumulator(str(run.folder / "tracking")).Reload()
    assert [event.step for event in running.Scalars("train/loss")] == [1, 2, 3]
    run.start(*checkpoint)
    run.train(3, shift=0.25)
    run.finish()
    follower.update()
    running.Reload()
    events = running.Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 3]
    assert events[-1].value == pytest.approx(0.25 + 1 / 6)


def test_runs_go_to_one_folder_each(fake_run, tracker, require_shown, read_shown, tmp_path):
    runs = [fake_run(f"runs/{name}", seed=seed) for seed, name in enumerate("ab")]
    for run in runs:
        run.train(1, 2)
        run.finish()
    out = tmp_path / "out"
    command = ["track", str(tmp_path / "runs"), f"--to={tracker}", f"--out={out}", "--project=p"]
    assert main(command) == 0
    assert {each.name for each in out.iterdir()} == {f"{r.folder.name}-{r.id}" for r in runs}
    for run in runs:
        shown = read_shown(tracker, out / f"{run.folder.name}-{run.id}")
        require_shown(run.folder, shown, tracker)
        assert not (run.folder / "tracking").exists()


@only("wandb")
def test_wandb_gets_the_digest_as_id_and_the_project(fake_run, tracker, tmp_path):
    run = fake_run()
    run.train(1)
    run.finish()
    assert main(["track", str(run.folder), "--to=wandb", "--project=mine"]) == 0
    [file] = run.folder.glob("tracking/wandb/offline-run-*/*.wandb")
    assert file.name == f"run-{run.id}.wandb"
    assert b"mine" in file.read_bytes()


@only("tensorboard")
def test_follow_ends_with_a_signal_when_all_is_written(
    fake_run, tracker, require_shown, read_shown
):
    run = fake_run()
    command = [sys.executable, "-m", "resjax", "track", str(run.folder), "--to=tensorboard"]
    with subprocess.Popen([*command, "--follow"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("following runs in")
        run.train(1, 2, 3)
        deadline = time.monotonic() + 30
        while not [*run.folder.glob("tracking/events*")] and time.monotonic() < deadline:
            time.sleep(0.05)
        run.train(4)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    shown = read_shown(tracker, run.folder / "tracking")
    require_shown(run.folder, shown, tracker)
    assert shown.state == "unfinished"
