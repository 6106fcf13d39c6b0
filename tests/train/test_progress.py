"""What is told of a run on a terminal, and where there is none."""

import io

import pytest

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


def test_no_terminal_gets_a_plain_line_now_and_then(clock):
    stream = io.StringIO()
    with console(stream, every=10) as tell:
        for step in range(1, 26):
            clock.now += 1
            tell(at(step))
    lines = stream.getvalue().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["step", "1/100"],
        ["step", "11/100"],
        ["step", "21/100"],
    ]
    assert lines[0].endswith("1 s, ? left")
    assert lines[1].endswith("train error 12.30 %  5,120 images/s  11 s, 89 s left")


def test_the_time_that_is_left_counts_no_steps_of_an_earlier_process(clock):
    stream = io.StringIO()
    with console(stream, every=1) as tell:
        for step in (80, 81, 82):
            clock.now += 2
            tell(at(step))
    assert stream.getvalue().splitlines()[-1].endswith("6 s, 36 s left")


def test_the_last_step_is_always_told(clock):
    stream = io.StringIO()
    with console(stream, every=10) as tell:
        tell(at(99))
        tell(at(100))
    assert stream.getvalue().splitlines()[-1].startswith("step 100/100")


def test_a_line_is_out_at_once(clock):
    class Stream(io.StringIO):
        flushed = False

        def flush(self):
            self.flushed = True

    stream = Stream()
    with console(stream) as tell:
        tell(at(1))
        assert stream.flushed


def test_a_terminal_gets_a_bar_and_no_plain_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with console(stream, every=0) as tell:
        tell(at(50))
        tell(at(100))
    drawn = stream.getvalue()
    assert "━" in drawn
    assert "100/100" in drawn
    assert describe(at(100)) in drawn
    assert "step 100/100" not in drawn


def test_progress_is_told_by_its_errors_and_its_rate():
    metrics = {"train_error": 0.123, "train_loss": 0.4, "test_error": 0.14}
    told = describe(Progress(5, 100, metrics, 5120.4))
    assert told == "train error 12.30 %  test error 14.00 %  5,120 images/s"
