"""A run's checkpoints: saved by Orbax, while training goes on, with a digest of every array.

Orbax's commits are atomic. What does not verify when a run goes on is set aside, never deleted, and
the newest checkpoint that does is taken.
"""

import errno
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from resjax.disk import describe_disk_error, unused_path, write_checksums
from resjax.errors import UserError
from resjax.train.checkpoint_reader import (
    CheckpointReader,
    Restored,
    StateTemplate,
    describe_array,
    named_arrays,
    test_errors,
)
from resjax.train.distributed import all_processes, is_main_process
from resjax.train.progress import Warn
from resjax.train.step import State

KEEP_LATEST = 2  # newest ones, beside the best
PATIENCE = 10**6  # seconds for a save: Orbax counts them by a clock that may jump
SPARE = 2**20  # bytes that a checkpoint may need beside its arrays
RETRY_SECONDS = 60.0  # seconds from a save that failed to the next try


class CheckpointManager(CheckpointReader):
    """The folder `checkpoints/` of a run that trains."""

    def __init__(self, folder: Path, warn: Warn = lambda _: None):
        """Opens the folder, which is made where it is not there.

        Args:
          folder: for checkpoints alone.
          warn: is told of what is damaged, and of saves that failed.
        """
        super().__init__(folder, warn)
        self._errors: Mapping[int, float] = {}
        self._retry_at: float | None = None
        self._saving: int | None = None  # the step whose seal is not complete yet
        self._manager = self._open()

    def save(self, state: State, step: int, record: Mapping[str, Any]) -> None:
        """Starts to save; the next call, or `close`, waits for the end.

        A save that fails is told, and `retry_due` says when to try again.

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

    def save_and_wait(self, state: State, step: int, record: Mapping[str, Any]) -> None:
        """Saves, and returns when it is done.

        Raises:
          UserError: it failed; says why, and which checkpoint is there.
        """
        try:
            self._save(state, step, record)
            self._manager.wait_until_finished()
            self._complete_seal()
        except Exception as error:
            raise UserError(
                f"step {step} could not be saved in {self.folder}: {describe_disk_error(error)}; "
                f"{self._intact()}. Mend that and launch the same command again"
            ) from error

    def retry_due(self) -> bool:
        """Whether a save failed, and it is time to try again.

        Several processes try again at the next checkpoint only: there they meet.
        """
        if jax.process_count() > 1:
            return False
        if self._retry_at is None and not self._manager.is_saving_in_progress():
            self.wait()
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def wait(self) -> None:
        """Until what is being saved is there, or has failed, which is told."""
        try:
            self._manager.wait_until_finished()
            self._complete_seal()
        except Exception as error:
            self._failed(error)

    def restore(self, like: StateTemplate) -> Restored | None:
        self.wait()
        return super().restore(like)

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _open(self) -> "_Manager":
        self._retry_at = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,
            lightweight_initialize=True,  # what it would read may be damaged
            cleanup_tmp_directories=True,  # of saves that were killed
            async_options=ocp.options.AsyncOptions(
                timeout_secs=PATIENCE, post_finalization_callback=self._seal
            ),
        )
        return _Manager(self.folder, options=options)

    def _seal(self) -> None:
        """Orbax calls it when all is written but the commit, so that a seal comes with it."""
        if is_main_process():
            (uncommitted,) = self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            write_checksums(uncommitted)

    def _complete_seal(self) -> None:
        """Lists also what Orbax wrote at the commit; a process that was killed before does not."""
        step, self._saving = self._saving, None
        if step is not None and is_main_process():
            write_checksums(self.folder / str(step))

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Orbax asks after a save: the newest ones stay, and the one of the least test error."""
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        evaluated = [step for step in steps if step in self._errors]
        stays = {*steps[-KEEP_LATEST:], *sorted(evaluated, key=self._errors.__getitem__)[:1]}
        return [checkpoint.step in stays for checkpoint in checkpoints]

    def _save(self, state: State, step: int, record: Mapping[str, Any]) -> None:
        self.wait()
        if not self.folder.parent.is_dir():  # Orbax would make it again
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.folder.parent)
        if not all_processes(self._retry_at is None):  # whichever process saw it fail
            self._manager = self._open()
        if step in self._manager.all_steps():
            return
        self._errors = test_errors(record["metrics"])
        arrays = named_arrays(state)
        self._require_room(sum(array.nbytes for array in arrays.values()))
        described = {name: describe_array(array) for name, array in arrays.items()}
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            record=ocp.args.JsonSave({**record, "arrays": described}),
        )
        self._saving = step
        self._manager.save(step, args=arguments, force=True)

    def _require_room(self, size: int) -> None:
        """Refuses what would fill the disk: Orbax would say so in a hundred pages."""
        if shutil.disk_usage(self.folder).free < size + SPARE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _failed(self, error: Exception) -> None:
        self._warn(
            f"a checkpoint could not be saved: {describe_disk_error(error)}; {self._intact()}, "
            f"training goes on, and the next try is in {RETRY_SECONDS:g} s"
        )
        self._retry_at = time.monotonic() + RETRY_SECONDS

    def _intact(self) -> str:
        steps = self.steps()
        return f"the checkpoint of step {steps[-1]} is there" if steps else "none was saved before"

    def _pass_over(self, step: int, why: str) -> None:
        folder = self.folder / str(step)
        aside = unused_path(self.folder.parent / "damaged", f"checkpoint-{step}")
        if is_main_process():
            aside.parent.mkdir(exist_ok=True)
            os.rename(folder, aside)
        all_processes(True)  # the others look again when it is done
        self._manager.reload()
        self._warn(f"{folder} is damaged: {why}; it was moved to {aside}")


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: JAX says once at which call to stop, and that is the loop's to hear."""
        return False
