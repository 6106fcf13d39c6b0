"""The configuration: one schema, from which defaults, types, bounds and error messages follow.

A config file starts from `default_config`, changes what it wants and returns it::

    from resjax.config import default_config

    def get_config():
        config = default_config()
        config.model.depth = 56
        return config

A run's config then goes through `load` (the file), `override` (the command line, a sweep) and
`resolve`, which fills open fields, checks all of it and returns a frozen `Config`. Every mistake in
a config is found here, before anything compiles; this package imports neither JAX nor Flax.

Documented dataclasses as the schema are Kauldron's idea; Python files with a `get_config` are the
custom of ml_collections.
"""

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from resjax.config.checks import SCHEDULES as SCHEDULES
from resjax.config.checks import conflicts
from resjax.config.initial_weights import WEIGHTS_DESCRIPTION as WEIGHTS_DESCRIPTION
from resjax.config.initial_weights import fill_model, model_of
from resjax.config.python_files import errors_in, find_script, import_function
from resjax.config.schema import FIELDS, SECTIONS, find_field, no_such_field
from resjax.config.schema import Config as Config
from resjax.config.schema import Data as Data
from resjax.config.schema import Diagnostics as Diagnostics
from resjax.config.schema import Model as Model
from resjax.config.schema import Optimizer as Optimizer
from resjax.config.schema import Parallel as Parallel
from resjax.config.schema import Task as Task
from resjax.config.schema import Transfer as Transfer
from resjax.errors import UserError
from resjax.models.presets import ARCHITECTURE, architecture
from resjax.run_files import SCHEMA_VERSION, rename_fields
from resjax.text import user_path
from resjax.user_code import trust


def default_config() -> ConfigDict:
    """Returns the schema's defaults, locked: setting a misspelt field raises at once."""
    return _config_dict(dataclasses.asdict(Config()))


def load(path: str | Path) -> ConfigDict:
    """Runs a config file's `get_config` and returns its ConfigDict.

    Args:
      path: a Python file, or the name of one of resjax's own configs, such as `quickstart`; after a
        colon an argument for `get_config`: `imagenet:v1.5`.

    Raises:
      UserError: there is no such file, it raises, or it returns something else.
    """
    text = str(path)
    with_argument = re.fullmatch(r"(.+?\.py|\w+):(.*)", text)
    name, *arguments = with_argument.groups() if with_argument else (text,)
    file = find_script(name, "configs")
    get_config = import_function(file, "get_config", "return a ConfigDict")
    config = default_config()
    with errors_in(file):
        _check_variant(get_config, arguments, name)
        returned = get_config(*arguments)
        if not isinstance(returned, ConfigDict):
            kind = type(returned).__name__
            raise UserError(f"{file}: get_config() returned {kind}; return a ConfigDict")
        config.update(returned.to_dict())
    return config


def _check_variant(get_config: Callable[..., Any], arguments: list[str], name: str) -> None:
    """Refuses a variant of a config that has none, and the lack of one that the config needs."""
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        if arguments:
            raise UserError(f"unknown variant {arguments[0]!r}; {name} has no variants") from error
        raise UserError(f"{name}: write a variant after a colon, {name}:VARIANT") from error


def override(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of `config` in which dotted fields have other values.

    Strings are parsed by the field's type, so `{"model.depth": "56"}` is `{"model.depth": 56}`:
    booleans are `true` and `false`, tuples `0.5,0.75`, an unset field is `None` (`none` is a
    shortcut). Below a dict such as `sweep`, a string is a Python literal, a comma-separated tuple
    of literals, or itself.

    Raises:
      UserError: there is no such field, or the value is not valid for it.
    """
    return _config_dict(_override_values(config.to_dict(), overrides))


def resolve(config: ConfigDict) -> Config:
    """Checks `config` and fills the model fields that it leaves open.

    The values come from `transfer.weights` if that is set, else from the architecture
    `model.name`, else from the family.

    Raises:
      UserError: a field is unknown or its value not valid, values exclude each other, or
        `transfer.weights` cannot be read.
    """
    return _complete(_build(Config, config.to_dict()))


class Variations:
    """Resolves many configs that differ from one config in a few fields.

    Each equals `resolve(override(config, overrides))`, but sections that the overrides leave alone
    are checked only once.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        self._values = config.to_dict()
        self._checked: dict[str, Any] = {}

    def resolve(self, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], Config]:
        """Returns the overrides as their fields store them, and the resolved config.

        Raises:
          UserError: as `override` and `resolve` do.
        """
        values = _override_values(self._values, overrides)
        parsed = {path: reduce(getitem, path.split("."), values) for path in overrides}
        checked = {name: self._check(name, value) for name, value in values.items()}
        return parsed, _complete(Config(**checked))

    def _check(self, name: str, value: Any) -> Any:
        if value is not self._values.get(name):
            return _check(name, value)
        if name not in self._checked:
            self._checked[name] = _check(name, value)
        return self._checked[name]


