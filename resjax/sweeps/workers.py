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
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from resjax.config import Config, code_names, from_dict, to_dict
from resjax.errors import UserError, one_line
from resjax.machine import available_cores, core_ids, pin_to_cores, safe_path, use_threads
from resjax.run_files import recorded_threads
from resjax.sweeps.measure import Measure, measure_run, needs_measuring
from resjax.sweeps.status import Measuring
from resjax.terminal import GROUP_SIGNALS, group_signals_blocked, standard_streams
from resjax.train.progress import Progress
from resjax.train.signals import SAVE_ON, Stopped, StopRequest, stop_on_signals
from resjax.user_code import trust

STOP_SECONDS = 2.0  # in which the launcher notices a signal that also ended a worker
GPU_MEMORY = 0.9  # fraction of a GPU's memory that its workers share


class Resources(NamedTuple):
    """A worker's share of the machine."""

    cores: frozenset[int]
    environment: dict[str, str]
    threads: int

    def claim(self) -> None:
        """Restricts this process to the share; call it before JAX looks for devices."""
        pin_to_cores(self.cores)
        use_threads(self.threads)
        os.environ.update(self.environment)


def divide_machine(workers: int) -> list[Resources]:
    """Divides the cores and GPUs of this machine among workers.

    All have the same number of threads, so that no result depends on which worker trained a run.
    """
    cores, gpus = core_ids(), visible_gpus()
    threads = max(1, len(cores) // workers)
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
        shares.append(Resources(frozenset(own), environment, threads))
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
    """Why a run failed, or, in the state "not measured", why the trained run was not measured."""

    error: str  # on one line
    report: str  # with the traceback, if there is one
    state: str = "failed"


Report = Callable[[Progress | Measuring], None]


def attempt(
    config: Config,
    folder: Path,
    report: Report,
    measure: Measure | None = None,
    stop: StopRequest | None = None,
) -> Failure | None:
    """Trains and measures one run in this process; returns the failure instead of raising it.

    Args:
      config: the resolved config of the run.
      folder: the run folder.
      report: called with the progress of the training, and when measuring begins.
      measure: the experiment's `measure`, if it has one.
      stop: a request to stop training.

    Raises:
      Stopped: stopping was requested; the run is saved.
    """
    from resjax.train.loop import train  # imports JAX, which takes seconds
    from resjax.xla.compilation_cache import enable_compilation_cache
    from resjax.xla.devices import require_devices

    state = Failure._field_defaults["state"]
    try:
        require_devices()
        enable_compilation_cache()
        train(config, folder, report, stop=stop)
        if measure and needs_measuring(measure, folder):
            state = "not measured"
            report(Measuring())
            trust(code_names(config))  # the user named this code when the sweep was launched
            measure_run(measure, folder)
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else one_line(error)
        return Failure(text, traceback.format_exc(), state)
    return None


class Worker:
    """A process that trains one run after the other.

    If it is lost, the next run gets a new one. So does a run that began on another number of
    threads.
    """

    def __init__(self, resources: Resources, save_on: tuple[int, ...] = SAVE_ON):
        """Starts no process yet.

        Args:
          resources: the worker's share of the machine.
          save_on: the signals after which a run saves and goes on.
        """
        self.saved = False  # whether the run that `stop` interrupted has saved
        self._resources, self._save_on = resources, save_on
        self._process: Any = None
        self._stopped = threading.Event()

    def attempt(
        self, config: Config, folder: Path, report: Report, measure: Measure | None = None
    ) -> Failure | None:
        """Does what the function `attempt` does, in the worker's process.

        Raises:
          SystemExit: `stop` was called meanwhile; ends the calling thread.
        """
        threads = recorded_threads(folder) or self._resources.threads
        try:
            if self._process is not None and self._threads != threads:
                self._link.close()
                self._process.join()
                self._process = None
            if self._process is None:
                self._start(threads)
            self._link.send((to_dict(config), folder, measure))
            while isinstance(message := self._link.recv(), Progress | Measuring):
                report(message)
            if not isinstance(message, Stop):
                return message
            self.saved = True
        except (EOFError, OSError):
            pass
        self._process.join()
        code, self._process = self._process.exitcode, None
        # A scheduler may send SIGTERM to launcher and workers at once.
        ended = code in (-signal.SIGTERM, 128 + signal.SIGTERM)
        if self._stopped.wait(STOP_SECONDS if ended else 0):
            sys.exit()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        text = f"the worker process ended {how}"
        return Failure(text, text + "\n")

    def save(self) -> None:
        """Requests a checkpoint of the run under way."""
        self._send(self._save_on[0])

    def stop(self) -> None:
        """Requests the end of the process, which saves its run first; `join` waits for it."""
        self._stopped.set()
        self._send(signal.SIGTERM)

    def join(self) -> None:
        """Waits for the end of the process."""
        if self._process is not None:
            self._process.join()

    def _send(self, number: int) -> None:
        if process := self._process:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def _start(self, threads: int) -> None:
        # A forked copy of a process that runs threads may hang.
        context = multiprocessing.get_context("spawn")
        self._link, link = context.Pipe()
        self._threads = threads
        arguments = link, self._resources._replace(threads=threads), self._save_on
        process = context.Process(target=_serve, args=arguments, daemon=True)
        with safe_path(), group_signals_blocked():  # until the process handles them
            process.start()
        self._process = process
        link.close()  # only then does the end of the process close the pipe
        if self._stopped.is_set():  # before there was a process to stop
            process.terminate()


class Stop(NamedTuple):
    """A worker's last message: its run is saved because a signal stopped it."""


def _serve(link: Connection, resources: Resources, save_on: tuple[int, ...]) -> None:
    """Receives configs; sends progress, and at the end of each run its failure or None."""
    for number in {*GROUP_SIGNALS} - {*save_on}:
        signal.signal(number, signal.SIG_IGN)  # the launcher handles them
    threading.Thread(target=_exit_with_launcher, daemon=True).start()
    resources.claim()
    with standard_streams() as keep_going:
        keep_going()
        _train_requested(link, save_on)


def _train_requested(link: Connection, save_on: tuple[int, ...]) -> None:
    signals = signal.SIGTERM, *save_on
    with stop_on_signals(signals, save_on=save_on) as stop, suppress(BrokenPipeError, EOFError):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
        try:
            while True:
                config, folder, measure = link.recv()
                link.send(attempt(from_dict(config), folder, link.send, measure, stop))
        except Stopped as stopped:
            link.send(Stop())
            sys.exit(stopped.code)


def _exit_with_launcher() -> None:
    """Ends this process when the launcher is killed; the next launch resumes the run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
