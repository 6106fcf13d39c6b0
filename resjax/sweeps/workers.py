"""Worker processes of the local launcher: each has its share of the machine and trains runs there.

Small networks leave a machine idle: between two operations of a narrow layer threads wait for each
other, and a GPU for its next kernel. Several runs at once fill the gaps. Processes and not threads,
because each has a JAX of its own, on its own cores; `benchmarks/seeds.py` measures what they gain.
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
from resjax.machine import available_cores
from resjax.train.progress import Listener, Progress
from resjax.train.signals import Stopped, StopRequest, stop_on_signals

GPU_MEMORY = 0.9  # the share of a GPU's memory that its workers take together


class Place(NamedTuple):
    """A worker's share of the machine."""

    cores: frozenset[int]
    environment: dict[str, str]


def places(workers: int) -> list[Place]:
    """Divides this machine among workers: its cores, and its GPUs where there are any."""
    cores, gpus = sorted(os.sched_getaffinity(0)), visible_gpus()
    divided = []
    for worker in range(workers):
        # Where there are more workers than cores, several share one.
        own = cores[worker::workers] or [cores[worker % len(cores)]]
        environment = {}
        if gpus:
            sharing = -(-workers // len(gpus))
            environment = {
                "CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)],
                "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{GPU_MEMORY / sharing:.3f}",
            }
        divided.append(Place(frozenset(own), environment))
    return divided


def fastest_workers() -> int:
    """As many as were measured to be fastest: a worker a core without a GPU, else one a GPU."""
    return len(visible_gpus()) or available_cores()


def visible_gpus() -> list[str]:
    """NVIDIA GPUs by what CUDA_VISIBLE_DEVICES calls them; found without starting CUDA."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name]
    if os.environ.get("JAX_PLATFORMS", "cuda") not in ("cuda", "gpu"):
        return []
    found = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(found.iterdir())] if found.is_dir() else []


class Failure(NamedTuple):
    """What came of a run that did not end well."""

    error: str  # in one line
    report: str  # with the traceback, where there is one


def attempt(
    config: Config, folder: Path, on_progress: Listener, stop: StopRequest | None = None
) -> Failure | None:
    """Trains one run here; whatever goes wrong is the run's affair alone.

    Raises:
      Stopped: it was asked to stop, and has saved.
    """
    from resjax.train.loop import train  # takes seconds

    try:
        train(config, folder, on_progress, stop=stop)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Failure(text, traceback.format_exc())
    return None


class Worker:
    """A process that trains runs, one after the other; a lost one is replaced at the next run."""

    def __init__(self, place: Place, compiled: Path):
        """Starts nothing yet.

        Args:
          place: the worker's share of the machine.
          compiled: the folder in which what is compiled is kept.
        """
        self._place, self._compiled = place, compiled
        self._process: Any = None
        self._stopped = False

    def attempt(self, config: Config, folder: Path, on_progress: Listener) -> Failure | None:
        """As the function, in the process.

        Raises:
          SystemExit: the worker was stopped meanwhile; ends the thread that waits for it.
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
        """Ends the process; a run in it saves first. `join` waits for that."""
        self._stopped = True
        if self._process is not None:
            self._process.terminate()

    def join(self) -> None:
        if self._process is not None:
            self._process.join()

    def _start(self) -> None:
        # Not forked: a copy of a process that runs threads may hang.
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        arguments = theirs, self._place, self._compiled
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # or the end of the process would not be seen


def _serve(link: Connection, place: Place, compiled: Path) -> None:
    """A worker's life: configs in; progress out, and how each run ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's affair
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    os.sched_setaffinity(0, place.cores)  # both before JAX looks for devices
    os.environ.update(place.environment)
    from resjax.train.step import keep_compiled

    keep_compiled(compiled)
    with stop_on_signals((signal.SIGTERM,)) as stop, suppress(Stopped, BrokenPipeError):
        while True:
            config, folder = link.recv()
            link.send(attempt(from_dict(config), folder, link.send, stop))


def _end_with_launcher() -> None:
    """A launcher that was killed leaves nobody to train for; launched again it goes on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
