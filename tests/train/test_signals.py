"""SIGTERM and Ctrl-C: asked for, heeded, and how a process leaves."""

import signal
import subprocess
import sys
import time

import pytest

from resjax.train.signals import Stopped, StopRequest, stop_on_signals

# Says `ready`, then busies the main thread in C, as a compiler does: no handler of Python's runs.
BUSY = """
import hashlib, sys
from resjax.train.signals import stop_on_signals

def busy(seconds):
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(seconds * 1e6))

with stop_on_signals(notify=lambda text: print(text, file=sys.stderr, flush=True)) as stop:
    if sys.argv[1] == "heeded":
        with stop.graceful():
            print("ready", flush=True)
            busy(float(sys.argv[2]))
            print("came back", stop.requested(), flush=True)
    else:
        print("ready", flush=True)
        busy(100)
"""


@pytest.fixture
def start():
    processes = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", BUSY, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_what_has_nothing_to_save_ends_at_once_even_while_it_compiles(start, sent):
    process = start("busy")
    process.send_signal(sent)
    _, told = process.communicate(timeout=10)
    assert process.returncode == 128 + sent
    assert told == f"{sent.name}: exits at once\n"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_what_heeds_a_signal_comes_to_its_end_and_is_asked(start, sent):
    process = start("heeded", "2")
    process.send_signal(sent)
    said, told = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == "came back True\n"
    assert told.count("\n") == 1
    assert "saves after this dispatch" in told


def test_the_second_ctrl_c_ends_it_at_once(start):
    process = start("heeded", "100")
    process.send_signal(signal.SIGINT)
    assert "saves" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


def test_schedulers_that_repeat_sigterm_do_not_end_what_is_saving(start):
    process = start("heeded", "3")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "came back True\n")


def test_outside_of_it_signals_are_as_they_were():
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signals():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_nobody_asks_at_first():
    assert not StopRequest().requested()


@pytest.mark.parametrize(("by", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_code_is_what_a_shell_says_of_the_signal(by, code):
    assert Stopped(by, "").code == code
