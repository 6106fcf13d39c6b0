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
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from resjax.machine import (
    available_cores,
    core_ids,
    huge_pages,
    pin_to_cores,
    safe_path,
    threads,
    use_threads,
)
from resjax.run_files import recorded_threads
from resjax.sweeps.attempts import Held, Job, OtherThreads, Outcome, Report, attempt
from resjax.sweeps.failures import Failure
from resjax.sweeps.status import Measuring
from resjax.terminal import GROUP_SIGNALS, group_signals_blocked, standard_streams
from resjax.train.lock import EXIT_LOST
from resjax.train.progress import Progress
from resjax.train.signals import SAVE_ON, Stopped, StopRequest, stop_on_signals

POLL_SECONDS = 0.2  # between two checks whether the workers have ended or a stop is requested
STOP_SECONDS = 2.0  # in which the launcher notices a signal that also ended a worker
GPU_MEMORY = 0.9  # fraction of a GPU's memory that its workers share, if no other is set
MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


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


def divide_machine(workers: int, threads: int | None = None) -> list[Resources]:
    """Divides the cores, the GPUs and the memory of the GPUs of this machine among workers.

    All have the same number of threads, so that no result depends on which worker trained a run.

    Args:
      workers: their number.
      threads: of all workers together. If they are fewer than the cores, as in a task of a cluster
        that may run on any core of its node, no worker is restricted to cores of its own.
    """
    cores, gpus = core_ids(), visible_gpus()
    together = min(threads or len(cores), len(cores))
    shares = []
    for worker in range(workers):
        # Workers beyond the number of cores share one.
        own = cores[worker::workers] or [cores[worker % len(cores)]]
        own = cores if together < len(cores) else own
        environment = {}
        if gpus:
            sharing = -(-workers // len(gpus))
            environment = {
                "CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)],
                MEMORY_FRACTION: f"{_memory() / sharing:.3f}",
            }
        shares.append(Resources(frozenset(own), environment, max(1, together // workers)))
    return shares


def _memory() -> float:
    """Returns the fraction of a GPU's memory that this process may use."""
    with suppress(ValueError):
        return float(os.environ.get(MEMORY_FRACTION, GPU_MEMORY))
    return GPU_MEMORY


def whole_machine(number: int | None = None) -> Resources:
    """Returns all that this process may use, with a number of threads or those of the process."""
    return Resources(frozenset(core_ids()), {}, number or threads())


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

    def attempt(self, job: Job, report: Report) -> Outcome:
        """Does what the function `attempt` does, in the worker's process.

        Raises:
          SystemExit: `stop` was called meanwhile; ends the calling thread.
        """
        threads = recorded_threads(job.folder) or self._resources.threads
        outcome = self._attempt(threads, job, report)
        if isinstance(outcome, OtherThreads):  # another process has begun the run meanwhile
            outcome = self._attempt(outcome.threads, job, report)
        return outcome

    def _attempt(self, threads: int, job: Job, report: Report) -> Outcome:
        try:
            self._require_process(threads)
            self._link.send(job)
            while isinstance(message := self._link.recv(), Progress | Measuring):
                report(message)
            if not isinstance(message, Stop):
                return message
            self.saved = True
        except (EOFError, OSError):
            pass
        return self._lost()

    def _require_process(self, threads: int) -> None:
        """Starts a process with this number of threads, unless there is one."""
        if self._process is not None and self._threads != threads:
            self._link.close()
            self._process.join()
            self._process = None
        if self._process is None:
            self._start(threads)

    def _lost(self) -> Failure | Held:
        """Returns how the process ended; ends the calling thread if `stop` was called."""
        self._process.join()
        code, self._process = self._process.exitcode, None
        # A scheduler may send SIGTERM to launcher and workers at once.
        ended = code in (-signal.SIGTERM, 128 + signal.SIGTERM)
        if self._stopped.wait(STOP_SECONDS if ended else 0):
            sys.exit()
        if code == EXIT_LOST:
            return Held()
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
        self._threads = threads
        resources = self._resources._replace(threads=threads)
        self._process, self._link = start_child(_serve, resources, self._save_on)
        if self._stopped.is_set():  # before there was a process to stop
            self._process.terminate()


def start_child(target: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    """Starts a process that calls `target(link, *arguments)`; returns it and our end of the link.

    Signals that a terminal sends to the group are blocked in it.
    """
    os.environ.update(huge_pages())
    # A forked copy of a process that runs threads may hang.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    with safe_path(), group_signals_blocked():
        process.start()
    theirs.close()  # only then does the end of the process close the pipe
    return process, ours


class AnyWorker(Protocol):
    """What trains one run after the other, outside of this thread; see `Worker`."""

    saved: bool

    def attempt(self, job: Job, report: Report) -> Outcome: ...

    def save(self) -> None: ...

    def stop(self) -> None: ...

    def join(self) -> None: ...


def supervise(
    workers: Sequence[AnyWorker], task: Callable[[AnyWorker], None], stop: StopRequest
) -> int:
    """Calls `task` with each worker in a thread, and passes signals on to the workers.

    Returns:
      The number of workers whose run was stopped and has saved.
    """
    faults: list[BaseException] = []

    def work(worker: AnyWorker) -> None:
        try:
            task(worker)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(each,), daemon=True) for each in workers]
    with stop.graceful():
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and not stop.signal:
                if stop.take_save_request():
                    for worker in workers:
                        worker.save()
                time.sleep(POLL_SECONDS)
        finally:
            for worker in workers:
                worker.stop()
            for thread in threads:
                thread.join()
            for worker in workers:
                worker.join()
    if faults:  # a fault of ours; the other threads have trained all other runs
        raise faults[0]
    return sum(worker.saved for worker in workers)


class Stop(NamedTuple):
    """A worker's last message: its run is saved because a signal stopped it."""


def _serve(link: Connection, resources: Resources, save_on: tuple[int, ...]) -> None:
    """Receives configs; sends progress, and at the end of each run its failure or None."""
    for number in {*GROUP_SIGNALS} - {*save_on}:
        signal.signal(number, signal.SIG_IGN)  # the launcher handles them
    end_with_launcher()
    resources.claim()
    with standard_streams() as keep_going:
        keep_going()
        _train_requested(link, save_on)


def _train_requested(link: Connection, save_on: tuple[int, ...]) -> None:
    signals = signal.SIGTERM, *save_on
    with stop_on_signals(signals, save_on=save_on) as stop, suppress(BrokenPipeError, EOFError):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
        try:
            while not stop.signal:  # which may come too late for a run to stop
                link.send(attempt(link.recv(), link.send, stop))
        except Stopped as stopped:
            link.send(Stop())
            sys.exit(stopped.code)


def end_with_launcher() -> None:
    """Ends this process when the launcher is killed; the next launch resumes the run."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
