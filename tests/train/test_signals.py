"""Signals end a process at once, or after it has saved, or it saves and goes on."""

import os
import signal
import time

import pytest

from resjax.train.signals import SIGNALS, Stopped, StopRequest, stop_on_signals

# Prints `ready`, then keeps the main thread in C, like a compiler: no Python handler runs there.
BUSY = """
import hashlib, sys
from resjax.train.signals import stop_on_signals

def busy(seconds):
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(seconds * 1e6))

with stop_on_signals(notify=lambda text: print(text, file=sys.stderr, flush=True)) as stop:
    if sys.argv[1] == "graceful":
        with stop.graceful():
            print("ready", flush=True)
            busy(float(sys.argv[2]))
            print(stop.requested(), stop.take_save_request(), stop.take_save_request(), flush=True)
    else:
        print("ready", flush=True)
        busy(100)
"""


@pytest.fixture
def start(start_python):
    def start(*arguments):
        process = start_python("-c", BUSY, *arguments)
        assert process.stdout.readline() == "ready\n"
        return process

    return start


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_a_process_at_once_even_in_c_code(start, sent):
    process = start("busy")
    process.send_signal(sent)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 128 + sent
    assert errors == f"{sent.name}: exits at once\n"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_graceful_code_runs_to_its_end_and_sees_the_request(start, sent):
    process = start("graceful", "2")
    process.send_signal(sent)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output == "True False False\n"
    assert errors.count("\n") == 1
    assert "saves after the current steps" in errors


def test_a_hangup_is_a_request_to_save_and_go_on(start):
    process = start("graceful", "2")
    process.send_signal(signal.SIGHUP)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "False True False\n")
    assert errors == "SIGHUP: saves after the current steps and goes on\n"


def test_a_hangup_during_compilation_has_nothing_to_save_and_ends_nothing(start):
    process = start("busy")
    process.send_signal(signal.SIGHUP)
    assert process.stderr.readline() == "SIGHUP: has nothing to save and goes on\n"
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGUSR1


def test_a_hangup_of_one_of_several_processes_requests_a_checkpoint_and_ends_nothing():
    """Signals that end one of them are passed on as SIGTERM, which would end this process."""
    with stop_on_signals((signal.SIGHUP,), together=True) as stop, stop.graceful():
        os.kill(os.getpid(), signal.SIGHUP)
        deadline = time.monotonic() + 10
        while not stop.take_save_request():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert stop.signal is None


def test_a_second_ctrl_c_ends_graceful_code_at_once(start):
    process = start("graceful", "100")
    process.send_signal(signal.SIGINT)
    assert "saves" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


def test_a_repeated_sigterm_does_not_end_graceful_code(start):
    process = start("graceful", "3")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "True False False\n")


def test_the_previous_handlers_return():
    before = [signal.getsignal(each) for each in SIGNALS]
    with stop_on_signals():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_new_request_is_not_made_yet():
    assert not StopRequest().requested()


@pytest.mark.parametrize(("by", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_code_names_the_signal_as_shells_do(by, code):
    assert Stopped(by, "").code == code
