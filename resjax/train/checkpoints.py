"""A run's checkpoints: Orbax writes them, and a digest of every array says whether they are whole.

Orbax's commits are atomic, but it restores flipped bits without a word, and counts a truncated step
as the latest. So every checkpoint comes with a record: digest, shape and dtype of every array, the
config, and the metrics up to its step, all under a digest of the record's own. What does not
verify is set aside, never deleted, and the newest checkpoint that verifies is taken.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from resjax.config import UserError
from resjax.train.distributed import everywhere, leads
from resjax.train.progress import Warn
from resjax.train.records import what_failed
from resjax.train.step import State

KEPT = 2  # newest ones, beside the best
RETRY = 60.0  # seconds from a save that failed to the next try
SHOWN = 5  # differences that a message lists


class Restored(NamedTuple):
    """A checkpoint that verified."""

    step: int
    state: Any  # of the type that was asked for
    record: dict[str, Any]


class DamagedError(Exception):
    """A checkpoint is not what was saved; says what of it."""


class Checkpoints:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: Path, warn: Warn = lambda _: None, *, read_only: bool = False):
        """Opens the folder.

        Args:
          folder: made where it is not there, unless it is only read.
          warn: is told of what is damaged, and of saves that failed.
          read_only: nothing is saved, and nothing is set aside.
        """
        self.folder = folder.resolve()  # a relative one fails later, in the background
        self._warn, self._read_only = warn, read_only
        self._errors: Mapping[int, float] = {}
        self._retry_at: float | None = None
        self._manager = self._open()

    def save(self, state: State, step: int, record: Mapping[str, Any]) -> None:
        """Starts to save; the next call, or `close`, waits for the end.

        A save that fails is told, and `due` says when to try again.

        Args:
          state: as `Backend.one` gives it.
          step: of the state.
          record: what else to save, as JSON holds it. `metrics` in it, the text of metrics.jsonl,
            says which checkpoint is the best.
        """
        try:
            self._save(state, step, record)
        except Exception as error:  # whatever it is, training goes on from memory
            self._failed(error)

    def save_last(self, state: State, step: int, record: Mapping[str, Any]) -> None:
        """Saves, and returns when it is done.

        Raises:
          UserError: it failed; says why, and which checkpoint is there.
        """
        try:
            self._save(state, step, record)
            self._manager.wait_until_finished()
        except Exception as error:
            self._manager = self._open()
            raise UserError(
                f"step {step} could not be saved in {self.folder}: {what_failed(error)}; "
                f"{self._intact()}. Mend that and launch the same command again"
            ) from error

    def due(self) -> bool:
        """Whether a save failed, and it is time to try again.

        Several processes try again at the next checkpoint only: there they meet.
        """
        if jax.process_count() > 1:
            return False
        if self._retry_at is None and not self._manager.is_saving_in_progress():
            self._wait()
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def restore(self, like: State) -> Restored | None:
        """The newest checkpoint that verifies, or None where there is none.

        Args:
          like: a state of the same shapes, on the devices where the restored one is to lie.

        Raises:
          UserError: a checkpoint verifies, but is of another network.
        """
        self._wait()
        for step in reversed(self.steps()):
            if restored := self.verified(step, like):
                return restored
        return None

    def chosen(self, which: str, like: State) -> Restored:
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

    def steps(self) -> list[int]:
        """Of what is there, whole or not, in order."""
        return steps_in(self.folder)

    def verified(self, step: int, like: State) -> Restored | None:
        """The checkpoint of a step; None where it is damaged, and set aside unless only read."""
        arrays = named(like)
        why = ""
        try:
            restored = self._read(step, arrays)
        except DamagedError as error:
            why = str(error)
        if everywhere(not why):
            treedef = jax.tree.structure(_plain(like))
            plain = jax.tree.unflatten(treedef, restored.state.values())
            state = State(**{**plain, "key": jax.random.wrap_key_data(plain["key"])})
            return restored._replace(state=state)
        self._set_aside(step, why or "another process could not read it")
        return None

    def close(self) -> None:
        self._wait()
        self._manager.close()

    def _open(self) -> "_Manager":
        self._retry_at = None
        return open_manager(self.folder, self, read_only=self._read_only)

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Orbax asks after a save: the newest ones stay, and the one of the least test error."""
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        evaluated = [step for step in steps if step in self._errors]
        stays = {*steps[-KEPT:], *sorted(evaluated, key=self._errors.__getitem__)[:1]}
        return [checkpoint.step in stays for checkpoint in checkpoints]

    def _save(self, state: State, step: int, record: Mapping[str, Any]) -> None:
        self._wait()
        if not everywhere(self._retry_at is None):  # whichever process saw it fail
            self._manager = self._open()
        if not self.folder.parent.is_dir():
            raise FileNotFoundError(f"{self.folder.parent} is gone")
        if step in self._manager.all_steps():
            return
        self._errors = test_errors(record["metrics"])
        arrays = named(state)
        described = {name: description(array) for name, array in arrays.items()}
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            record=ocp.args.JsonSave(sealed({**record, "arrays": described})),
        )
        self._manager.save(step, args=arguments, force=True)

    def _wait(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._warn(
            f"a checkpoint could not be saved: {what_failed(error)}; {self._intact()}, training "
            f"goes on, and the next try is in {RETRY:g} s"
        )
        self._retry_at = time.monotonic() + RETRY

    def _intact(self) -> str:
        steps = self.steps()
        return f"the checkpoint of step {steps[-1]} is there" if steps else "none was saved before"

    def _read(self, step: int, arrays: Mapping[str, Any]) -> Restored:
        record = read_record(self._manager, step)
        if differing := list(_differences(record["arrays"], arrays)):
            more = f"; and {len(differing) - SHOWN} more" * (len(differing) > SHOWN)
            raise UserError(
                f"{self.folder / str(step)} holds another network: "
                f"{'; '.join(differing[:SHOWN])}{more}"
            )
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(arrays))
        return Restored(step, read_arrays(self._manager, step, target, record), record)

    def _set_aside(self, step: int, why: str) -> None:
        folder = self.folder / str(step)
        if self._read_only:
            self._warn(f"{folder} is damaged: {why}; it is passed over")
            return
        aside = free_name(self.folder.parent / "damaged", f"checkpoint-{step}")
        if leads():
            aside.parent.mkdir(exist_ok=True)
            os.rename(folder, aside)
        everywhere(True)  # the others look again when it is done
        self._manager.reload()
        self._warn(f"{folder} is damaged: {why}; it was moved to {aside}")


