"""The progress of a run on a terminal and elsewhere."""

import io

import pytest

from resjax.run_files import Metric
from resjax.train import progress
from resjax.train.progress import Progress, console, describe


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; `clock.now` sets it."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def at(step):
    return Progress(step, 100, {"train_error": 0.123, "train_loss": 0.4}, 5120.4)


def test_plain_lines_have_a_minimum_interval(clock):
    stream = io.StringIO()
    with console(stream, every=10) as listener:
        for step in range(1, 26):
            clock.now += 1
            listener(at(step))
    lines = stream.getvalue().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["step", "1/100"],
        ["step", "11/100"],
        ["step", "21/100"],
    ]
    assert lines[0].endswith("1 s, ? left")
    assert lines[1].endswith("train error 12.30 %  5,120 images/s  11 s, 89 s left")


def test_the_time_left_does_not_count_steps_before_a_resume(clock):
    stream = io.StringIO()
    with console(stream, every=1) as listener:
        for step in (80, 81, 82):
            clock.now += 2
            listener(at(step))
    assert stream.getvalue().splitlines()[-1].endswith("6 s, 36 s left")


def test_the_last_step_is_always_printed(clock):
    stream = io.StringIO()
    with console(stream, every=10) as listener:
        listener(at(99))
        listener(at(100))
    assert stream.getvalue().splitlines()[-1].startswith("step 100/100")


def test_each_line_is_flushed(clock):
    class Stream(io.StringIO):
        flushed = False

        def flush(self):
            self.flushed = True

    stream = Stream()
    with console(stream) as listener:
        listener(at(1))
        assert stream.flushed


def test_a_terminal_gets_a_bar_and_no_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with console(stream, every=0) as listener:
        listener(at(50))
        listener(at(100))
    drawn = stream.getvalue()
    assert "━" in drawn
    assert "100/100" in drawn
    assert describe(at(100)) in drawn
    assert "step 100/100" not in drawn


@pytest.mark.parametrize(
    ("primary", "text"),
    [
        (Metric("error", unit="fraction"), "train error 12.30 %  test error 14.00 %  "),
        (Metric("loss"), "train loss 0.4  "),
        (Metric("angle", unit="rad"), "test angle 0.01234 rad  "),
        (Metric("accuracy"), ""),
    ],
)
def test_a_run_is_described_by_its_primary_metric_and_its_speed(primary, text):
    metrics = {"train_error": 0.123, "train_loss": 0.4, "test_error": 0.14, "test_angle": 0.012341}
    assert describe(Progress(5, 100, metrics, 5120.4, primary)) == f"{text}5,120 images/s"


def test_a_test_metric_of_an_earlier_step_has_its_step():
    metrics = {"train_error": 0.123, "test_error": 0.14}
    texts = [describe(Progress(step, 100, metrics, 7, test_step=80)) for step in (80, 90)]
    assert texts == [
        "train error 12.30 %  test error 14.00 %  7 images/s",
        "train error 12.30 %  test error 14.00 % at step 80  7 images/s",
    ]
