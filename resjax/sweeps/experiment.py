"""The plan of a sweep: every run of an experiment on a config, resolved and checked.

The plan is complete before anything is trained or written, so an impossible network in the last run
of a sweep is an error now, and not after a night.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from resjax.config import Config, digest, override, resolve, to_dict
from resjax.config.python_files import errors_in, import_function
from resjax.errors import UserError


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its overrides and its resolved config."""

    overrides: dict[str, Any]
    config: Config

    @property
    def name(self) -> str:
        """The name of its folder, readable and unique: `depth56-none-seed0-1a2b3c4d`."""
        values = "-".join(_short(field, value) for field, value in self.overrides.items())
        return f"{values[:100]}-{digest(self.config)}".lstrip("-.")


@dataclass(frozen=True)
class Plan:
    """The runs of an experiment, in the order of its sweep."""

    experiment: Path
    runs: tuple[Run, ...]


def plan(experiment: Path, config: ConfigDict) -> Plan:
    """Calls the experiment's `sweep` with the keywords `config.sweep` and resolves its runs.

    If a keyword's default is a tuple, a single value becomes a tuple of one, as in
    `--config.sweep.seeds=0`.

    Raises:
      UserError: there is no such experiment or keyword, a run's config is not valid, or two runs
        are the same.
    """
    sweep = import_function(experiment, "sweep", "yield a run's overrides")
    keywords = _keywords(experiment, sweep, config.sweep.to_dict())
    with errors_in(experiment):
        sweeping = list(sweep(**keywords))
    runs: dict[str, Run] = {}
    for overrides in sweeping:
        run = _resolve_run(experiment, config, overrides)
        identity = json.dumps(to_dict(run.config), sort_keys=True)
        if identity in runs:
            same = f"{_text(runs[identity].overrides)} and {_text(overrides)}"
            raise UserError(f"{experiment}: two of its runs are the same: {same}")
        runs[identity] = run
    if not runs:
        raise UserError(f"{experiment}: sweep() yields no run")
    return Plan(experiment, tuple(runs.values()))


def _keywords(
    experiment: Path, sweep: Callable[..., Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    parameters = inspect.signature(sweep).parameters
    keywords = {}
    for name, value in values.items():
        if name not in parameters:
            known = ", ".join(parameters) or "no keyword"
            raise UserError(f"sweep.{name}: the sweep of {experiment} takes {known}")
        single = isinstance(parameters[name].default, tuple) and not isinstance(
            value, (tuple, list)
        )
        keywords[name] = (value,) if single else value
    return keywords


def _resolve_run(experiment: Path, config: ConfigDict, overrides: Any) -> Run:
    if not isinstance(overrides, Mapping):
        raise UserError(
            f"{experiment}: sweep() yields {overrides!r}; it must yield dicts of overrides"
        )
    try:
        changed = override(config, overrides)
        values = changed.to_dict()
        parsed = {name: reduce(getitem, name.split("."), values) for name in overrides}
        return Run(parsed, resolve(changed))
    except UserError as error:
        raise UserError(f"{experiment}: run {_text(overrides)}: {error}") from error


def _text(overrides: Mapping[str, Any]) -> str:
    return " ".join(f"{field}={value}" for field, value in overrides.items()) or "without overrides"


def _short(field: str, value: Any) -> str:
    name = value.rpartition(":")[2] if isinstance(value, str) else f"{field.split('.')[-1]}{value}"
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")
