"""Replaying and following run folders, into a tracker in memory."""

import json
import shutil
from functools import partial

import pytest

from resjax.run_files import RunError
from resjax.tracking.follower import UNFINISHED, RunFollower, Target, track

ERROR = RunError("now", 1, False, "no\nroom", "failed", "2026-01-01", {})._asdict()


@pytest.fixture
def target(recorder):
    return Target("recorder", recorder)


@pytest.fixture
def follow(target):
    """A function from a run to a follower of it."""
    made = []

    def follow(run):
        made.append(RunFollower(run.folder, target))
        return made[-1]

    yield follow
    for follower in made:
        follower.close()


@pytest.fixture
def replay(target, tmp_path):
    """A function that replays all runs; returns the problems."""

    def replay(root=tmp_path, **fields):
        problems = []
        track(root, target._replace(**fields), lambda follower, _: problems.append(follower))
        return [follower.problem for follower in problems if follower.problem]

    return replay


def test_a_replay_gives_every_value_once(fake_run, replay, recorder, require_shown):
    run = fake_run()
    run.train(0, 1, 2, 3)
    run.finish()
    assert replay() == []
    require_shown(run.folder, recorder.runs[run.id])
    assert recorder.runs[run.id].state == "finished"


def test_replaying_again_begins_no_run(fake_run, replay, recorder):
    for name, seed in (("a", 0), ("b", 1)):
        run = fake_run(name, seed=seed)
        run.train(1, 2)
        run.finish() if seed else run.stop()
    replay()
    replay()
    assert len(recorder.begun) == 2


def test_a_run_that_goes_on_after_a_replay_is_begun_anew(fake_run, replay, recorder, require_shown):
    run = fake_run()
    run.train(1, 2)
    run.stop()
    replay()
    run.start(*run.texts)
    run.train(3)
    run.finish()
    replay()
    require_shown(run.folder, recorder.runs[run.id])
    assert recorder.begun == [run.id, run.id]


def test_a_follower_that_was_killed_loses_nothing(fake_run, follow, replay, recorder):
    run = fake_run()
    run.train(1, 2, 3)
    killed = follow(run)
    killed.update()
    killed.close()
    run.finish()
    replay()
    assert recorder.begun == [run.id, run.id]
    assert recorder.runs[run.id].values["test/loss"].keys() == {1, 2, 3}


def test_the_newest_step_is_complete_when_the_next_one_begins(fake_run, follow, recorder):
    run = fake_run()
    follower = follow(run)
    for step in (1, 2, 3):
        run.train(step)
        follower.update()
        shown = recorder.runs[run.id].values if step > 1 else {}
        assert [*shown.get("test/loss", {})] == [*range(1, step)]
    run.finish()
    follower.update()
    assert [*recorder.runs[run.id].values["test/loss"]] == [1, 2, 3]
    assert len(recorder.begun) == 1


def test_a_torn_line_is_read_when_it_is_complete(fake_run, follow, recorder, require_shown):
    run = fake_run()
    run.train(1, 2)
    follower = follow(run)
    metrics = run.folder / "metrics.jsonl"
    line = '{"step": 3, "split": "train", "loss": 0.125}'
    for part in (line[:20], line[20:], "\n", '{"step": 4, "split": "train", "loss": 0.5}'):
        with metrics.open("a") as file:
            file.write(part)
        assert follower.update()
        assert not follower.problem
    assert recorder.runs[run.id].values["train/loss"].keys() == {1, 2}
    follower.update(UNFINISHED)
    require_shown(run.folder, recorder.runs[run.id])
    with metrics.open("a") as file:
        file.write("\n")
    follower.update(UNFINISHED)
    assert not follower.problem
    require_shown(run.folder, recorder.runs[run.id])


@pytest.mark.parametrize("stopped", [True, False])
def test_a_resumed_run_that_rewinds_shows_the_truth_afterwards(
    fake_run, follow, recorder, require_shown, stopped
):
    run = fake_run()
    follower = follow(run)
    run.train(1, 2)
    checkpoint = run.texts
    run.train(3, 4, 5)
    if stopped:
        run.stop()
    follower.update()
    assert 4 in recorder.runs[run.id].values["train/loss"]
    run.start(*checkpoint)
    run.train(3, shift=0.5)
    follower.update()
    assert recorder.runs[run.id].values["train/loss"].keys() == {1, 2}
    run.train(4, shift=0.5)
    run.finish()
    follower.update()
    require_shown(run.folder, recorder.runs[run.id])
    assert set(recorder.begun) == {run.id}


def test_of_a_step_that_an_earlier_version_repeated_the_later_values_count(
    fake_run, follow, replay, recorder, require_shown
):
    run = fake_run()
    run.train(1, 2, 3, 4)
    follower = follow(run)
    follower.update()
    run.train(2, 3, 4, 5, shift=0.5)  # appended, not rewound
    run.finish()
    follower.update()
    require_shown(run.folder, recorder.runs[run.id])
    replay()
    require_shown(run.folder, recorder.runs[run.id])


@pytest.mark.parametrize(
    ("file", "content", "state"),
    [
        (
            "error.txt",
            "Traceback\n  File x\nMemoryError: no room\n",
            "failed: MemoryError: no room",
        ),
        ("error.json", json.dumps(ERROR), "failed: no room"),
        ("diverged.json", '{"step": 3, "reason": "bad"}', "diverged: step 3: bad"),
        ("summary.json", '{"steps": 3, "train_loss": null}', "diverged: "),
        ("summary.json", '{"steps": 3, "train_loss": 0.5}', "finished"),
    ],
)
def test_the_state_says_how_a_run_ended(fake_run, replay, recorder, file, content, state):
    run = fake_run()
    run.train(1, 3)
    if content.endswith("null}"):
        run.train(4, shift=float("nan"))
    run.stop()
    replay()
    assert recorder.runs[run.id].state == "unfinished"
    (run.folder / file).write_text(content)
    replay()
    assert recorder.runs[run.id].state.startswith(state)


