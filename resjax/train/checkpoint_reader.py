"""Reads checkpoints and verifies that they hold what was saved.

Orbax restores flipped bits without an error and takes a truncated checkpoint for the latest. Each
checkpoint therefore carries a record (config, metrics up to its step, and shape, dtype and digest
of each array) and a list of its files with their digests, which is compared before Orbax reads any.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from resjax.disk import DamagedError, verify_checksums
from resjax.errors import UserError, first_few, one_line
from resjax.run_files import Metric, parse_measurement
from resjax.train.distributed import all_processes
from resjax.train.progress import Warn

# Orbax writes these after all others, and no array depends on them: times, and the folder's path.
WRITTEN_AT_COMMIT = "_CHECKPOINT_METADATA", "commit_success.txt"

StateTemplate = Callable[[int], Any]
"""Maps a step to the pytree that its checkpoint holds: arrays, or `jax.ShapeDtypeStruct`s with
shardings, whose shapes, dtypes and placement the restored arrays get. PRNG keys may be among them.
Without a template a checkpoint is a dict of all its arrays by name, on the CPU.
"""


class Restored(NamedTuple):
    """A verified checkpoint."""

    step: int
    state: Any  # of the template's structure
    record: dict[str, Any]


class CheckpointReader:
    """Restores checkpoints from a folder; warns of damaged ones and skips them."""

    def __init__(self, folder: Path, warn: Warn = lambda _: None):
        self.folder = folder.resolve()  # Orbax needs an absolute path
        self._warn = warn

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints in ascending order, whether intact or not."""
        if not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir())
        # Orbax writes no leading zeros, and no digits but those of ASCII.
        return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)

    def restore_latest(self, template: StateTemplate | None) -> Restored | None:
        """Restores the newest checkpoint that passes verification, or returns None without one.

        Raises:
          UserError: an intact checkpoint belongs to another network.
        """
        return self._first_intact(reversed(self.steps()), template)

    def restore_selected(
        self, which: str, template: StateTemplate | None, primary: Metric
    ) -> Restored:
        """Restores the `last` checkpoint, the `best` by the primary metric, or that of a step.

        The best is that of the best of all evaluations, as in the summary.

        Raises:
          UserError: there is no such checkpoint, or it is damaged or belongs to another network.
        """
        steps = self.steps()
        if which not in ("last", "best", *map(str, steps)):
            known = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{self.folder} has no checkpoint of step {which}; it has: {known}")
        candidates = [int(which)] if which.isdecimal() else steps[::-1]
        found = self._first_intact(candidates, template)
        if found and which == "best":
            best = self._best(evaluation_costs(found.record["metrics"], primary), primary)
            found = found if best == found.step else self.restore_step(best, template)
        if found is None:
            raise UserError(f"{self.folder} has no intact checkpoint; train with `resjax train`")
        return found

    def _best(self, costs: Mapping[int, float], primary: Metric) -> int:
        """Returns the first step with the lowest cost.

        Raises:
          UserError: no evaluation was finite, or no checkpoint of that step exists.
        """
        if not costs:
            raise UserError(f"{self.folder}: no test {primary.name} is finite, so none is the best")
        ranked = sorted(costs, key=lambda step: (costs[step], step))
        kept = [step for step in ranked if step in self.steps()]
        if ranked[0] in kept:
            return ranked[0]
        sign = 1 if primary.lower_is_better else -1
        shown = [
            f"step {step} ({primary.format(sign * costs[step])}{' %' * (primary.scale == 100)})"
            for step in (ranked[0], *kept[:1])
        ]
        others = f"; of those that were, {shown[1]} is the best" if kept else ""
        raise UserError(
            f"{self.folder}: the best test {primary.name} was at {shown[0]}, and no checkpoint of "
            f"that step was kept{others}. Name a step, or train with train.checkpoint_every equal "
            "to train.eval_every"
        )

    def restore_step(self, step: int, template: StateTemplate | None) -> Restored | None:
        """Restores the checkpoint of a step; warns and returns None if it is damaged.

        Raises:
          UserError: it is intact, but belongs to another network.
        """
        state = template(step) if template else None
        targets, damage = named_arrays(state) if template else None, ""
        try:
            arrays, record = read_checkpoint(self.folder / str(step), targets)
        except DamagedError as error:
            damage = str(error)
        if all_processes(not damage):
            if targets is None:
                return Restored(step, arrays, record)
            leaves = (arrays[name] for name in targets)
            state = jax.tree.map(lambda leaf: _restored_leaf(leaf, next(leaves)), state)
            return Restored(step, state, record)
        self._skip_damaged(step, damage or "another process could not read it")
        return None

    def _first_intact(
        self, steps: Iterable[int], template: StateTemplate | None
    ) -> Restored | None:
        return next(filter(None, (self.restore_step(step, template) for step in steps)), None)

    def _skip_damaged(self, step: int, damage: str) -> None:
        self._warn(f"{self.folder / str(step)} is damaged: {damage}; it is skipped")


