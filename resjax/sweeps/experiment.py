"""The plan of a sweep: every run of an experiment on a config, resolved and checked.

The plan is complete before anything is trained or written, so an impossible network in the last run
of a sweep is an error now, and not after a night.
"""

import hashlib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from resjax.config import Config, Variations, canonical
from resjax.config.python_files import errors_in, import_function
from resjax.errors import UserError
from resjax.models.presets import (
    FAMILIES,
    ImpossibleDepthError,
    block_layers,
    nearest,
    nearest_depths,
)
from resjax.run_files import experiment_name


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its overrides and its resolved config."""

    overrides: dict[str, Any]
    config: Config

    @cached_property
    def identity(self) -> str:
        """The SHA-256 of its config, equal for equal runs only; `digest` is its beginning."""
        return hashlib.sha256(canonical(self.config).encode()).hexdigest()

    @cached_property
    def name(self) -> str:
        """The name of its folder, readable and unique: `depth56-none-seed0-1a2b3c4d`."""
        values = "-".join(_short(field, value) for field, value in self.overrides.items())
        return f"{values[:100]}-{self.identity[:8]}".lstrip("-.")


class Keyword(NamedTuple):
    """A keyword with which an experiment's `sweep` is called, and where its value comes from."""

    value: Any
    source: str


@dataclass(frozen=True)
class Plan:
    """The runs of an experiment, in the order of its sweep, and the keywords of `sweep`."""

    experiment: Path
    runs: tuple[Run, ...]
    keywords: Mapping[str, Keyword]

    @property
    def description(self) -> str:
        """The number of runs, and each keyword with its source on a line of its own."""
        runs = "1 run" if len(self.runs) == 1 else f"{len(self.runs)} runs"
        lines = [f"  {_sourced(name, keyword)}" for name, keyword in self.keywords.items()]
        return "\n".join([f"{self.experiment}: {runs}", *lines])


def plan(
    experiment: Path, config: ConfigDict, file: str = "the config", typed: Collection[str] = ()
) -> Plan:
    """Calls the experiment's `sweep` with the keywords of `config.sweep` and resolves its runs.

    Values below an experiment's name hold for that experiment only, as in `config.sweep =
    {"degradation": {"depths": (8, 20)}}`. Values without a name hold for every experiment and come
    first; those of the command line are among them. If a keyword's default is a tuple, a single
    value becomes a tuple of one, as in `--config.sweep.seeds=0`.

    Args:
      experiment: the file.
      config: the base of every run.
      file: the file that the config comes from, for messages.
      typed: the fields that were set on the command line.

    Raises:
      UserError: there is no such experiment or keyword, a run's config is not valid, or two runs
        are the same.
    """
    sweep = import_function(experiment, "sweep", "yield a run's overrides")
    given = _given_keywords(experiment, sweep, config.sweep.to_dict(), file, typed)
    with _keywords_named(given), errors_in(experiment):
        sweeping = list(sweep(**{name: keyword.value for name, keyword in given.items()}))
    runs: dict[str, Run] = {}
    variations = Variations(config)
    for overrides in sweeping:
        with _keywords_named(given):
            run = _resolve_run(experiment, variations, overrides, sweeping)
        if run.identity in runs:
            same = f"{_text(runs[run.identity].overrides)} and {_text(overrides)}"
            raise UserError(f"{experiment}: two of its runs are the same: {same}")
        runs[run.identity] = run
    if not runs:
        raise UserError(f"{experiment}: sweep() yields no run")
    keywords = {
        name: given.get(name) or Keyword(parameter.default, "default")
        for name, parameter in inspect.signature(sweep).parameters.items()
    }
    return Plan(experiment, tuple(runs.values()), keywords)


def _given_keywords(
    experiment: Path,
    sweep: Callable[..., Any],
    values: Mapping[str, Any],
    file: str,
    typed: Collection[str],
) -> dict[str, Keyword]:
    """Returns the keywords that the config or the command line sets for this experiment."""
    parameters = inspect.signature(sweep).parameters
    name = experiment_name(experiment)
    everywhere = {f"sweep.{key}": v for key, v in values.items() if not isinstance(v, Mapping)}
    own = values[name] if isinstance(values.get(name), Mapping) else {}
    fields = {f"sweep.{name}.{key}": value for key, value in own.items()} | everywhere
    for field in typed:
        if field.startswith("sweep.") and field not in fields and f"sweep.{name}." not in field:
            raise UserError(
                f"--config.{field}: this experiment is {name}, not {field.split('.')[1]}"
            )
    keywords = {}
    for field, value in fields.items():
        keyword = field.rpartition(".")[2]
        is_typed = any(field == each or each.startswith(f"{field}.") for each in typed)
        if keyword not in parameters:
            where = f"--config.{field}" if is_typed else f"{file}: {field}"
            hint = nearest(keyword, parameters) if parameters else "; it takes no keyword"
            raise UserError(f"{where}: sweep() of {experiment} has no such keyword{hint}")
        default = parameters[keyword].default
        single = isinstance(default, tuple) and not isinstance(value, (tuple, list))
        source = "the command line" if is_typed else file
        keywords[keyword] = Keyword((value,) if single else value, source)
    return keywords


def _resolve_run(
    experiment: Path, variations: Variations, overrides: Any, sweeping: Sequence[Any]
) -> Run:
    if not isinstance(overrides, Mapping):
        raise UserError(
            f"{experiment}: sweep() yields {overrides!r}; it must yield dicts of overrides"
        )
    try:
        return Run(*variations.resolve(overrides))
    except UserError as error:
        message = f"{experiment}: run {_text(overrides)}: {error}"
        if isinstance(error.__cause__, ImpossibleDepthError):
            message += _common_depths(error.__cause__, variations.config, sweeping)
        raise UserError(message) from error


def _common_depths(
    error: ImpossibleDepthError, config: ConfigDict, sweeping: Sequence[Mapping[str, Any]]
) -> str:
    """Returns the nearest depths for all blocks of a sweep, if their numbers of layers differ."""
    blocks = {overrides.get("model.block", config.model.block) for overrides in sweeping}
    try:
        layers = {block_layers(block or FAMILIES[error.family]["block"]) for block in blocks}
    except ValueError:  # another run's block does not exist
        return ""
    near = nearest_depths(error.depth, layers, error.family)
    return f"; for all blocks of the sweep: {near}" if len(layers) > 1 else ""


def _text(overrides: Mapping[str, Any]) -> str:
    return " ".join(f"{field}={value}" for field, value in overrides.items()) or "without overrides"


@contextmanager
def _keywords_named(given: Mapping[str, Keyword]) -> Iterator[None]:
    """Adds the keywords that were set, and where, to the message of an error."""
    try:
        yield
    except UserError as error:
        sources = "; ".join(_sourced(name, keyword) for name, keyword in given.items())
        raise UserError(f"{error}; sweep: {sources}" if given else str(error)) from error


def _sourced(name: str, keyword: Keyword) -> str:
    """Returns a keyword as it is typed on the command line, and where it comes from."""
    value, source = keyword
    text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    return f"{name}={text} ({source})"


def _short(field: str, value: Any) -> str:
    name = value.rpartition(":")[2] if isinstance(value, str) else f"{field.split('.')[-1]}{value}"
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")
