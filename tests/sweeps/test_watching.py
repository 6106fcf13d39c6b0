"""A launcher whose workers are elsewhere sees what they do in the sweep folder."""

import pytest

from resjax.config import default_config, override
from resjax.sweeps import watching
from resjax.sweeps.experiment import plan
from resjax.sweeps.failures import Failure, Retries
from resjax.sweeps.plan_files import write_sweep
from resjax.sweeps.watching import SweepWatch
from resjax.train import lock, records
from resjax.train.lock import try_claim

RETRIES = Retries("this-launch", 1)


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Watches a sweep of four runs; `watch.shown` lists the states of those that have ended."""
    monkeypatch.setattr(watching, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(watching, "LOOK_COST", 0.0)
    experiment = tmp_path / "seeds.py"
    experiment.write_text(
        "from resjax.sweeps import param\nsweep = lambda: param('seed', (0, 1, 2, 3))\n"
    )
    planned = plan(experiment, override(default_config(), {}))
    shown = []
    stored = write_sweep(planned, tmp_path / "w", "", RETRIES.launch)
    watch = SweepWatch(stored, RETRIES, lambda run: shown.append(run.cells[1]))
    watch.shown = shown
    return watch


def finish(run):
    run.folder.mkdir(parents=True, exist_ok=True)
    records.write_json(run.folder / "config.json", run.content)
    (run.folder / "provenance.json").write_text("{}")
    records.write_json(run.folder / "summary.json", {"steps": 5, "images_per_second": 7.0})


def test_runs_that_were_finished_before_are_told_from_later_ones(watch):
    first, second, *others = watch.left
    finish(first)
    watch.look()
    finish(second)
    watch.look()
    assert watch.shown == ["finished before", "finished"]
    assert watch.left == watch.open == others
    assert watch.unfinished == 2


def test_a_run_that_a_worker_holds_is_shown_with_its_progress_and_is_not_open(watch, monkeypatch):
    monkeypatch.setenv("RAY_JOB_ID", "0a")
    run, *others = watch.left
    with try_claim(run.folder) as claim:
        claim.note(state="training", step=30, steps=100)
        claim.beat()
        watch.look()
        assert run.state == "running"
        assert (run.progress.step, run.progress.steps) == (30, 100)
        assert watch.held_by("Ray 0a") == [run]
        assert watch.held_by("Ray 0b") == []
        assert watch.open == others
    watch.look()
    assert run in watch.open
    assert run.state == "queued"
    assert watch.shown == []


def test_a_failed_run_is_open_until_its_retries_are_used_up(watch):
    run = watch.left[0]
    RETRIES.record(run.folder, Failure("no room", ""), 0)
    watch.look()
    assert run in watch.open
    RETRIES.record(run.folder, Failure("no room", ""), 0)
    watch.look()
    assert watch.shown == ["failed: no room"]
    assert run not in watch.left


def test_a_failed_run_has_ended_although_its_dead_process_holds_the_lock(watch):
    run = watch.left[0]
    run.folder.mkdir()
    with try_claim(run.folder):
        content = (run.folder / "lock").read_bytes()
    (run.folder / "lock").write_bytes(content)
    for _ in range(2):
        RETRIES.record(run.folder, Failure("the worker process ended by SIGKILL", ""), 0)
    assert lock.Watch().state(run.folder) == lock.DEAD
    watch.look()
    assert watch.shown == ["failed: the worker process ended by SIGKILL"]
    assert run not in watch.left
