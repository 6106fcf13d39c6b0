"""Decides whether a run may continue under a config: most fields must be those it began with.

The number of steps may change. If the learning rate depends on it, the steps already trained had
other rates than in a run of the new length, so the result is another, and the user must consent.

The number of devices may change, because a step is the same function of its batch on any number. If
BN statistics are computed over the images of some devices only, the run continues only where these
groups of images stay the same.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from resjax.config import Config, Parallel, from_dict, to_dict
from resjax.errors import UserError
from resjax.run_files import DamagedFileError, ScheduleChange, schedule_changes, trained_on
from resjax.train import records
from resjax.train.optimizer import learning_rate
from resjax.train.parallel import bn_groups

# Fields that do not change the results of a step, unless the schedule depends on `train.steps`, or
# BN statistics on `parallel.bn_devices`.
MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.evaluate_train",
    "train.checkpoint_every",
    "data.eval_batch_size",
    "data.workers",
    "parallel.shard_parameters",
    "parallel.bn_devices",
    "diagnostics.every",
    "diagnostics.names",
    "diagnostics.layers",
    "diagnostics.options",
    "track",
)


def require_same_run(config: Config, workdir: Path) -> dict[str, Any] | None:
    """Returns the folder's config.json, or None without one.

    Raises:
      UserError: it does not allow the run to continue.
    """
    saved = records.read_json(workdir / "config.json")
    return None if saved is None else require_compatible(saved, config, workdir)


def require_compatible(saved: dict[str, Any], config: Config, workdir: Path) -> dict[str, Any]:
    """Returns the config of a run, with the names and fields of today.

    Raises:
      UserError: it may not continue under `config`.
    """
    saved = of_today(saved)
    if differences := config_differences(saved, to_dict(config)):
        raise UserError(
            f"{workdir} holds a run with another config ({'; '.join(differences)}); choose another "
            f"--workdir. Fields that may change: {', '.join(MAY_CHANGE)}"
        )
    return saved


def of_today(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns a run's config with the names and fields of today; an invalid one as it is."""
    with suppress(UserError):
        return to_dict(from_dict(saved))
    return saved


def schedule_change(saved: dict[str, Any], config: Config, trained: int) -> ScheduleChange | None:
    """Returns how `config` changes the schedule of the first `trained` steps of a run, if it does.

    Args:
      saved: the run's config so far; only its number of steps differs.
      config: the one under which the run is to continue.
      trained: number of steps.
    """
    before, after = saved["train"]["steps"], config.train.steps
    if before == after:
        return None
    old, new = (_rates(config, steps, trained) for steps in (before, after))
    return None if np.array_equal(old, new) else ScheduleChange(trained, (before, after))


def require_schedule(
    saved: dict[str, Any], config: Config, trained: int, workdir: Path, consent: bool
) -> ScheduleChange | None:
    """Returns what `schedule_change` does, if the user consents to it, now or in an earlier launch.

    Raises:
      UserError: the user has not consented, or the run has trained more steps than `config` has.
    """
    before, steps = saved["train"]["steps"], config.train.steps
    if steps < trained or steps == trained != before:
        raise UserError(
            f"{workdir} has trained {trained} of {before} steps, and train.steps={steps} leaves "
            "none to train; choose another --workdir"
        )
    change = schedule_change(saved, config, trained)
    if change is None or consent or change in _recorded_changes(workdir):
        return change
    old, new = (float(_rates(config, each, trained)[-1]) for each in change.steps)
    raise UserError(
        f"{workdir} has trained {trained} steps by the {config.optimizer.schedule} schedule of a "
        f"run of {before} steps; with train.steps={steps} their rates would be others "
        f"(the last one {new:.3g} and not {old:.3g}). Choose another --workdir, or continue all "
        "the same with --change-schedule, which marks the run in provenance.json and tables"
    )


def require_same_bn_groups(saved: dict[str, Any], config: Config, workdir: Path) -> None:
    """Raises a UserError if BN statistics would be computed over other images than so far."""
    trained, began = trained_on(_provenance(workdir)), Parallel(**saved["parallel"])
    whole = began.bn_devices == config.parallel.bn_devices == 0
    if whole or not trained or config.model.norm != "batch":
        return
    before, now = trained[-1][1].number, jax.device_count()
    groups, groups_now = bn_groups(began, before), bn_groups(config.parallel, now)
    if groups == groups_now:
        return
    images = config.data.batch_size // config.train.accumulation_steps
    ways = []
    if now % groups == 0:
        ways.append(f"set parallel.bn_devices={now // groups if groups > 1 else 0}")
    if began.bn_devices and now != before:
        ways.append(f"resume on {before} devices with parallel.bn_devices={began.bn_devices}")
    raise UserError(
        f"{workdir} has computed BN statistics over {images // groups} images at a time, on "
        f"{before} devices with parallel.bn_devices={began.bn_devices}; on {now} with "
        f"parallel.bn_devices={config.parallel.bn_devices} it would be over "
        f"{images // groups_now}; {', or '.join(ways)}"
    )


def _recorded_changes(workdir: Path) -> list[ScheduleChange]:
    return schedule_changes(_provenance(workdir))


def _provenance(workdir: Path) -> dict[str, Any]:
    with suppress(DamagedFileError):  # a damaged file is replaced
        return records.read_json(workdir / "provenance.json") or {}
    return {}


def _rates(config: Config, steps: int, trained: int) -> np.ndarray:
    """Returns the rates of the first `trained` steps of a run of `steps`."""
    rates = jax.vmap(learning_rate(config.optimizer, steps))(jnp.arange(trained))
    return np.broadcast_to(rates, trained)


def config_differences(saved: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Returns a phrase for each field that keeps a run from continuing under another config."""
    old, new = flatten_dict(saved, sep="."), flatten_dict(config, sep=".")
    return [
        f"{field} is {old.get(field)!r} there and {new.get(field)!r} here"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field) and not _may_change(field, old, new)
    ]


def _may_change(field: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    if field.startswith("diagnostics.options."):  # perhaps only in one of the configs
        return True
    return field in MAY_CHANGE and field in old.keys() & new.keys()
