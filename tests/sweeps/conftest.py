"""The smallest run of a sweep, and a SLURM of the tests' own."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def smallest() -> dict[str, Any]:
    """The fields of two steps of ResNet-8."""
    return {
        "model.depth": 8,
        "model.width": 4,
        "data.batch_size": 8,
        "train.steps": 2,
        "train.log_every": 1,
        "train.eval_every": 2,
    }


class Slurm:
    """A SLURM of the tests' own, and what they ask it; see tests/slurm_server.py."""

    def run(self, *command: str) -> str:
        """Returns the output of a SLURM command that must succeed."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state(self, task: str) -> str:
        """Returns the state of a job or of a task such as `12_0`."""
        states = re.findall(r"JobState=(\w+)", self.run("scontrol", "show", "job", task))
        return " ".join(sorted({*states}))

    def queued(self) -> list[str]:
        """Returns the tasks and jobs that wait or run."""
        return self.run("squeue", "--noheader", "--array", "--format=%i").split()

    def wait(self, condition: Callable[[], Any], seconds: float = 120.0) -> Any:
        """Returns the first true value of a condition."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not in {seconds} s; queue: {self.queued()}"
            time.sleep(0.05)
        return value


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A SLURM with two nodes, for the whole session; where it cannot start, tests are skipped.

    With RESJAX_TEST_SLURM=required, which CI sets where it is installed, they fail instead.
    """
    folder = Path(tempfile.mkdtemp(prefix="resjax-slurm-"))
    folder.chmod(0o755)
    script = Path(__file__).parents[1] / "slurm_server.py"
    server = subprocess.Popen(
        [sys.executable, str(script), str(folder / "slurm")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        if (said := server.stdout.readline().strip()) != "ready":
            refuse = (
                pytest.fail if os.environ.get("RESJAX_TEST_SLURM") == "required" else pytest.skip
            )
            refuse(f"SLURM does not start here: {said}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm" / "slurm.conf"))
            yield Slurm()
    finally:
        server.stdin.close()
        server.wait()
        server.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)
