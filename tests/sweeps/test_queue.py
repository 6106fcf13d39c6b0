"""The order in which a worker takes the runs of a sweep, and what it does with those that fail."""

import threading
from functools import cache

import pytest

from resjax.config import default_config, override, resolve, to_dict
from resjax.run_files import find_error
from resjax.sweeps import queue
from resjax.sweeps.attempts import Finished, Held
from resjax.sweeps.failures import Failure, Retries
from resjax.sweeps.queue import RunQueue
from resjax.sweeps.status import RunStatus
from resjax.train import records
from resjax.train.lock import try_claim
from resjax.train.signals import StopRequest

BROKEN = Failure("ValueError: no room", "Traceback ...\n")
REFUSED = Failure("lower the rate", "Traceback ...\n", retry=False)


@cache
def content(seed):
    return to_dict(resolve(override(default_config(), {"seed": seed})))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(queue, "POLL_SECONDS", 0.01)


@pytest.fixture
def runs(tmp_path):
    """Returns a function that makes runs by names such as "a0 a1 b0": a program and a seed."""
    return lambda names: [
        RunStatus(tmp_path / name, content(int(name[1:])), name[0]) for name in names.split()
    ]


@pytest.fixture
def train(tmp_path):
    """Trains what a launch has left; returns the attempts in their order, and the ends."""

    def train(runs, outcomes=None, launch="one", retries=1, wait=True, attempt=None):
        attempted, ended = [], []
        outcomes = outcomes or {}

        def finish(job, report):
            attempted.append(job.folder.name)
            outcome = outcomes.get(job.folder.name)
            outcome = outcome.pop(0) if isinstance(outcome, list) else outcome
            if outcome is None:
                write_finished(job.folder, job.content)
            return outcome

        def show_end(run):
            ended.append((run.folder.name, run.state, run.error))

        stop = StopRequest()
        taken = RunQueue(runs, None, Retries(launch, retries), show_end, stop, wait)
        taken.train(attempt or finish)
        return attempted, ended

    return train


def write_finished(folder, config):
    folder.mkdir(exist_ok=True)
    records.write_json(folder / "config.json", config)
    records.write_json(folder / "summary.json", {"steps": 3, "test_error": 0.5})


def test_runs_of_a_program_follow_each_other(runs, train):
    assert train(runs("a0 b0 a1 b1 c0"))[0] == ["a0", "a1", "b0", "b1", "c0"]


def test_a_program_that_another_worker_trains_comes_last(runs, train, tmp_path):
    with try_claim(tmp_path / "a0"):
        attempted, _ = train(runs("a0 a1 b0 b1 c0"), wait=False)
    assert attempted == ["b0", "b1", "c0", "a1"]


def test_runs_that_have_failed_come_last(runs, train):
    _, ended = train(runs("a0 a1 b0"), {"a0": BROKEN}, retries=0)
    assert ended[0] == ("a0", "failed", "ValueError: no room")
    attempted, ended = train(runs("a0 a1 b0 b1"), launch="two")
    assert attempted == ["b1", "a0"]
    assert [state for _, state, _ in ended] == ["finished before"] * 2 + ["finished"] * 2


@pytest.mark.parametrize("retries", [0, 2])
def test_a_failed_run_is_tried_again_after_the_others_and_then_reported(
    runs, train, tmp_path, retries
):
    attempted, ended = train(runs("a0 a1 a2"), {"a1": BROKEN}, retries=retries)
    assert attempted == ["a0", "a1", "a2"] + ["a1"] * retries
    again = [("a1", "failed, tried again", "ValueError: no room")] * retries
    assert [end for end in ended if end[0] == "a1"] == [*again, ("a1", "failed", BROKEN.error)]
    error = find_error(tmp_path / "a1")
    assert error[:5] == ("one", 1 + retries, False, "ValueError: no room", "failed")
    assert (tmp_path / "a1" / "error.txt").read_text() == BROKEN.report


def test_a_run_that_succeeds_at_last_has_no_error(runs, train, tmp_path):
    attempted, ended = train(runs("a0"), {"a0": [BROKEN, None]})
    assert (attempted, ended[-1]) == (["a0", "a0"], ("a0", "finished", ""))
    assert not list(tmp_path.glob("*/error.*"))


def test_a_mistake_of_the_user_is_not_tried_again(runs, train):
    assert train(runs("a0"), {"a0": REFUSED}, retries=5)[0] == ["a0"]


