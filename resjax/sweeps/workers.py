"""Worker processes of the local launcher, each with its own share of the machine.

A small network leaves a machine partly idle: threads wait for each other between two operations of
a narrow layer, and a GPU waits for its next kernel. Training several runs at the same time fills
the gaps. The workers are processes so that each has a JAX of its own, on its own cores;
`benchmarks/seeds.py` measures the gain.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from resjax.config import Config, from_dict, to_dict
from resjax.errors import UserError, one_line
from resjax.machine import available_cores, core_ids, pin_to_cores
from resjax.train.progress import Listener, Progress
from resjax.train.signals import Stopped, StopRequest, stop_on_signals

GPU_MEMORY = 0.9  # fraction of a GPU's memory that its workers share


class Resources(NamedTuple):
    """A worker's share of the machine."""

    cores: frozenset[int]
    environment: dict[str, str]

    def claim(self) -> None:
        """Restricts this process to the share; call it before JAX looks for devices."""
        pin_to_cores(self.cores)
        os.environ.update(self.environment)


def divide_machine(workers: int) -> list[Resources]:
    """Divides the cores and GPUs of this machine among workers."""
    cores, gpus = core_ids(), visible_gpus()
    shares = []
    for worker in range(workers):
        # Workers beyond the number of cores share one.
        own = cores[worker::workers] or [cores[worker % len(cores)]]
        environment = {}
        if gpus:
            sharing = -(-workers // len(gpus))
            environment = {
                "CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)],
                "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{GPU_MEMORY / sharing:.3f}",
            }
        shares.append(Resources(frozenset(own), environment))
    return shares


def default_workers() -> int:
    """Returns the number that was measured to be fastest: one per GPU, else one per core."""
    return len(visible_gpus()) or available_cores()


def visible_gpus() -> list[str]:
    """Returns the NVIDIA GPUs by their names in CUDA_VISIBLE_DEVICES, without starting CUDA."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name]
    if os.environ.get("JAX_PLATFORMS", "cuda") not in ("cuda", "gpu"):
        return []
    found = Path("/proc/driver/nvidia/gpus")
    return [str(index) for index, _ in enumerate(found.iterdir())] if found.is_dir() else []


class Failure(NamedTuple):
    """Why a run failed."""

    error: str  # on one line
    report: str  # with the traceback, if there is one


def attempt(
    config: Config, folder: Path, on_progress: Listener, stop: StopRequest | None = None
) -> Failure | None:
    """Trains one run in this process; returns the failure instead of raising it.

    Raises:
      Stopped: stopping was requested; the run is saved.
    """
    from resjax.train.loop import train  # imports JAX, which takes seconds

    try:
        train(config, folder, on_progress, stop=stop)
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else one_line(error)
        return Failure(text, traceback.format_exc())
    return None


class Worker:
    """A process that trains one run after the other; if it is lost, the next run gets a new one."""

    def __init__(self, resources: Resources, cache_dir: Path):
        """Starts no process yet.

        Args:
          resources: the worker's share of the machine.
          cache_dir: the folder for compiled programs.
        """
        self._resources, self._cache_dir = resources, cache_dir
        self._process: Any = None
        self._stopped = False

    def attempt(self, config: Config, folder: Path, on_progress: Listener) -> Failure | None:
        """Does what the function `attempt` does, in the worker's process.

        Raises:
          SystemExit: `stop` was called meanwhile; ends the calling thread.
        """
        try:
            if self._process is None:
                self._start()
            self._link.send((to_dict(config), folder))
            while isinstance(message := self._link.recv(), Progress):
                on_progress(message)
            return message
        except (EOFError, OSError):
            if self._stopped:
                sys.exit()
            self._process.join()
            code, self._process = self._process.exitcode, None
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
            text = f"the worker process ended {how}"
            return Failure(text, text + "\n")

    def stop(self) -> None:
        """Requests the end of the process, which saves its run first; `join` waits for it."""
        self._stopped = True
        if self._process is not None:
            self._process.terminate()

    def join(self) -> None:
        """Waits for the end of the process."""
        if self._process is not None:
            self._process.join()

    def _start(self) -> None:
        # A forked copy of a process that runs threads may hang.
        context = multiprocessing.get_context("spawn")
        self._link, link = context.Pipe()
        arguments = link, self._resources, self._cache_dir
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        link.close()  # only then does the end of the process close the pipe


def _serve(link: Connection, resources: Resources, cache_dir: Path) -> None:
    """Receives configs; sends progress, and at the end of each run its failure or None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher handles Ctrl-C
    threading.Thread(target=_exit_with_launcher, daemon=True).start()
    resources.claim()
    from resjax.xla.compile_options import enable_compilation_cache

    enable_compilation_cache(cache_dir)
    with stop_on_signals((signal.SIGTERM,)) as stop, suppress(Stopped, BrokenPipeError):
        while True:
            config, folder = link.recv()
            link.send(attempt(from_dict(config), folder, link.send, stop))


def _exit_with_launcher() -> None:
    """Ends this process when the launcher is killed; the next launch resumes the run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
