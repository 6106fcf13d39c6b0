"""The processor cores of this machine, on Linux and macOS, and the threads that XLA uses."""

import os
from collections.abc import Collection


def core_ids() -> list[int]:
    """Returns the cores this process may use; where the system cannot tell (macOS), all of them."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def available_cores() -> int:
    """Returns the number of cores this process may use."""
    return len(core_ids())


def threads() -> int:
    """Returns on how many threads XLA computes on CPU, which decides how it divides sums.

    That is the environment variable NPROC or else the number of cores that this process may use.
    """
    text = os.environ.get("NPROC", "")
    return int(text) if text.isdecimal() and int(text) else available_cores()


def use_threads(number: int) -> None:
    """Sets what `threads` returns; call it before JAX looks for devices."""
    os.environ["NPROC"] = str(number)


def pin_to_cores(cores: Collection[int]) -> None:
    """Restricts this process to these cores; does nothing where the system cannot (macOS)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
