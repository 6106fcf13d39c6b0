"""NVIDIA's Multi-Process Service: processes that share a GPU run at the same time.

Without it they take turns. A daemon of NVIDIA's driver, `nvidia-cuda-mps-control`, serves the
processes that find it through environment variables. A launch starts one of its own, with folders
of its own, so it disturbs no other.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from resjax.errors import UserError
from resjax.train.progress import print_warning

CONTROL = "nvidia-cuda-mps-control"
START_SECONDS = 60.0  # in which the daemon starts
STOP_SECONDS = 30.0  # in which it ends

# Waits until the launcher closes the pipe or is killed, then ends the daemon.
GUARD = 'read -r _; echo quit | "$0" >/dev/null 2>&1; rm -rf "$1"'


def find_mps() -> str:
    """Returns the path of the daemon's program.

    Raises:
      UserError: it is not installed.
    """
    if path := shutil.which(CONTROL):
        return path
    raise UserError(
        f"--mps: no {CONTROL} on PATH; it is part of NVIDIA's driver (Debian and Ubuntu: "
        "nvidia-compute-utils). Without --mps, processes take turns on a GPU"
    )


@contextmanager
def mps_daemon(gpus: Sequence[str]) -> Iterator[dict[str, str]]:
    """Runs a daemon for these GPUs; yields the environment by which processes find it.

    It ends with the context, and also if this process is killed.

    Raises:
      UserError: the daemon is not installed, or does not start.
    """
    control = find_mps()
    folder = Path(tempfile.mkdtemp(prefix="resjax-mps-"))
    environment = {
        "CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"),
        "CUDA_MPS_LOG_DIRECTORY": str(folder / "log"),
    }
    for path in environment.values():
        Path(path).mkdir()
    ours = os.environ | environment | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    guard = subprocess.Popen(
        ["sh", "-c", GUARD, control, str(folder)],
        stdin=subprocess.PIPE,
        env=ours,
        start_new_session=True,  # Ctrl-C must not reach it
    )
    try:
        _start(control, folder / "output", ours)
        yield environment
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        try:
            guard.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            print_warning(f"{CONTROL} has not ended after {STOP_SECONDS:g} s; see {folder / 'log'}")


def client_device(gpus: Sequence[str], index: int) -> str:
    """Returns what CUDA_VISIBLE_DEVICES has to be in a process that uses the daemon.

    The daemon numbers the GPUs that it was started for from 0. A GPU's UUID stays its name.
    """
    return str(index) if gpus[index].isdecimal() else gpus[index]


def _start(control: str, output: Path, environment: dict[str, str]) -> None:
    # A pipe would be waited for as long as the daemon holds it open.
    with output.open("wb") as file:
        try:
            code = subprocess.run(
                [control, "-d"], stdout=file, stderr=file, env=environment, timeout=START_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            raise UserError(
                f"--mps: {CONTROL} -d has not returned in {START_SECONDS:g} s"
            ) from None
    if code:
        lines = output.read_text(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "it says nothing"
        raise UserError(f"--mps: {CONTROL} -d ended with code {code}: {reason}")
