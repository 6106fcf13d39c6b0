"""Whose run a folder holds: that of one config, some of whose fields may change when it goes on."""

from pathlib import Path
from typing import Any

from resjax.config import Config, to_dict
from resjax.errors import UserError
from resjax.train import records

# What may change between two launches of a run; `train.steps` only upwards.
MAY_DIFFER = (
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "data.eval_batch_size",
    "data.workers",
)


def require_same_run(config: Config, workdir: Path) -> None:
    """A run folder belongs to one config; a UserError names what differs."""
    if (there := records.read_json(workdir / "config.json")) is not None:
        require_compatible(there, config, workdir)


def require_compatible(there: dict[str, Any], config: Config, workdir: Path) -> None:
    """Refuses to go on with a run of the config `there` under another one."""
    if differences := config_differences(there, to_dict(config)):
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(differences)}); "
            f"choose another --workdir. What may differ: {', '.join(MAY_DIFFER)} (steps upwards)"
        )


def config_differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """In words, the fields that keep a run of one config from going on under the other."""
    theirs, ours = _flat(there), _flat(here)
    return [
        f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and not _may_differ(key, theirs, ours)
    ]


def _may_differ(key: str, theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Whether a run may go on although a field has changed; one that is not there has not."""
    if key not in MAY_DIFFER or key not in theirs.keys() & ours.keys():
        return False
    if key == "train.steps":
        return type(theirs[key]) is type(ours[key]) is int and theirs[key] <= ours[key]
    return True


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= nested if nested is not None else {prefix + key: value}
    return flat