def read_checkpoint(
    folder: Path, targets: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays of a checkpoint by name, and its record.

    Args:
      folder: of one checkpoint.
      targets: shape, dtype and sharding of each array; None for whatever is there, on the CPU.

    Raises:
      DamagedError: the checkpoint is not what was saved.
      UserError: it is, but its arrays are not those of `targets`.
    """
    verify_checksums(folder, WRITTEN_AT_COMMIT)
    try:
        record = _restore_item(folder, "record", ocp.args.JsonRestore())
        saved = record["arrays"]
    except Exception as error:  # damaged files raise all kinds of errors
        raise DamagedError(f"its record cannot be read ({one_line(error, 200)})") from error
    if targets is None:
        cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        targets = {
            name: jax.ShapeDtypeStruct(array["shape"], np.dtype(array["dtype"]), sharding=cpu)
            for name, array in saved.items()
        }
    else:
        theirs = {name: f"{tuple(a['shape'])} {a['dtype']}" for name, a in saved.items()}
        ours = {name: f"{tuple(array.shape)} {array.dtype}" for name, array in targets.items()}
        if different := list(differences(theirs, ours, "the checkpoint")):
            raise UserError(f"{folder} holds another network: {first_few(different, 5, '; ')}")
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(targets))
    try:
        arrays = _restore_item(folder, "state", ocp.args.StandardRestore(shapes))
        changed = [name for name in targets if describe_array(arrays[name]) != saved[name]]
    except Exception as error:
        raise DamagedError(f"its arrays cannot be read ({one_line(error, 200)})") from error
    if changed:
        raise DamagedError(f"{first_few(changed, 1)} changed since it was saved")
    return arrays, record


def _restore_item(folder: Path, name: str, arguments: Any) -> Any:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(**{name: arguments})
        return checkpointer.restore(folder.resolve(), args=items)[name]


def named_arrays(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree by path, as in `params/stage1/block1/conv1/kernel`.

    PRNG keys become arrays of their bits.
    """
    leaves, _ = jax.tree.flatten_with_path(jax.tree.map(_key_bits, tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def describe_array(array: Any) -> dict[str, Any]:
    """Returns shape, dtype and SHA-256 of an array, which may be spread over processes."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = multihost_utils.process_allgather(array, tiled=True)
    host = np.ascontiguousarray(array)
    digest = hashlib.sha256(host.reshape(-1).view(np.uint8).data).hexdigest()
    return {"shape": list(np.shape(array)), "dtype": str(host.dtype), "sha256": digest}


def evaluation_costs(metrics: str, primary: Metric) -> dict[int, float]:
    """Returns the primary metric of each evaluated step, negated if higher is better.

    Args:
      metrics: text of metrics.jsonl.
      primary: metric to look up; steps at which it is missing or not finite are left out.
    """
    lines = [line for text in metrics.splitlines() if (line := parse_measurement(text))]
    sign = 1 if primary.lower_is_better else -1
    costs = {
        line["step"]: sign * line.get(primary.name, math.nan)
        for line in lines
        if line["split"] == "test"
    }
    return {step: cost for step, cost in costs.items() if math.isfinite(cost)}


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _restored_leaf(leaf: Any, array: Any) -> Any:
    """Returns a restored array, as a PRNG key if the template's leaf is one."""
    return jax.random.wrap_key_data(array) if _is_key(leaf) else array


def _key_bits(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    bits = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=leaf.sharding)


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yields a phrase for each array that is not the same in saved arrays and in a network.

    Args:
      theirs, ours: something to compare by the name of each array, such as its shape.
      where: place of the saved arrays, as in "the checkpoint".
    """
    for name in sorted(theirs.keys() | ours.keys()):
        if name not in ours:
            yield f"{name} is only in {where}"
        elif name not in theirs:
            yield f"{name} is not in {where}"
        elif theirs[name] != ours[name]:
            yield f"{name} is {theirs[name]} in {where} and {ours[name]} here"
