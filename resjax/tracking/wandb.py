"""Writes a run with the W&B client: offline by default, to the server with WANDB_MODE=online.

Offline, the folder of a run holds one offline run with every value once; `wandb sync` uploads it.
W&B cannot rewind an offline run, so a run that begins anew replaces it. At the server the id of the
run is its digest: rows that the server has are not sent again, and a run that was resumed from a
checkpoint repeats its rows bit for bit.
"""

import math
import os
import shutil
import time
from pathlib import Path

import wandb

from resjax.tracking import End, Row, TrackedRun

DEFAULT_PROJECT = "resjax"
SETTLE_SECONDS = 0.1


class WandB:
    """One run at W&B."""

    def __init__(self, run: TrackedRun):
        mode = os.environ.get("WANDB_MODE", "offline")
        for old in run.folder.glob("wandb/offline-run-*"):
            shutil.rmtree(old)
        settings = wandb.Settings(
            mode=mode,
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            symlink=False,
            reinit="create_new",
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=1.0,  # seconds, for viewers of running runs
        )
        self._run = wandb.init(
            id=run.id,
            name=run.name,
            group=run.group or None,
            project=run.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            dir=run.folder,
            config=run.config | {"provenance": run.provenance},
            resume="allow" if mode == "online" else None,
            settings=settings,
        )
        self._first_step = self._run.step if mode == "online" else 0

    def log(self, row: Row) -> None:
        """Adds a row: its scalars, and a histogram over layers per diagnostic."""
        if row.step < self._first_step:  # the server has it
            return
        values = dict(row.scalars)
        for name, layers in row.layers.items():
            if finite := [value for value in layers.values() if math.isfinite(value)]:
                values[f"{name}/all_layers"] = wandb.Histogram(finite)
        self._run.log(values, step=row.step)

    def flush(self) -> None:
        """Does nothing, because the client's own process writes each row at once."""

    def close(self, end: End) -> None:
        """Adds the summary, `state` and `reason`; the exit code is 0 only for a finished run."""
        self._run.summary.update({**end.summary, "state": end.state, "reason": end.reason})
        self._run.finish(exit_code=0 if end.state == "finished" else 1)
        for file in Path(self._run.settings.sync_dir).glob("*.wandb"):
            _wait_until_written(file)


def _wait_until_written(file: Path) -> None:
    """Waits until a file has stopped growing, because `finish` returns before the last write."""
    size, seen = -1, file.stat().st_size
    while seen != size:
        time.sleep(SETTLE_SECONDS)
        size, seen = seen, file.stat().st_size