def _override_values(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested values with overrides; sections without any are the same objects."""
    changed = dict(values)
    for path, value in overrides.items():
        field = find_field(path)
        *sections, name = path.split(".")
        target = changed
        for key in sections:
            inner = target.get(key, {})
            if not isinstance(inner, dict):
                raise UserError(f"{path}: {key} holds {inner!r}, it has no fields")
            target[key] = dict(inner)
            target = target[key]
        parsed = field.parse(value) if isinstance(value, str) else value
        target[name] = field.check(parsed, path)
    for path in overrides:
        section = path.partition(".")[0]
        if path not in FIELDS or FIELDS[path].type in (dict, Any):
            # A ConfigDict sorts dicts by their keys, so a run's config.json has them in this order.
            changed[section] = ConfigDict(changed[section]).to_dict()
    return changed


def _complete(config: Config) -> Config:
    """Checks values against each other and fills the model fields that are open."""
    for message in conflicts(config):
        raise UserError(message)
    trust(code_names(config))  # which the user has typed or written
    model, weights = config.model, config.transfer.weights
    if weights is not None:
        transfer = dataclasses.replace(config.transfer, weights=str(user_path(weights)))
        config = dataclasses.replace(config, transfer=transfer)
    described = None if weights is None else model_of(user_path(weights))
    try:
        if described is not None:
            model = fill_model(model, described)
        filled = architecture(**{name: getattr(model, name) for name in ARCHITECTURE})
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    model = dataclasses.replace(model, **(filled | {"name": None}))
    return dataclasses.replace(config, model=model)


def code_names(config: Config) -> list[str]:
    """Returns the names of the user's own code in a config: `package.module:Name`."""
    names = (
        *(config.model.block, config.model.shortcut, config.task.name),
        *(config.optimizer.name, config.optimizer.schedule, *config.diagnostics.names),
    )
    return [name for name in names if name and ":" in name]


def to_dict(config: Config) -> dict[str, Any]:
    """Returns what identifies a run, as a run folder's `config.json` holds it."""
    content = {
        name: vars(value) if name in SECTIONS else value
        for name, value in vars(config).items()
        if name != "sweep"
    }
    content["model"] = {name: x for name, x in content["model"].items() if name != "name"}
    # Through JSON, so that tuples equal the lists that are read from a file.
    return json.loads(json.dumps(content))


def from_dict(content: Mapping[str, Any]) -> Config:
    """Reads what `to_dict` returned, or an older version of resjax wrote.

    Raises:
      UserError: `content` is not a valid config, or a later version wrote it.
    """
    version = content.get("schema_version", 1)
    if version not in range(1, SCHEMA_VERSION + 1):
        raise UserError(
            f"the config has schema_version={version!r}, and this resjax knows those up to "
            f"{SCHEMA_VERSION}; use the resjax that wrote it, or a later one"
        )
    return _build(Config, _with_later_fields(rename_fields(content)))


FIRST_FIELDS = {
    "model": "family depth block block_options shortcut shortcut_options width widen stem norm "
    "standardize loop dtype zero_init_residual stochastic_depth bn_momentum bn_epsilon remat",
    "data": "name train_split test_split classes per_class subset_seed batch_size eval_batch_size "
    "feed workers image_size on_bad_image train_crop eval_crop crop_padding flip color_jitter "
    "pca_lighting trivial_augment cutout random_erasing mixup cutmix normalization",
    "task": "name options",
    "train": "steps log_every eval_every checkpoint_every nonfinite accumulation_steps",
    "optimizer": "name options learning_rate momentum nesterov beta2 weight_decay weight_decay_on "
    "schedule schedule_options boundaries clip_norm ema_decay decay_factor warmup_steps",
    "transfer": "weights head freeze thaw frozen_norm layer_decay first_rate",
    "diagnostics": "every names options",
    "parallel": "backend shard_parameters bn_devices",
}
"""The fields of schema version 1, by section. A digest leaves out every later field that has the
value it implicitly had then, so that a new field renames no run."""


def _with_later_fields(content: dict[str, Any]) -> dict[str, Any]:
    """Adds fields that an older run lacks, if today's default is not what it trained with."""
    model, transfer = content.get("model"), content.get("transfer")
    if isinstance(model, dict) and "stem" in model:  # a network that `resolve` has filled
        with suppress(ValueError, TypeError):  # an invalid config is refused in its own words
            filled = architecture(**{name: model.get(name) for name in ARCHITECTURE})
            content["model"] = filled | model
        if isinstance(transfer, dict) and transfer.get("weights") is not None:
            content["model"] = {"bn_unbiased": False, **content["model"]}
    return content


def digest(config: Config) -> str:
    """Returns a run's identity: eight hexadecimal digits that change with any field."""
    return hashlib.sha256(canonical(config).encode()).hexdigest()[:8]


def canonical(config: Config) -> str:
    """Returns the JSON text that `digest` hashes."""
    content = to_dict(config)
    first = {
        section: {name: content[section][name] for name in names.split()}
        for section, names in FIRST_FIELDS.items()
    }
    then = _with_later_fields(dict(first))
    identity: dict[str, Any] = {"seed": config.seed}
    for section, fields in first.items():
        implied = _DEFAULTS[section] | then[section]
        changed = (name for name, value in content[section].items() if value != implied[name])
        identity[section] = fields | {name: content[section][name] for name in changed}
    return json.dumps(identity, sort_keys=True, separators=(",", ":"))


_DEFAULTS = to_dict(Config())


def _build(section: Any, values: Any, prefix: str = "") -> Any:
    """Returns the dataclass of a section from its values, each of them checked."""
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix[:-1]}={values!r}: expected a section with fields")
    return section(**{name: _check(f"{prefix}{name}", value) for name, value in values.items()})


def _check(path: str, value: Any) -> Any:
    """Returns the value of a field, or the dataclass of a section, after checks."""
    if path in SECTIONS:
        return _build(SECTIONS[path], value, f"{path}.")
    if path in FIELDS:
        return FIELDS[path].check(value, path)
    raise UserError(no_such_field(path))


def _config_dict(content: dict[str, Any]) -> ConfigDict:
    """Returns a ConfigDict that is locked but for the fields that are dicts."""
    config = ConfigDict(content).lock()
    for path, field in FIELDS.items():
        if field.type is dict:
            reduce(getattr, path.split("."), config).unlock()
    return config
