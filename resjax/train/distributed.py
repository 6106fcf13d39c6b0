"""Joins several processes, on one host or many, before JAX initializes its devices."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from resjax.errors import UserError, one_line

HEARTBEAT_SECONDS = 20  # without a heartbeat after which a process is lost, which ends the others
EXIT_PEER_LOST = 75  # EX_TEMPFAIL of sysexits.h: try again


class Cluster(NamedTuple):
    """How this process finds the others; without arguments from SLURM, Open MPI or the TPU."""

    coordinator: str | None = None  # host:port of process 0
    processes: int | None = None
    process: int | None = None


def join(cluster: Cluster) -> None:
    """Waits for the other processes; afterwards `jax.devices()` are the devices of all.

    Raises:
      UserError: the processes did not find each other, or neither the arguments nor the environment
        say how many there are.
    """
    import jax

    if None in cluster and cluster != Cluster():
        raise UserError("--coordinator, --processes and --process go together; give all three")
    try:
        jax.distributed.initialize(
            *cluster,
            local_device_ids=_own_gpus(),
            initialization_timeout=300,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes did not find each other: {one_line(error)} "
            "(give --coordinator=HOST:PORT --processes=N --process=I)"
        ) from error


def _own_gpus() -> list[int] | None:
    """Returns which visible GPUs are for this SLURM task; None leaves the choice to JAX.

    JAX gives each task of a node the one GPU of its index: too few if there are more GPUs than
    tasks, and a missing one if SLURM shows each task only its own.
    """
    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    per_node = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if not gpus or not per_node:
        return None
    counts = [int(tasks) for tasks, nodes in per_node for _ in range(int(nodes or 1))]
    tasks, task = counts[int(os.environ["SLURM_NODEID"])], int(os.environ["SLURM_LOCALID"])
    if "SLURM_GPUS_PER_TASK" in os.environ or len(gpus) < tasks:
        tasks, task = 1, 0
    return [*range(len(gpus))][task::tasks]


@contextmanager
def exit_when_peer_is_lost() -> Iterator[None]:
    """Ends this process with a message when a collective fails because another process is lost.

    It skips JAX's shutdown, which would wait for the lost process.
    """
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(
            f"resjax: process {jax.process_index()} of {jax.process_count()} ends, because another "
            f"process is lost ({one_line(error)}); launch all of them again to "
            "continue from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_PEER_LOST)


def is_main_process() -> bool:
    """Returns whether this is process 0, which writes the files of a run."""
    import jax

    return jax.process_index() == 0


def any_process(value: bool) -> bool:
    """Returns whether `value` is true in some process; waits until all of them call this."""
    return not all_processes(not value)


def all_processes(value: bool) -> bool:
    """Returns whether `value` is true in every process; waits until all of them call this."""
    import jax

    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    return bool(np.all(process_allgather(np.array(value))))
