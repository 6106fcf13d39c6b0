"""Commands go on without their terminal, unless what they print is their product."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WRITES_FILES = """
import sys
from resjax.terminal import standard_streams
with standard_streams() as keep_going:
    keep_going()
    with open(sys.argv[1], "x") as file:
        for stream in sys.stdout, sys.stderr:
            print("to whom it may concern", file=stream, flush=True)
        file.write(str(file.fileno()))
"""
PRINTS = "import sys; from resjax.cli import main; sys.exit(main(['models']))"
REDIRECTIONS = [">&-", "2>&-", ">&- 2>&- <&-", "| false"]
FULL = ["> /dev/full", "2> /dev/full", "> /dev/full 2>&1"] if Path("/dev/full").exists() else []


def run(program, *arguments, redirection="", environment=()):
    """Runs a program in a shell, and gives it a stdout and stderr that somebody reads."""
    command = ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | dict(environment), check=False
    )


@pytest.mark.parametrize("redirection", REDIRECTIONS + FULL)
def test_a_command_that_writes_files_goes_on_when_nobody_reads_its_messages(redirection, tmp_path):
    ended = run(WRITES_FILES, str(tmp_path / "file"), redirection=redirection)
    assert ended.returncode == ("false" in redirection)  # of the last command
    assert "Traceback" not in ended.stderr
    # A library that prints to descriptor 1 or 2 must not print into this file.
    assert int((tmp_path / "file").read_text()) > 2


def test_training_goes_on_when_nobody_reads_its_progress(tmp_path):
    program = """
import sys
from resjax.train import loop
def train(config, workdir, on_progress, announce, stop, **_):
    announce("x" * 100_000)
    (workdir.parent / "trained").touch()
    return {"steps": 1, "best_test_step": 1}
loop.train = train
from resjax.cli import main
sys.exit(main(sys.argv[1:]))
"""
    config = Path(__file__).parents[1] / "configs" / "quickstart.py"
    typed = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    assert run(program, *typed, redirection=">&-").returncode == 0
    assert (tmp_path / "trained").exists()


def test_a_lost_terminal_does_not_end_a_command_that_writes_files(tmp_path):
    hangup = "import os, signal; os.kill(os.getpid(), signal.SIGHUP)\n"
    program = WRITES_FILES.replace("keep_going()\n", f"keep_going(); {hangup}")
    assert run(program, str(tmp_path / "file")).returncode == 0
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize("redirection", [">&-", *FULL[:1]])
def test_output_that_is_the_product_and_cannot_be_written_is_an_error(redirection):
    reason = "Bad file descriptor" if redirection == ">&-" else "No space left on device"
    ended = run(PRINTS, redirection=redirection)
    assert ended.returncode == 2
    assert ended.stderr == f"resjax: error: cannot write to standard output: {reason}\n"


def test_the_reader_of_output_may_stop_early():
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-c", PRINTS], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")  # as if SIGPIPE had ended it


def test_what_an_encoding_lacks_is_printed_in_ascii():
    program = (
        "from resjax.terminal import standard_streams\n"
        "with standard_streams(): print('4.6 ± 0.7', '8 × 8', 'é', '\\udcff')"
    )
    ended = run(program, environment={"PYTHONIOENCODING": "ascii:strict"}.items())
    assert ended.stdout == "4.6 +/- 0.7 8 x 8 \\xe9 \\udcff\n"
