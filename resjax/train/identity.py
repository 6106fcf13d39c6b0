"""Decides whether a run may continue under a config: most fields must be those it began with."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from resjax.config import Config, from_dict, to_dict
from resjax.errors import UserError
from resjax.train import records

# Fields that do not change the results of a step; `train.steps` may only grow.
MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "data.eval_batch_size",
    "data.workers",
    "diagnostics.every",
    "diagnostics.names",
    "diagnostics.options",
)


def require_same_run(config: Config, workdir: Path) -> None:
    """Raises a UserError if the folder's config.json does not allow the run to continue."""
    if (saved := records.read_json(workdir / "config.json")) is not None:
        require_compatible(saved, config, workdir)


def require_compatible(saved: dict[str, Any], config: Config, workdir: Path) -> None:
    """Raises a UserError if a run with the config `saved` may not continue under `config`."""
    with suppress(UserError):  # an invalid config differs in its own words
        saved = to_dict(from_dict(saved))  # of an earlier version, with names and fields of today
    if differences := config_differences(saved, to_dict(config)):
        raise UserError(
            f"{workdir} holds a run with another config ({'; '.join(differences)}); choose another "
            f"--workdir. Fields that may change: {', '.join(MAY_CHANGE)} (steps may only grow)"
        )


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
    if field not in MAY_CHANGE or field not in old.keys() & new.keys():
        return False
    if field == "train.steps":
        return type(old[field]) is type(new[field]) is int and old[field] <= new[field]
    return True
