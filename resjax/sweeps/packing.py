"""How many runs share a GPU: measured once for a network and a device, and kept with the sweep.

A small network leaves a GPU idle between two kernels, so several processes train faster together.
How many depends on the network, the GPU, its memory and the cores that feed it; it is measured by
training the sweep's first network for a few seconds in 1, 2, 4, ... processes at once, until their
total speed grows no more or their memory does not suffice. Nothing is written but `packing.json`.
On a machine without GPUs the processes share the cores, and the same measurement finds how many.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from resjax.disk import describe_disk_error
from resjax.errors import UserError, one_line
from resjax.machine import available_cores
from resjax.run_files import DamagedFileError
from resjax.sweeps.launchers import Options
from resjax.sweeps.mps import client_device, find_mps, mps_daemon
from resjax.sweeps.plan_files import StoredPlan
from resjax.sweeps.workers import (
    POLL_SECONDS,
    Resources,
    default_workers,
    divide_machine,
    end_with_launcher,
    start_child,
    visible_gpus,
)
from resjax.train import records
from resjax.train.progress import print_warning
from resjax.train.signals import Stopped, StopRequest

FILE = "packing.json"
GAIN = 1.05  # of the total speed, without which more processes are not worth it
MEASURED_SECONDS = 3.0  # for each number of processes, beside their start
LIMIT_SECONDS = 300.0  # for all of it; a number that is not measured by then is not tried
MOST_PER_GPU = 16


def require_sharing(options: Options) -> None:
    """Checks the options that say how GPUs are shared.

    Raises:
      UserError: they contradict each other or this machine.
    """
    if options.per_gpu is None and not options.mps:
        return
    if options.per_gpu is not None and options.workers is not None:
        raise UserError("--workers and --workers-per-gpu exclude each other; give one of them")
    gpus = visible_gpus()
    if options.mps and not gpus:
        raise UserError("--mps: no NVIDIA GPU is visible here; leave it out")
    if options.per_gpu not in (None, "auto") and not gpus:
        raise UserError(
            "--workers-per-gpu: no NVIDIA GPU is visible here; --workers=N sets the number of "
            "processes on CPU cores, and --workers-per-gpu=auto measures it"
        )
    if options.mps:
        find_mps()


def describe_sharing(options: Options) -> str:
    """Returns in words how many processes share a device."""
    gpus = visible_gpus()
    where = f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}" if gpus else f"{available_cores()} cores"
    number = f"{options.per_gpu} processes per GPU"
    if options.per_gpu == "auto":
        number = f"as many processes{' per GPU' * bool(gpus)} as are measured to be fastest"
    return f"{number} on {where}{', with MPS' * options.mps}"


@contextmanager
def shared_devices(
    options: Options,
    folder: Path,
    stored: StoredPlan,
    stop: StopRequest,
    threads: int | None = None,
) -> Iterator[list[Resources]]:
    """Divides this machine among workers, several of which may share a GPU.

    Args:
      options: how many per GPU, and whether MPS serves them until the context ends.
      folder: the sweep folder, which keeps what is measured.
      stored: the plan, whose first network is measured.
      stop: a request to stop.
      threads: of all workers together; by default as many as cores.

    Yields:
      The share of each worker.

    Raises:
      UserError: the daemon of MPS does not start.
      Stopped: stopping was requested while it was measured.
    """
    gpus = visible_gpus()
    devices = max(len(gpus), 1)
    with ExitStack() as ending:
        environment = ending.enter_context(mps_daemon(gpus)) if options.mps else {}

        def divide(workers: int) -> list[Resources]:
            shares = divide_machine(workers, threads)
            return [_serve_by(environment, gpus, *each) for each in enumerate(shares)]

        workers = options.workers or default_workers()
        if options.per_gpu == "auto":
            cores = max(min(threads or available_cores(), available_cores()) // devices, 1)
            known = Packing(stored.runs[0].program, "cpu", cores, options.mps, {})
            workers = devices * _measured_number(folder, stored, divide, len(gpus), known, stop)
        elif options.per_gpu is not None:
            workers = devices * options.per_gpu
        # The number of cores per run must not depend on how many runs are waiting.
        yield divide(min(workers, len(stored.runs)))


def _serve_by(
    environment: Mapping[str, str], gpus: Sequence[str], worker: int, share: Resources
) -> Resources:
    if not environment:
        return share
    device = {"CUDA_VISIBLE_DEVICES": client_device(gpus, worker % len(gpus))}
    return share._replace(environment={**share.environment, **environment, **device})


class Packing(NamedTuple):
    """What was measured of one network on one kind of device.

    Attributes:
      program: the same for runs that differ in the seed only.
      device: the kind of the device.
      cores: number of cores that feed one device.
      mps: whether NVIDIA's MPS served the processes.
      steps_per_second: of all processes together, by their number; None if they did not train.
      workers: the number that was chosen.
      reason: why not more.
      seconds: that the measurement took.
      time: of the measurement, in ISO format.
    """

    program: str
    device: str
    cores: int
    mps: bool
    steps_per_second: dict[int, float | None]
    workers: int = 1
    reason: str = ""
    seconds: float = 0.0
    time: str = ""

    def same(self, other: "Packing") -> bool:
        """Returns whether both are of the same network and device."""
        return self[:4] == other[:4]


def choose(rates: Mapping[int, float | None], most: int) -> tuple[int, int | None]:
    """Returns the fastest number of processes, and the number to measure next, if any.

    The number doubles as long as the total speed grows by 5 % at least.

    Args:
      rates: total speed by number of processes; None if they did not train.
      most: the largest number to try.
    """
    best, number = 1, 1
    while True:
        if number not in rates:
            return best, number
        rate, fastest = rates[number], rates[best]
        if rate is None or fastest is None:
            return best, None
        if number > 1 and rate < GAIN * fastest:
            return best, None
        best = number
        if number >= most:
            return best, None
        number = min(2 * number, most)


def _measured_number(
    folder: Path,
    stored: StoredPlan,
    divide: Callable[[int], list[Resources]],
    gpus: int,
    found: Packing,
    stop: StopRequest,
) -> int:
    """Returns how many processes per device are fastest, from `packing.json` or measured now.

    Args:
      folder: the sweep folder.
      stored: the plan, whose first network is measured.
      divide: divides the machine among a number of workers.
      gpus: their number.
      found: the network and the device, without measurements; on a GPU without its kind.
      stop: a request to stop.
    """
    devices = max(gpus, 1)
    began = time.monotonic()
    with stop.graceful():
        measure = Measurement(stored.runs[0].content, stop, began + LIMIT_SECONDS)
        if gpus:
            found = found._replace(device=measure.device_kind(divide(devices)[0]))
        known = read_packings(folder)
        found = next((each for each in known if each.same(found)), found)
        most = min(MOST_PER_GPU if gpus else found.cores, -(-len(stored.runs) // devices))
        rates, reason = dict(found.steps_per_second), found.reason
        best, number = choose(rates, most)
        if number is None:
            print(f"{_summary(found._replace(workers=best))}; from {folder / FILE}", flush=True)
            return best
        where = f"a {found.device}" if gpus else "this machine"
        print(
            f"measuring how many runs at a time are fastest on {where}: {LIMIT_SECONDS / 60:g} "
            f"minutes at most, and nothing but {FILE} is written",
            flush=True,
        )
        while number is not None:
            try:
                rates[number] = measure.rate(divide(devices * number)[::devices])
            except NotMeasuredError as error:
                reason = f"{number} processes: {error}"
                rates[number] = None
            best, number = choose(rates, most)
    seconds = found.seconds + time.monotonic() - began
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    found = found._replace(
        steps_per_second=rates, workers=best, reason=reason, seconds=round(seconds, 1), time=now
    )
    print(f"{_summary(found)} ({seconds:.0f} s)", flush=True)
    if rates[1] is not None:  # otherwise the launch shows what is wrong, and it is measured again
        _write_packings(folder, [*(each for each in known if not each.same(found)), found])
    return best


def _summary(found: Packing) -> str:
    rates = ", ".join(
        f"{number}: {rate:,.1f}" for number, rate in found.steps_per_second.items() if rate
    )
    why = f"; {found.reason}" if found.reason else ""
    where = "this machine" if found.device == "cpu" else f"one {found.device}"
    return (
        f"steps per second by runs at a time ({rates or 'none'}{why}): {found.workers} on {where}"
    )


class NotMeasuredError(Exception):
    """Processes did not train, for the reason that the message names."""


class Measurement:
    """Trains one network in several processes at once, without a run folder."""

    def __init__(self, content: dict[str, Any], stop: StopRequest, deadline: float):
        """Starts nothing yet.

        Args:
          content: the config.
          stop: a request to stop.
          deadline: the time, by the monotonic clock, at which measuring ends.
        """
        self._content, self._stop, self._deadline = content, stop, deadline

    def device_kind(self, share: Resources) -> str:
        """Returns the kind of a worker's device; "" if its JAX does not start."""
        try:
            with self._processes(_send_device_kind, [(share,)]) as links:
                return str(self._receive(links)[0])
        except NotMeasuredError:
            return ""

    def rate(self, shares: Sequence[Resources]) -> float:
        """Returns the steps per second of all processes together.

        Raises:
          NotMeasuredError: one of them does not train, or there is no time left.
          Stopped: stopping was requested.
        """
        arguments = [(share, self._content, MEASURED_SECONDS) for share in shares]
        with self._processes(_train_for_seconds, arguments) as links:
            self._receive(links)  # all have compiled
            for link in links:
                with suppress(OSError):  # of a process that is lost; its message is missing then
                    link.send("go")
            return float(sum(self._receive(links)))

    @contextmanager
    def _processes(
        self, target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[list[Connection]]:
        children = [start_child(target, *each) for each in arguments]
        try:
            yield [link for _, link in children]
        finally:
            for process, link in children:
                link.close()
                process.kill()
            for process, _ in children:
                process.join()

    def _receive(self, links: Sequence[Connection]) -> list[Any]:
        """Returns a message from each process, when all have come."""
        received: dict[Connection, Any] = {}
        while missing := [link for link in links if link not in received]:
            if self._stop.signal:
                raise Stopped(self._stop.signal, "; no run was under way")
            if time.monotonic() > self._deadline:
                raise NotMeasuredError(f"{LIMIT_SECONDS:g} s were over")
            for link in wait(missing, POLL_SECONDS):
                assert isinstance(link, Connection)
                try:
                    received[link] = link.recv()
                except (EOFError, OSError):
                    raise NotMeasuredError("one was killed; memory may be exhausted") from None
                if isinstance(received[link], NotMeasuredError):
                    raise received[link]
        return [received[link] for link in links]


def _train_for_seconds(
    link: Connection, share: Resources, content: dict[str, Any], seconds: float
) -> None:
    """Sends True when a step is compiled, and its steps per second after a message."""
    with _reporting(link, share):
        import jax

        from resjax.config import from_dict
        from resjax.train.memory import fits
        from resjax.train.plan import plan
        from resjax.train.trainer import StepRunner, trainer_for

        config = from_dict(content)
        trainer = trainer_for(config)
        state, dispatch = trainer.init(config.seed), plan(trainer, 0)[0]
        if not fits(trainer, state, dispatch):
            raise NotMeasuredError("memory does not suffice")
        with StepRunner(trainer, config.seed, 0) as runner:
            state, before = runner.run(state, dispatch)  # the first dispatch is slower
            jax.block_until_ready(before)
            link.send(True)
            link.recv()
            began, steps, elapsed = time.monotonic(), 0, 0.0
            while not link.poll():  # the others are measured while this one goes on
                state, metrics = runner.run(state, dispatch)
                steps += dispatch.steps
                jax.block_until_ready(before)  # as in training, which is one dispatch ahead
                before = metrics
                if not elapsed and time.monotonic() - began >= seconds:
                    jax.block_until_ready(metrics)
                    elapsed = time.monotonic() - began
                    link.send(steps / elapsed)


def _send_device_kind(link: Connection, share: Resources) -> None:
    with _reporting(link, share):
        import jax

        link.send(jax.devices()[0].device_kind)


@contextmanager
def _reporting(link: Connection, share: Resources) -> Iterator[None]:
    """Claims a share of the machine, and sends an error instead of raising it."""
    end_with_launcher()
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # XLA writes pages about memory that does not suffice
        os.dup2(silence, stream)
    share.claim()
    with suppress(EOFError, OSError):  # the launcher has closed the link
        try:
            from resjax.xla.compilation_cache import enable_compilation_cache
            from resjax.xla.devices import require_devices

            require_devices()
            enable_compilation_cache()
            yield
        except NotMeasuredError as error:
            link.send(error)
        except (EOFError, OSError):
            raise
        except Exception as error:
            link.send(NotMeasuredError(one_line(error, 200)))


def read_packings(folder: Path) -> list[Packing]:
    """Returns what a sweep folder's packing.json holds, without entries of another form."""
    try:
        content = records.read_json(folder / FILE) or {}
    except DamagedFileError:  # it is measured again
        return []
    entries = content.get("packings")
    found = []
    for entry in entries if isinstance(entries, list) else ():
        with suppress(TypeError, ValueError, AttributeError):
            rates = {int(number): rate for number, rate in entry["steps_per_second"].items()}
            found.append(Packing(**{**entry, "steps_per_second": rates}))
    return found


def _write_packings(folder: Path, packings: Sequence[Packing]) -> None:
    try:
        records.write_json(folder / FILE, {"packings": [each._asdict() for each in packings]})
    except OSError as error:  # it is measured again
        print_warning(f"{folder / FILE}: {describe_disk_error(error)}")
