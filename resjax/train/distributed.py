"""Many processes, on one host or many: they find each other before JAX first looks for devices."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from resjax.errors import UserError

# A process that has not been heard of for so long is lost; the others then end.
HEARTBEAT_SECONDS = 20
LOST = 75  # exit code: sysexits' EX_TEMPFAIL, try again


class Cluster(NamedTuple):
    """How this process finds the others; what is None, SLURM, Open MPI or the TPU slice knows."""

    coordinator: str | None = None  # host:port of process 0
    processes: int | None = None
    process: int | None = None


def join(cluster: Cluster) -> None:
    """Waits for the other processes; from here on `jax.devices()` are those of all.

    Raises:
      UserError: the processes did not find each other, or the environment does not say how.
    """
    import jax

    given = [value is not None for value in cluster]
    if any(given) and not all(given):
        raise UserError("--coordinator, --processes and --process go together; give all three")
    try:
        jax.distributed.initialize(
            *cluster, initialization_timeout=300, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (ValueError, RuntimeError) as error:
        what = str(error).splitlines()[0]
        raise UserError(
            f"the processes did not find each other: {what} "
            "(name them by --coordinator=HOST:PORT --processes=N --process=I)"
        ) from error


@contextmanager
def exit_when_peer_is_lost() -> Iterator[None]:
    """Ends this process, and says why, when a collective fails because another process is gone.

    Leaving in the usual way would wait for the lost one.
    """
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(
            f"resjax: process {jax.process_index()} of {jax.process_count()} ends, because another "
            f"is lost ({str(error).splitlines()[0][:200]}); launch all of them again to go on from "
            "the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)


def is_main_process() -> bool:
    """Whether this is the process that writes."""
    import jax

    return jax.process_index() == 0


def all_processes(ok: bool) -> bool:
    """Whether it is so in every process; all of them must ask, and wait for each other."""
    import jax

    if jax.process_count() == 1:
        return ok
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    return bool(np.all(process_allgather(np.array(ok))))
