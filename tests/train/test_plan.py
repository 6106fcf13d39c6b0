"""A line of metrics is dispatched at once if its steps are fast, otherwise in equal parts."""

from types import SimpleNamespace

import pytest

from resjax.train.estimate import SECONDS_AT_ONCE, forward_seconds
from resjax.train.plan import ends_line, plan
from resjax.train.trainer import Dispatch


@pytest.fixture
def make_trainer(configure):
    """A function from the seconds of a step to what a plan asks of a trainer, with two phases."""

    def make(step_seconds, streamed=False, log_every=100, steps=250, thaw=120):
        intervals = {"train.eval_every": log_every, "train.checkpoint_every": 0}
        return SimpleNamespace(
            config=configure({"train.log_every": log_every, "train.steps": steps, **intervals}),
            phases=[SimpleNamespace(first_step=0), SimpleNamespace(first_step=thaw)],
            phase_at=lambda step: int(step >= thaw),
            source=SimpleNamespace(streamed=streamed),
            step_seconds=step_seconds,
        )

    return make


def lengths(planned):
    return [dispatch.steps for dispatch in planned]


def test_fast_steps_are_dispatched_by_line(make_trainer):
    assert plan(make_trainer(0.01), 0) == [
        Dispatch(0, 100),
        Dispatch(0, 20),
        Dispatch(1, 80),
        Dispatch(1, 50),
    ]
    assert lengths(plan(make_trainer(0.01), 150)) == [50, 50]


@pytest.mark.parametrize("seconds", [0.05, 0.3, 1.0, 1.9, 4.0, 10.0])
def test_slow_steps_are_dispatched_in_equal_parts_of_at_most_a_few_seconds(make_trainer, seconds):
    planned = plan(make_trainer(seconds, thaw=10**6), 0)
    assert sum(lengths(planned)) == 250
    sizes = {dispatch.steps for dispatch in planned if dispatch.part}
    assert sizes
    assert all(size == 1 or size * seconds <= SECONDS_AT_ONCE for size in sizes)
    assert len(sizes) <= 2  # of lines of 100 and of 50 steps
    ends = [sum(lengths(planned)[: i + 1]) for i in range(len(planned))]
    assert {100, 200, 250} <= set(ends)


def test_a_line_of_a_prime_number_of_slow_steps_is_dispatched_step_by_step(make_trainer):
    assert plan(make_trainer(1.0, log_every=97, steps=97), 0) == [Dispatch(0, 1, True)] * 97


def test_a_stream_is_dispatched_step_by_step(make_trainer):
    trainer = make_trainer(1e-6, streamed=True)
    assert set(plan(trainer, 0)) == {Dispatch(0, 1, True), Dispatch(1, 1, True)}
    assert len(plan(trainer, 0)) == 250


def test_the_rest_of_a_line_is_a_part_however_fast(make_trainer):
    assert plan(make_trainer(0.01), 60, within_line=True)[:2] == [
        Dispatch(0, 40, True),
        Dispatch(0, 20),
    ]


def test_lines_end_at_their_interval_the_last_step_and_before_each_phase(make_trainer):
    trainer = make_trainer(0.01)
    assert [step for step in range(1, 251) if ends_line(trainer, step)] == [100, 120, 200, 250]


@pytest.mark.parametrize(("depth", "macs"), [(8, 189_248), (56, 1_958_720), (110, 3_949_376)])
def test_the_networks_of_the_quickstart_are_fast_on_two_cores(monkeypatch, depth, macs):
    monkeypatch.setenv("NPROC", "2")
    assert 25 * 3 * forward_seconds(64, macs, depth, devices=1) <= SECONDS_AT_ONCE


def test_depth_alone_makes_a_step_slow():
    assert forward_seconds(1, 1, 1202, 1) > 100 * forward_seconds(1, 1, 8, 1)