def test_the_attempts_of_a_launch_are_counted_across_its_workers(runs, train, tmp_path):
    error = Retries("one", 2).record(tmp_path / "a0", BROKEN, 0)
    assert (error.attempts, error.retry) == (1, True)
    attempted, ended = train(runs("a0"), {"a0": BROKEN}, retries=2)
    assert attempted == ["a0", "a0"]
    assert train(runs("a0"), retries=2) == ([], ended[-1:])


def test_launches_that_try_a_run_in_turns_do_not_go_on_for_ever(tmp_path):
    one, two = Retries("one", 1), Retries("two", 1)
    for attempts in (1, 2):
        for launch in (one, two):
            error = launch.record(tmp_path, BROKEN, 0)
            assert (error.launch, error.attempts) == (launch.launch, attempts)
    assert one.exhausted(error)
    assert two.exhausted(error)
    assert not Retries("three", 1).exhausted(error)


def test_a_damaged_error_json_is_no_failure(runs, train, tmp_path):
    (tmp_path / "a0").mkdir()
    for text in ("", "[]", '{"launch": 3}'):
        (tmp_path / "a0" / "error.json").write_text(text)
        assert find_error(tmp_path / "a0") is None
    assert train(runs("a0"))[0] == ["a0"]


def test_a_diverged_run_is_final(runs, train, tmp_path):
    (tmp_path / "a0").mkdir()
    records.write_json(tmp_path / "a0" / "config.json", content(0))
    records.write_json(tmp_path / "a0" / "diverged.json", {"step": 2, "reason": "not finite"})
    attempted, ended = train(runs("a0 a1"))
    assert attempted == ["a1"]
    assert ended[0] == ("a0", "diverged", "step 2: not finite")


def test_a_diverged_run_of_another_config_is_trained(runs, train, tmp_path):
    (tmp_path / "a0").mkdir()
    records.write_json(tmp_path / "a0" / "config.json", content(1))
    records.write_json(tmp_path / "a0" / "diverged.json", {"step": 2, "reason": "not finite"})
    assert train(runs("a0"))[0] == ["a0"]


def test_a_launch_waits_for_a_run_that_another_process_trains(runs, train, tmp_path):
    claim = try_claim(tmp_path / "a0")

    def end():
        write_finished(tmp_path / "a0", content(0))
        claim.release()

    timer = threading.Timer(0.3, end)
    timer.start()
    attempted, ended = train(runs("a0 a1"))
    timer.join()
    assert attempted == ["a1"]
    assert [state for _, state, _ in ended] == ["finished", "running elsewhere", "finished before"]
    assert ended[1][2].startswith("process ")


def test_a_launch_trains_a_run_that_another_process_has_left(runs, train, tmp_path):
    timer = threading.Timer(0.3, try_claim(tmp_path / "a0").release)
    timer.start()
    assert train(runs("a0 a1"))[0] == ["a1", "a0"]
    timer.join()


def test_a_worker_that_does_not_wait_leaves_a_held_run(runs, train, tmp_path):
    with try_claim(tmp_path / "a0"):
        assert train(runs("a0 a1"), wait=False) == (["a1"], [("a1", "finished", "")])


def test_an_attempt_that_finds_the_run_taken_or_finished_is_none(runs, train, tmp_path):
    write_finished(tmp_path / "a1", content(1))
    (tmp_path / "a1" / "summary.json").rename(tmp_path / "summary.json")

    def finish(job, report):
        (tmp_path / "summary.json").rename(tmp_path / "a1" / "summary.json")
        return Finished()

    assert train(runs("a1"), attempt=finish)[1] == [("a1", "finished before", "")]
    assert train(runs("a0"), {"a0": [Held(), None]})[0] == ["a0", "a0"]


def test_a_stop_request_ends_the_wait(runs, tmp_path):
    stop = StopRequest()
    taken = RunQueue(runs("a0"), None, Retries("one", 1), lambda run: None, stop)
    with try_claim(tmp_path / "a0"):
        timer = threading.Timer(0.1, lambda: setattr(stop, "signal", 15))
        timer.start()
        taken.train(lambda job, report: pytest.fail("trained"))
        timer.join()


def test_a_worker_looks_at_each_of_many_runs_once(tmp_path, monkeypatch):
    looks = []
    settle = queue.settle
    monkeypatch.setattr(queue, "settle", lambda *args: looks.append(1) or settle(*args))
    many = [RunStatus(tmp_path / f"run{n}", content(0), f"{n % 100}") for n in range(2000)]
    taken = RunQueue(many, None, Retries("one", 1), lambda run: None, StopRequest())
    taken.train(lambda job, report: None)
    assert all(run.state == "finished" for run in many)
    assert len(looks) == len(many)