def steps_in(folder: Path) -> list[int]:
    """The steps of which there are checkpoints, whole or not, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def open_manager(folder: Path, policy: Any = None, *, read_only: bool) -> "_Manager":
    """Orbax's manager of a folder; `policy` says which checkpoints stay."""
    return _Manager(
        folder.resolve(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            lightweight_initialize=True,  # what it would read may be damaged
            cleanup_tmp_directories=not read_only,  # of saves that were killed
            read_only=read_only,
            create=not read_only,
        ),
    )


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: JAX says once at which call to stop, and that is the loop's to hear."""
        return False


def read_record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What was saved beside the arrays.

    Raises:
      DamagedError: it is not that any more.
    """
    arguments = ocp.args.Composite(record=ocp.args.JsonRestore())
    try:
        record = manager.restore(step, args=arguments)["record"]
    except Exception as error:  # a damaged file fails in every way there is
        raise DamagedError(f"its record cannot be read ({_short(error)})") from error
    if not isinstance(record, dict) or record != sealed(record):
        raise DamagedError("its record is not what was saved")
    return record


def read_arrays(
    manager: ocp.CheckpointManager, step: int, target: Any, record: Mapping[str, Any]
) -> dict[str, Any]:
    """The arrays by name, in the order of `target`, whose shapes, dtypes and shardings they get.

    Raises:
      DamagedError: one cannot be read, or has another digest than the record says.
    """
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    try:
        arrays = manager.restore(step, args=arguments)["state"]
        bad = [name for name in target if description(arrays[name]) != record["arrays"][name]]
    except Exception as error:
        raise DamagedError(f"its arrays cannot be read ({_short(error)})") from error
    if bad:
        more = f" and {len(bad) - 1} more arrays" if len(bad) > 1 else ""
        raise DamagedError(f"{bad[0]}{more} changed since it was saved")
    return {name: arrays[name] for name in target}


def named(state: State) -> dict[str, Any]:
    """A state's arrays by their path, such as `params/stage1/block1/conv1/kernel`."""
    paths, _ = jax.tree.flatten_with_path(_plain(state))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def description(array: Any) -> dict[str, Any]:
    """Shape, dtype and digest of an array, wherever its parts are."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = multihost_utils.process_allgather(array, tiled=True)
    host = np.ascontiguousarray(array)
    digest = hashlib.sha256(host.reshape(-1).view(np.uint8).data).hexdigest()
    return {"shape": list(np.shape(array)), "dtype": str(host.dtype), "sha256": digest}


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a digest of all the rest of it."""
    content = json.loads(json.dumps({k: v for k, v in record.items() if k != "sha256"}))
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def test_errors(metrics: str) -> dict[int, float]:
    """The test error of every step that was evaluated, from the text of metrics.jsonl."""
    lines = map(json.loads, metrics.splitlines())
    return {line["step"]: line["error"] for line in lines if line["split"] == "test"}


def free_name(folder: Path, name: str) -> Path:
    """A path in `folder` that is not taken."""
    numbered = (folder / f"{name}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 10**6))))
    return next(path for path in numbered if not path.exists())


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


def _short(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
