"""The devices that programs are compiled for: those of this process, or described ones.

The platform already matters when JAX traces a program: the gradients of convolutions, the layout of
deep networks and the compile options depend on it. Code that chooses these calls `platform` below
and not `jax.default_backend()`, so that a machine without an accelerator can compile for one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding


class Target(NamedTuple):
    """Devices that need not exist, such as those of `resjax.xla.topologies`.

    Attributes:
      devices: the devices of a topology that a compiler describes, or of this process.
      memory: the bytes that a program may use on one device, or None if unknown.
      present: whether the devices are those of this process and only arrays are described.
    """

    devices: Sequence[jax.Device]
    memory: int | None
    present: bool = False


_target: ContextVar[Target | None] = ContextVar("_target", default=None)


@contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Makes programs in this context be traced and compiled for these devices, but not run."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def described_target() -> Target | None:
    """Returns the target of `compiling_for`, or None if programs are for this process's devices."""
    return _target.get()


def platform() -> str:
    """Returns the platform that programs are compiled for: cpu, tpu, or gpu (also cuda or rocm)."""
    target = _target.get()
    return target.devices[0].platform if target else jax.default_backend()


def devices() -> Sequence[jax.Device]:
    """Returns the devices of all processes that programs are compiled for."""
    target = _target.get()
    return target.devices if target else jax.devices()


def local_devices() -> Sequence[jax.Device]:
    """Returns the devices among `devices` that this process would use."""
    target = _target.get()
    return target.devices if target else jax.local_devices()


def place(array: np.ndarray, sharding: Sharding) -> Any:
    """Places an array on devices; if a target is described, returns shape and sharding instead."""
    if _target.get():
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    return jax.device_put(array, sharding)
