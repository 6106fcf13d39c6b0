"""Saves a run's checkpoints with Orbax while training continues, with a digest of every array.

Orbax commits a checkpoint by renaming its folder, which then holds the list of its digests already,
and an old one is renamed before it is deleted. So at any instant every checkpoint in the folder is
whole. One that fails verification on resume is moved away, never deleted, and the newest one that
passes is restored.
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
from resjax.run_files import Metric
from resjax.train.checkpoint_reader import (
    WRITTEN_AT_COMMIT,
    CheckpointReader,
    Restored,
    StateTemplate,
    describe_array,
    evaluation_costs,
    named_arrays,
)
from resjax.train.distributed import all_processes, is_main_process
from resjax.train.progress import Warn

KEEP_LATEST = 2  # beside the best
SAVE_TIMEOUT_SECONDS = 10**6  # Orbax measures it with a clock that may jump
SPARE_BYTES = 2**20  # for what a checkpoint holds beside its arrays
TRASH = "deleted"  # the folder for checkpoints that are being deleted
RETRY_SECONDS = 60.0  # between a failed save and the next attempt


class CheckpointManager(CheckpointReader):
    """The folder `checkpoints/` of a run in training."""

    def __init__(self, folder: Path, primary: Metric, warn: Warn = lambda _: None):
        """Opens the folder; `primary`, on the test set, decides which checkpoint is the best."""
        super().__init__(folder, warn)
        self._primary = primary
        self._costs: Mapping[int, float] = {}
        self._retry_at: float | None = None
        self._saving: int | None = None  # the step of the newest save
        self._manager = self._open()

    def save(self, state: Any, step: int, record: Mapping[str, Any]) -> None:
        """Starts to save one replica of the state; the next save, `wait` or `close` waits for it.

        A failure is a warning, and `retry_due` says when to try again. The record is JSON; its
        `metrics`, the text of metrics.jsonl, decides which checkpoint is the best.
        """
        try:
            self._save(state, step, record)
        except Exception as error:  # training continues from memory, whatever the error
            self._warn_of_failure(error)

    def save_and_wait(self, state: Any, step: int, record: Mapping[str, Any]) -> None:
        """Saves, and returns when the checkpoint is written.

        Raises:
          UserError: the save failed; names the reason and the newest checkpoint.
        """
        try:
            self._save(state, step, record)
            self._finish()
        except Exception as error:
            raise UserError(
                f"step {step} could not be saved in {self.folder}: {describe_disk_error(error)}; "
                f"{self._newest()}. Fix that and launch the same command again"
            ) from error

    def retry_due(self) -> bool:
        """Returns whether a save failed long enough ago to try again.

        Several processes save again only at the next regular checkpoint, where they meet.
        """
        if jax.process_count() > 1:
            return False
        if self._retry_at is None and not self._manager.is_saving_in_progress():
            self.wait()
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def wait(self) -> None:
        """Waits for a save in progress; warns if it failed."""
        try:
            self._finish()
        except Exception as error:
            self._warn_of_failure(error)

    def restore_latest(self, template: StateTemplate | None) -> Restored | None:
        self.wait()
        return super().restore_latest(template)

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _open(self) -> "_Manager":
        self._retry_at = None
        self._empty_trash()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,
            lightweight_initialize=True,  # reads no checkpoint, which may be damaged
            cleanup_tmp_directories=True,  # of saves that were killed
            todelete_subdir=TRASH,
            async_options=ocp.options.AsyncOptions(
                timeout_secs=SAVE_TIMEOUT_SECONDS, post_finalization_callback=self._before_commit
            ),
        )
        return _Manager(self.folder, options=options)

    def _save(self, state: Any, step: int, record: Mapping[str, Any]) -> None:
        self.wait()
        if not self.folder.parent.is_dir():  # Orbax would create it again
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.folder.parent)
        if not all_processes(self._retry_at is None):  # after a failure in any of them
            self._manager = self._open()
        if step in self._manager.all_steps():
            if record.get("unevaluated") != []:
                return
            self._manager.delete(step)  # it was saved before its evaluation was complete
        self._costs = evaluation_costs(record["metrics"], self._primary)
        arrays = named_arrays(state)
        size = sum(array.nbytes for array in arrays.values())
        if shutil.disk_usage(self.folder).free < size + SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # Orbax would print pages
        described = {name: describe_array(array) for name, array in arrays.items()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            record=ocp.args.JsonSave({**record, "arrays": described}),
        )
        self._saving = step
        self._manager.save(step, args=items, force=True)

    def _before_commit(self) -> None:
        """Lists the files before the commit, so that no checkpoint appears without its list."""
        if is_main_process():
            (uncommitted,) = self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            write_checksums(uncommitted, unlisted=WRITTEN_AT_COMMIT)

    def _finish(self) -> None:
        self._manager.wait_until_finished()
        self._empty_trash()

    def _empty_trash(self) -> None:
        if is_main_process():
            shutil.rmtree(self.folder / TRASH, ignore_errors=True)

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Preserves the newest checkpoints and the best: this object is Orbax's policy.

        Orbax's `BestN` would read the metrics of earlier checkpoints from disk before anything has
        verified them, or after a resume not know which checkpoint is the best.
        """
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        evaluated = [step for step in steps if step in self._costs]
        best = min(evaluated, key=self._costs.__getitem__, default=None)
        return [each.step in (*steps[-KEEP_LATEST:], best) for each in checkpoints]

    def _warn_of_failure(self, error: Exception) -> None:
        self._warn(
            f"a checkpoint could not be saved: {describe_disk_error(error)}; {self._newest()}, "
            f"training continues, and the next attempt is in {RETRY_SECONDS:g} s"
        )
        self._retry_at = time.monotonic() + RETRY_SECONDS

    def _newest(self) -> str:
        steps = self.steps()
        return f"the newest checkpoint is of step {steps[-1]}" if steps else "no checkpoint exists"

    def _skip_damaged(self, step: int, damage: str) -> None:
        folder = self.folder / str(step)
        aside = unused_path(self.folder.parent / "damaged", f"checkpoint-{step}")
        if is_main_process():
            aside.parent.mkdir(exist_ok=True)
            os.rename(folder, aside)
        all_processes(True)  # the others list the folder only after the move
        self._manager.reload()
        self._warn(f"{folder} is damaged: {damage}; it was moved to {aside}")


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Returns False: JAX reports a preemption only once, and the loop has to receive it."""
        return False
