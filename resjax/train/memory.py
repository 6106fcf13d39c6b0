"""Refuses a run that does not fit into its devices' memory, before it starts.

XLA reports what a compiled function needs, so a batch that is too large is refused in one line that
names a size that fits, and not by the allocator after an hour.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from resjax.config import Config
from resjax.errors import UserError, one_line
from resjax.train.parallel import batch_unit, device_memory
from resjax.train.state import TrainState
from resjax.train.trainer import Dispatch, Trainer

GIB = 2**30
BATCHES = "batch_size", "eval_batch_size"


def require_memory(trainer: Trainer, state: TrainState, dispatch: Dispatch) -> None:
    """Refuses a run whose dispatch or evaluation needs more memory than a device has.

    Args:
      trainer: of the run.
      state: in the phase of the dispatch.
      dispatch: the one that needs most memory.

    Raises:
      UserError: says how much is needed, how much there is, and the largest batch found to fit.
    """
    available = device_memory()
    if available is None:
        return
    for field in BATCHES:
        peak = _peak(trainer, state, dispatch, field)
        if peak is not None and peak > available:
            smaller = _largest_fit(trainer, state, dispatch, field, peak, available)
            none = "no smaller one fits either; try a narrower network, or model.remat=true"
            raise UserError(
                f"data.{field}={getattr(trainer.config.data, field)} needs {peak / GIB:.2f} GiB of "
                f"memory per device, and {available / GIB:.2f} GiB are available; "
                f"{f'{smaller} fits' if smaller else none}"
            )


def fits(trainer: Trainer, state: TrainState, dispatch: Dispatch) -> bool:
    """Returns whether a dispatch and an evaluation fit into a device, as far as is known."""
    available = device_memory()
    peaks = (_peak(trainer, state, dispatch, field) for field in BATCHES)
    return available is None or all(peak is None or peak <= available for peak in peaks)


@contextmanager
def report_exhaustion(config: Config) -> Iterator[None]:
    """Turns the allocator's error, if other programs use the device too, into one line.

    Raises:
      UserError: there was not enough memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not re.search("out of memory", str(error), re.IGNORECASE):
            raise
        raise UserError(
            f"{jax.devices()[0].device_kind} is out of memory: {one_line(error)}; lower "
            f"data.batch_size={config.data.batch_size}, or split it by "
            f"train.accumulation_steps={2 * config.train.accumulation_steps}"
        ) from error


def largest_batch(trainer: Trainer, state: TrainState, dispatch: Dispatch) -> int | None:
    """Returns the largest `data.batch_size` found to fit, at most the training split.

    The size is estimated from the memory of the config's batch, which must fit, and checked by
    compiling. None means that the memory of the devices or of the program is unknown.
    """
    peak, available = _peak(trainer, state, dispatch, "batch_size"), device_memory()
    if peak is None or available is None:
        return None
    found = _largest_fit(trainer, state, dispatch, "batch_size", peak, available)
    return max(found or 0, trainer.config.data.batch_size)


def _largest_fit(
    trainer: Trainer, state: TrainState, dispatch: Dispatch, field: str, peak: int, available: int
) -> int | None:
    """Returns a size that fits, estimated from the peak and checked by compiling, or None."""
    size = getattr(trainer.config.data, field)
    unit = trainer.backend.devices
    if field == "batch_size":
        unit = batch_unit(trainer.config, unit)
    arrays = trainer.source.example_arrays()[0 if field == "batch_size" else 1]
    fixed = sum(_bytes_per_device(leaf) for leaf in jax.tree.leaves((state, arrays)))
    most = trainer.source.examples["train" if field == "batch_size" else "test"]
    estimate = (available - fixed) * size / max(peak - fixed, 1)
    for share in SHARES:
        candidate = min(int(share * estimate), most) // unit * unit
        if candidate < unit:
            break
        needed = _peak(trainer.with_batch_size(**{field: candidate}), state, dispatch, field)
        if needed is not None and needed <= available:
            return candidate
    return None


SHARES = (0.98, 0.9, 0.7, 0.4)  # of the estimate; memory is not quite linear in the batch size


def _peak(trainer: Trainer, state: TrainState, dispatch: Dispatch, field: str) -> int | None:
    try:
        if field == "batch_size":
            return trainer.compile_dispatch(state, dispatch).peak_bytes
        splits = trainer.evaluated_splits
        peaks = [trainer.compile_evaluation(state, split).peak_bytes for split in splits]
    except jax.errors.JaxRuntimeError as error:
        if (needed := _needed(str(error))) is None:
            raise
        return needed
    return None if None in peaks else max(peak for peak in peaks if peak is not None)


def _needed(message: str) -> int | None:
    """Returns the bytes that a program needs if a compiler's error says so, or None.

    The compiler of TPUs refuses programs that do not fit: "... the total memory required ...
    (2.00T) exceeds available HBM (15.75G)", or "Used 20.10G of 15.75G hbm".
    """
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else None


def _bytes_per_device(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
