"""Whether a run fits into its devices' memory, known from what was compiled and before it starts.

XLA counts what a compiled function needs, so a batch that is too large is refused in one line with
the size that fits, and not by the allocator after an hour or with a page of buffers.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax

from resjax.config import Config
from resjax.errors import UserError, one_line
from resjax.train.parallel import device_memory
from resjax.train.step import Program, State

GIB = 2**30


def require_room(program: Program, state: State, steps: int) -> None:
    """Compiles a run's dispatch and evaluation, and refuses what its devices cannot hold.

    Args:
      program: of the run.
      state: of the phase that needs most.
      steps: of the dispatch.

    Raises:
      UserError: says how much is needed, how much is there, and the largest batch found to fit.
    """
    room = device_memory()
    if room is None:
        return
    for field in ("batch_size", "eval_batch_size"):
        peak = _peak(program, state, steps, field)
        if peak is not None and peak > room:
            raise UserError(
                f"data.{field}={getattr(program.config.data, field)} needs {peak / GIB:.2f} GiB of "
                f"a device's memory, and {room / GIB:.2f} GiB are there; "
                f"{_that_fits(program, state, steps, field, peak, room)}"
            )


@contextmanager
def exhaustion_told(config: Config) -> Iterator[None]:
    """What still does not fit when it runs, because others use the device too, is one line as well.

    Raises:
      UserError: for the allocator's complaint.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not re.search("out of memory", str(error), re.IGNORECASE):
            raise
        raise UserError(
            f"{jax.devices()[0].device_kind} has no room: {one_line(error)}; lower "
            f"data.batch_size={config.data.batch_size}, or take its gradients in parts by "
            f"train.accumulation_steps={2 * config.train.accumulation_steps}"
        ) from error


def _that_fits(program: Program, state: State, steps: int, field: str, peak: int, room: int) -> str:
    """The largest batch that fits, near enough: computed, then compiled to be sure."""
    asked = getattr(program.config.data, field)
    unit = program.backend.devices * program.config.train.accumulation_steps
    split = program.train_split if field == "batch_size" else program.test_split
    fixed = sum(_bytes_a_device(leaf) for leaf in jax.tree.leaves((state, split)))
    guess = (room - fixed) * asked / max(peak - fixed, 1)
    for share in (0.98, 0.9, 0.7, 0.4):  # memory is not quite linear in the batch
        size = int(share * guess) // unit * unit
        if size < unit:
            break
        needed = _peak(_with_batch(program, field, size), state, steps, field)
        if needed is not None and needed <= room:
            return f"{size} fits"
    return "no smaller one fits either; a narrower network might, or model.remat=true"


def _with_batch(program: Program, field: str, size: int) -> Program:
    """The same program for another batch; what it has on the devices is shared."""
    changed = copy.copy(program)
    batch: Any = {field: size}
    changed.config = replace(program.config, data=replace(program.config.data, **batch))
    changed.train_split, changed.test_split = program.source.arrays(changed.config)
    changed.forget()
    return changed


def _peak(program: Program, state: State, steps: int, field: str) -> int | None:
    if field == "batch_size":
        return program.compiled(state, steps).peak_bytes
    return program.compiled_evaluation(state).peak_bytes


def _bytes_a_device(leaf: Any) -> int:
    shard = leaf.addressable_shards[0].data
    return shard.size * shard.dtype.itemsize