def test_a_failed_run_that_is_trained_again_is_not_failed(fake_run, follow, recorder):
    run = fake_run()
    run.train(1, 2)
    (run.folder / "error.txt").write_text("MemoryError: no room")
    follower = follow(run)
    follower.update()
    assert follower.end is None
    run.stop()
    follower.update()
    assert recorder.runs[run.id].state == "failed: MemoryError: no room"


def test_a_damaged_run_is_left_out_and_the_others_are_not(fake_run, replay, recorder):
    broken = fake_run("broken", seed=1)
    intact = fake_run("intact")
    for run in (broken, intact):
        run.train(1, 2)
        run.finish()
    with (broken.folder / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    [problem] = replay()
    assert problem.startswith(f"{broken.folder / 'metrics.jsonl'}: damaged, line 5 is not a line")
    assert recorder.begun == [intact.id]


def test_damage_leaves_what_a_tracker_shows(fake_run, replay, recorder, require_shown, tmp_path):
    run = fake_run()
    run.train(1, 2)
    run.stop()
    replay()
    shutil.copytree(run.folder, copy := tmp_path.parent / f"{tmp_path.name}-copy")
    (run.folder / "config.json").write_text("[]")
    assert len(replay()) == 1
    require_shown(copy, recorder.runs[run.id])


def test_following_reports_a_damaged_run_once_and_goes_on_when_it_is_restored(
    fake_run, follow, recorder, require_shown
):
    run = fake_run()
    run.train(1, 2)
    texts = run.texts
    (run.folder / "layers.jsonl").write_text("nonsense\n")
    follower = follow(run)
    assert [follower.update() for _ in range(3)] == [True, False, False]
    assert "layers.jsonl: damaged, line 1" in follower.problem
    run.start(*texts)
    run.finish()
    assert follower.update()
    assert not follower.problem
    require_shown(run.folder, recorder.runs[run.id])


def test_two_folders_with_one_config_are_one_run(fake_run, replay, recorder):
    runs = [fake_run(name) for name in ("a", "b")]
    for run in runs:
        run.train(1)
        run.finish()
    [problem] = replay()
    first, second = (run.folder for run in runs)
    assert problem == f"{second}: has the config of {first}, so both are the run {runs[0].id}"
    assert len(recorder.begun) == 1


def test_a_run_is_tracked_by_one_process_at_a_time(fake_run, follow, replay, recorder):
    run = fake_run()
    run.train(1, 2)
    follower = follow(run)
    follower.update()
    assert replay() == [f"{run.folder}: another process is tracking it"]
    run.finish()
    follower.update()
    assert replay() == []
    assert recorder.begun == [run.id]


def test_another_project_is_another_place(fake_run, replay, recorder):
    run = fake_run()
    run.train(1)
    run.finish()
    for project in ("", "p", "p", "q"):
        replay(project=project)
    assert len(recorder.begun) == 3


def test_a_replay_that_was_killed_is_repeated(fake_run, replay, recorder, target):
    run = fake_run()
    run.train(1, 2)
    run.stop()
    replay(project="p")
    (run.folder / "lock").touch()
    killed = RunFollower(run.folder, target._replace(project="q"))
    killed.update()
    killed.close()
    run.stop()
    replay(project="p")
    assert len(recorder.begun) == 3


def test_runs_below_a_folder_are_found_and_those_that_start_are_followed(
    fake_run, target, recorder, tmp_path, monkeypatch
):
    (tmp_path / "sweep/runs").mkdir(parents=True)
    first = fake_run("sweep/runs/a")
    first.train(1, 2)
    started = []

    def wait(seconds):
        if not started:
            first.finish()
            started.append(fake_run("sweep/runs/b", seed=1))
            started[0].train(1, 2)
            return None
        if len(started) == 1:
            started.append(fake_run("sweep/runs/c", seed=2))
            return None
        return UNFINISHED

    assert track(tmp_path, target, lambda *_: None, wait) == 3
    assert [run.state for run in recorder.runs.values()] == ["finished", *["unfinished"] * 2]
    assert recorder.begun == [first.id, *(run.id for run in started)]
    assert recorder.runs[started[0].id].values["train/loss"].keys() == {1, 2}


def test_a_tracker_of_a_run_in_a_sweep_learns_its_group_and_folder(fake_run, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.json").write_text('{"experiment": "depth", "runs": []}')
    run = fake_run("sweep/runs/a")
    run.train(1)
    run.finish()
    begun = []

    class Tracker:
        def __init__(self, run):
            begun.append(run)

        log = flush = close = lambda *_: None

    follow = partial(track, tmp_path, report=lambda *_: None)
    follow(target=Target("my:Tracker", Tracker, project="p"))
    follow(target=Target("my:Tracker", Tracker, out=tmp_path / "out"))
    assert [each.folder for each in begun] == [
        run.folder / "tracking",
        tmp_path / "out" / f"a-{run.id}",
    ]
    assert (begun[0].id, begun[0].group, begun[0].project) == (run.id, "depth", "p")
    assert begun[0].config["data"]["name"] == "digits"
