"""Reading checkpoints, and whether they are what was saved.

Orbax restores flipped bits without a word, and counts a truncated step as the latest. So every
checkpoint comes with a record: digest, shape and dtype of every array, the config, and the metrics
up to its step. A seal lists its files: Orbax is not asked to read one that is not what was written.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from resjax.disk import DamagedError, summarize, verify_checksums
from resjax.errors import UserError
from resjax.run_files import parse_measurement
from resjax.train.distributed import all_processes
from resjax.train.progress import Warn
from resjax.train.step import State

WRITTEN_LAST = "_CHECKPOINT_METADATA", "commit_success.txt"  # by Orbax, after its callback
SHOWN = 5  # differences that a message lists


# From a checkpoint's step to a state of the shapes that it has, on the devices where it is to lie.
StateTemplate = Callable[[int], State]


class Restored(NamedTuple):
    """A checkpoint that verified."""

    step: int
    state: Any  # of the type that was asked for
    record: dict[str, Any]


class CheckpointReader:
    """The checkpoints in a folder, to be read; what is damaged is told and passed over."""

    def __init__(self, folder: Path, warn: Warn = lambda _: None):
        self.folder = folder.resolve()  # Orbax wants it absolute
        self._warn = warn

    def steps(self) -> list[int]:
        """Of what is there, whole or not, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def restore(self, like: StateTemplate) -> Restored | None:
        """The newest checkpoint that verifies, or None where there is none.

        Raises:
          UserError: a checkpoint verifies, but is of another network.
        """
        for step in reversed(self.steps()):
            if restored := self.verified(step, like):
                return restored
        return None

    def chosen(self, which: str, like: StateTemplate) -> Restored:
        """The `last` checkpoint that verifies, the `best` of them, or that of a step.

        Raises:
          UserError: there is none.
        """
        found = None
        if which in ("last", "best"):
            found = self.restore(like)
        elif int(which) in (there := self.steps()):
            found = self.verified(int(which), like)
        else:
            known = ", ".join(map(str, there)) or "none"
            raise UserError(f"{self.folder} has no checkpoint of step {which}; there: {known}")
        if found and which == "best":
            errors = test_errors(found.record["metrics"])
            evaluated = sorted(errors.keys() & set(self.steps()), key=errors.__getitem__)
            found = next(filter(None, (self.verified(step, like) for step in evaluated)), found)
        if found is None:
            raise UserError(f"{self.folder} has no checkpoint that is whole; `resjax train` again")
        return found

    def verified(self, step: int, like: StateTemplate) -> Restored | None:
        """The checkpoint of a step; None where it is damaged, which is told."""
        state = like(step)
        arrays = named_arrays(state)
        why = ""
        try:
            restored = self._read(step, arrays)
        except DamagedError as error:
            why = str(error)
        if all_processes(not why):
            treedef = jax.tree.structure(_plain(state))
            plain = jax.tree.unflatten(treedef, restored.state.values())
            state = State(**{**plain, "key": jax.random.wrap_key_data(plain["key"])})
            return restored._replace(state=state)
        self._pass_over(step, why or "another process could not read it")
        return None

    def _read(self, step: int, arrays: Mapping[str, Any]) -> Restored:
        record = read_record(self.folder / str(step))
        if differing := list(_differences(record["arrays"], arrays)):
            more = f"; and {len(differing) - SHOWN} more" * (len(differing) > SHOWN)
            raise UserError(
                f"{self.folder / str(step)} holds another network: "
                f"{'; '.join(differing[:SHOWN])}{more}"
            )
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(arrays))
        return Restored(step, read_arrays(self.folder / str(step), target, record), record)

    def _pass_over(self, step: int, why: str) -> None:
        self._warn(f"{self.folder / str(step)} is damaged: {why}; it is passed over")


def read_record(folder: Path) -> dict[str, Any]:
    """What was saved beside the arrays.

    Raises:
      DamagedError: it is not that any more.
    """
    verify_checksums(folder, WRITTEN_LAST)
    try:
        record = _restored(folder, record=ocp.args.JsonRestore())
    except Exception as error:  # a damaged file fails in every way there is
        raise DamagedError(f"its record cannot be read ({summarize(error)})") from error
    if not isinstance(record, dict) or "arrays" not in record:
        raise DamagedError("its record is not what was saved")
    return record


def read_arrays(folder: Path, target: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays by name, in the order of `target`, whose shapes, dtypes and shardings they get.

    Raises:
      DamagedError: one cannot be read, or has another digest than the record says.
    """
    try:
        arrays = _restored(folder, state=ocp.args.StandardRestore(target))
        bad = [name for name in target if describe_array(arrays[name]) != record["arrays"][name]]
    except Exception as error:
        raise DamagedError(f"its arrays cannot be read ({summarize(error)})") from error
    if bad:
        more = f" and {len(bad) - 1} more arrays" if len(bad) > 1 else ""
        raise DamagedError(f"{bad[0]}{more} changed since it was saved")
    return {name: arrays[name] for name in target}


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of a checkpoint by name, whatever they are of, on a CPU; and its record.

    Raises:
      DamagedError: it is not what was saved.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    record = read_record(folder)
    target = {
        name: jax.ShapeDtypeStruct(each["shape"], np.dtype(each["dtype"]), sharding=here)
        for name, each in record["arrays"].items()
    }
    return read_arrays(folder, target, record), record


def _restored(folder: Path, **items: Any) -> Any:
    """One item of a checkpoint."""
    ((name, arguments),) = items.items()
    asked = ocp.args.Composite(**{name: arguments})
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder.resolve(), args=asked)[name]  # it wants it absolute


def named_arrays(state: State) -> dict[str, Any]:
    """A state's arrays by their path, such as `params/stage1/block1/conv1/kernel`."""
    paths, _ = jax.tree.flatten_with_path(_plain(state))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def describe_array(array: Any) -> dict[str, Any]:
    """Shape, dtype and digest of an array, wherever its parts are."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = multihost_utils.process_allgather(array, tiled=True)
    host = np.ascontiguousarray(array)
    digest = hashlib.sha256(host.reshape(-1).view(np.uint8).data).hexdigest()
    return {"shape": list(np.shape(array)), "dtype": str(host.dtype), "sha256": digest}


def test_errors(metrics: str) -> dict[int, float]:
    """The test error of every step that was evaluated, from the text of metrics.jsonl."""
    lines = map(parse_measurement, metrics.splitlines())
    return {line["step"]: line["error"] for line in lines if line and line["split"] == "test"}


def _plain(state: State) -> dict[str, Any]:
    return {**state._asdict(), "key": jax.random.key_data(state.key)}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(there.keys() | here.keys()):
        if name not in here:
            yield f"{name} is only there"
        elif name not in there:
            yield f"{name} is missing there"
        else:
            theirs = tuple(there[name]["shape"]), there[name]["dtype"]
            ours = tuple(here[name].shape), str(here[name].dtype)
            if theirs != ours:
                yield f"{name} is {' '.join(map(str, theirs))} there and {' '.join(map(str, ours))}"
