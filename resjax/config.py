"""The configuration: one schema, from which defaults, types, bounds and error messages follow.

A config file starts from `default_config`, changes what it wants and returns it::

    from resjax.config import default_config

    def get_config():
        config = default_config()
        config.model.depth = 56
        return config

From there a run goes through `load` (the file), `override` (the command line, a sweep)
and `resolve`, which fills what was left open, checks everything and gives a frozen
`Config`. Whatever is wrong with a config is found here, before anything compiles; this
module imports neither jax nor flax.

That documented dataclasses are the schema is Kauldron's idea; that a config is a Python file with a
`get_config` is the habit of ml_collections.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import math
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from ml_collections import ConfigDict

from resjax.data import why_unknown
from resjax.errors import UserError
from resjax.models.presets import ARCHITECTURE, architecture, nearest
from resjax.run_files import read_json_object, rename_fields

WEIGHTS_DESCRIPTION = "weights.json"  # of a weights folder; its "model" is what the weights are of


@dataclass(frozen=True)
class Bounds:
    """Where a number must lie: at least `ge`, above `gt`, at most `le`, below `lt`."""

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.ge <= number <= self.le and self.gt < number < self.lt

    def __str__(self) -> str:
        limits = (
            ("at least", self.ge),
            ("above", self.gt),
            ("at most", self.le),
            ("below", self.lt),
        )
        return " and ".join(
            f"{word} {limit:.12g}" for word, limit in limits if math.isfinite(limit)
        )


Positive = Annotated[int, Bounds(ge=1)]
NotNegative = Annotated[int, Bounds(ge=0)]


@dataclass(frozen=True)
class Model:
    """The network; what is None is as the preset `name` has it, or else the family."""

    # A published architecture, such as cifar_resnet56; the fields below change it.
    name: str | None = None
    # The layout of stages and depths: cifar, wide or imagenet.
    family: str | None = None
    # Layers with weights as the papers count them: 6n + 2 for CIFAR's basic blocks.
    depth: Positive | None = None
    # A block of ours by name, or a class of the user's as package.module:Class.
    block: str | None = None
    # Further fields of the block's class, by name.
    block_options: dict[str, Any] = field(default_factory=dict)
    # What runs beside the branch: none (plain), pad (A), project (B), project_all (C), ...,
    # or a class of the user's as package.module:Class.
    shortcut: str | None = None
    # Further fields of the shortcut's class, by name.
    shortcut_options: dict[str, Any] = field(default_factory=dict)
    # Filters of the first stage; every later stage doubles them.
    width: Positive | None = None
    # Factor on the width of every stage.
    widen: Positive | None = None
    # What comes before the first stage.
    stem: str | None = None
    # batch or group.
    norm: str | None = None
    # Whether every filter of a convolution is brought to mean 0 and variance 1.
    standardize: bool | None = None
    # Layout of a stage's equal blocks: one after the other, or one scanned; the same network.
    loop: Literal["auto", "unroll", "scan"] = "auto"
    # Of the computation; parameters and BN statistics are always float32.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Start every branch at zero, by the scale of its last BN.
    zero_init_residual: bool = False
    # Probability of dropping the last block's branch; linear in the block's position before it.
    stochastic_depth: Annotated[float, Bounds(ge=0, lt=1)] = 0.0
    # Share of the old value in a step of the running statistics (0.9 here is PyTorch's 0.1).
    bn_momentum: Annotated[float, Bounds(ge=0, lt=1)] = 0.9
    # Of the norms; None: 1e-5.
    bn_epsilon: Annotated[float, Bounds(gt=0)] | None = None
    # Keep only the convolutions' outputs for the gradients: less memory, more computation.
    remat: bool = False


@dataclass(frozen=True)
class Data:
    """The data set and what is done to its images."""

    # A data set by name, or one of the user's: tfds:NAME, folder:PATH, npz:PATH.
    name: str = "digits"
    # Trained and tested on, as TFDS writes it: train[:90%]. None: the data set's own splits.
    train_split: str | None = None
    test_split: str | None = None
    # Classes to keep, by number, of training and test set, as 5,6,7; the first becomes class 0, and
    # so on. () keeps all.
    classes: Annotated[tuple[int, ...], Bounds(ge=0)] = ()
    # Training examples to keep of every class. None keeps all.
    per_class: Positive | None = None
    # Seed of the draw that per_class makes; for one seed a larger draw contains a smaller one.
    subset_seed: NotNegative = 0
    # Images a step, over all devices together.
    batch_size: Positive = 128
    # Images a step of the evaluation; changes its speed only.
    eval_batch_size: Positive = 256
    # Where batches come from: the device, on which the whole data set lies; or the host, which
    # reads and decodes them in time. auto: the device, if a quarter of its memory holds all.
    feed: Literal["auto", "device", "stream"] = "auto"
    # Processes of a host that decode for a stream; 0 is a thread. None: one a core.
    workers: NotNegative | None = None
    # Side in pixels to which images are brought; None leaves them as they are.
    image_size: Positive | None = None
    # Whether an image that cannot be decoded ends the run, or is left out and counted.
    on_bad_image: Literal["error", "skip"] = "error"
    # How a stream brings training images to image_size. none: scaled and cut, as for evaluation.
    # random_resized: a random part of 8 to 100 % of the area (Szegedy et al. 2014). scale_jitter:
    # a random part of the image scaled to a random size (He et al. 2015).
    train_crop: Literal["none", "random_resized", "scale_jitter"] = "none"
    # What of a streamed image is evaluated: its center, or the mean over ten crops.
    eval_crop: Literal["center", "ten"] = "center"
    # Pixels of zeros around a training image before it is cropped at random; 0 crops nothing.
    crop_padding: NotNegative = 0
    # Whether training images are mirrored at random.
    flip: bool = False
    # How much brightness, contrast and saturation change at random, as 0.4,0.4,0.4; () nothing.
    color_jitter: Annotated[tuple[float, ...], Bounds(ge=0, lt=math.inf)] = ()
    # Standard deviation of a random shift of colour along the principal axes of all colours, 0.1
    # in AlexNet's paper; 0 shifts nothing.
    pca_lighting: Annotated[float, Bounds(ge=0, lt=math.inf)] = 0.0
    # Whether every training image goes through one operation of TrivialAugment (wide).
    trivial_augment: bool = False
    # Side in pixels of a square of zeros somewhere in every training image; 0 cuts nothing.
    cutout: NotNegative = 0
    # Probability that a rectangle of a training image is erased.
    random_erasing: Annotated[float, Bounds(ge=0, le=1)] = 0.0
    # Training images are averaged in pairs, the one's share of Beta(mixup, mixup); 0 mixes nothing.
    mixup: Annotated[float, Bounds(ge=0, lt=math.inf)] = 0.0
    # Boxes are pasted from one training image into another, their share of Beta(cutmix, cutmix); 0
    # pastes nothing. Where mixup is on too, each batch takes either with probability a half.
    cutmix: Annotated[float, Bounds(ge=0, lt=math.inf)] = 0.0
    # Subtract the mean image, standardise every channel, or do as with the pretrained weights.
    normalization: Literal["pixel_mean", "channel", "weights"] = "pixel_mean"


@dataclass(frozen=True)
class Task:
    """What the network predicts, and how its predictions are scored."""

    # classification, or a class of the user's as package.module:Class.
    name: str = "classification"
    # Further fields of the task's class, such as label_smoothing of classification.
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Train:
    """The training run; its times are in steps."""

    steps: Positive = 64_000
    # Steps between two lines of training metrics; the device takes them in one dispatch.
    log_every: Positive = 100
    # Steps between two evaluations of the test set; a multiple of log_every.
    eval_every: Positive = 400
    # Steps between two checkpoints, a multiple of log_every; 0 keeps the last step only.
    checkpoint_every: NotNegative = 4000
    # When the loss is no finite number. stop: the run ends, and says where it began. skip: nor may
    # a gradient be infinite; such a step changes nothing. record: null is written, and it goes on.
    nonfinite: Literal["stop", "skip", "record"] = "stop"
    label_smoothing: Annotated[float, Bounds(ge=0, lt=1)] = 0.0
    # Equal parts of a batch whose gradients are computed one after the other and averaged, to save
    # memory. Each part has BN statistics of its own.
    accumulation_steps: Positive = 1


@dataclass(frozen=True)
class Optimizer:
    """The optimizer and the learning-rate schedule."""

    # sgd, lars, lamb, adamw, any other optimizer of Optax by its name (adafactor, lion, ...), or a
    # function of the user's as package.module:function: function(learning_rate, **options).
    name: str = "sgd"
    # Further keyword arguments of the optimizer, by name.
    options: dict[str, Any] = field(default_factory=dict)
    # The rate after the warm-up and before the first decay.
    learning_rate: Annotated[float, Bounds(gt=0)] = 0.1
    momentum: Annotated[float, Bounds(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    # Of the second moment, in lamb and adamw.
    beta2: Annotated[float, Bounds(ge=0, lt=1)] = 0.999
    # Factor of the L2 penalty's gradient.
    weight_decay: Annotated[float, Bounds(ge=0)] = 1e-4
    # Decay all parameters, BN's with them as He et al. do, or kernels alone.
    weight_decay_on: Literal["all", "kernels"] = "all"
    # steps: decay at the boundaries. constant: never. cosine: to zero. he2015: steps, and from
    # depth 110 on a tenth of the rate until the training error is below 80 %.
    # onecycle: up from a 25th of the rate and down to next to nothing (Smith & Topin 2018).
    # Or a function of the user's as package.module:function, called as
    # function(learning_rate, steps, **schedule_options); it returns an Optax schedule.
    schedule: str = "steps"
    # Further keyword arguments of a schedule of the user's, by name.
    schedule_options: dict[str, Any] = field(default_factory=dict)
    # Where the rate decays, as fractions of train.steps.
    boundaries: Annotated[tuple[float, ...], Bounds(gt=0, lt=1)] = (0.5, 0.75)
    # Largest global norm of a gradient; 0 clips nothing.
    clip_norm: Annotated[float, Bounds(ge=0)] = 0.0
    # Share of the old value in a step of the weights' moving average; 0 keeps no average.
    ema_decay: Annotated[float, Bounds(ge=0, lt=1)] = 0.0
    # Factor on the rate at every boundary.
    decay_factor: Annotated[float, Bounds(gt=0)] = 0.1
    # Steps in which the rate rises linearly from zero.
    warmup_steps: NotNegative = 0


@dataclass(frozen=True)
class Transfer:
    """What training starts from, which parameters train and when, and how fast each stage does.

    Patterns are module names (`stage4`, `stage4/block1`), whole paths of parameters as the unrolled
    network has them (`stage4/block1/Conv_0/kernel`), or either with `*`, `?` and `[...]`; `*` alone
    is every parameter.
    """

    # A weights folder, as `resjax import` makes it, or a run folder, whose last checkpoint counts.
    weights: str | None = None
    # keep: of the weights. new: drawn anew, for other classes. zero: new, and its kernel is zero.
    head: Literal["keep", "new", "zero"] = "keep"
    # Patterns of what never trains, separated by commas.
    freeze: str = ""
    # From a pattern to the epoch from which what it matches trains, whatever `freeze` says; of
    # several patterns that match a parameter the longest counts, of equally long ones the later.
    thaw: dict[str, Any] = field(default_factory=dict)
    # BN layers that do not train: eval keeps and uses their running statistics, train goes on to
    # use and average those of the batches.
    frozen_norm: Literal["eval", "train"] = "eval"
    # Layer decay, as timm calls it: each stage trains at this factor times the rate of the next,
    # and the head at optimizer.learning_rate.
    layer_decay: Annotated[float, Bounds(gt=0, lt=math.inf)] = 1.0
    # The stem's rate; that of the stages lies between it and optimizer.learning_rate, the head's,
    # by equal factors.
    first_rate: Annotated[float, Bounds(gt=0, lt=math.inf)] | None = None


@dataclass(frozen=True)
class Diagnostics:
    """What is measured inside a training step, one value per layer, and written to layers.jsonl."""

    # Steps between two measurements, a multiple of train.log_every; 0 measures nothing.
    every: NotNegative = 0
    # Diagnostics of ours by name, or functions of the user's as package.module:function.
    names: tuple[str, ...] = ("gradient_norm", "activation_gradient_norm")
    # Keyword arguments of each diagnostic, by its name.
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parallel:
    """How training is spread over the devices that are found."""

    # Sharded jit, or pmap, which trains the same.
    backend: Literal["jit", "pmap"] = "jit"
    # Devices among which parameters and optimiser state are divided (FSDP); jit only.
    shard_parameters: Positive = 1
    # Devices that share BN statistics: 0 all, 1 none with another.
    bn_devices: NotNegative = 0


@dataclass(frozen=True)
class Config:
    """All that defines a run, and in `sweep` the keywords for an experiment's `sweep()`."""

    # Of initialisation, order and augmentation.
    seed: Annotated[int, Bounds(ge=0, lt=2**31)] = 0
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    task: Task = field(default_factory=Task)
    train: Train = field(default_factory=Train)
    optimizer: Optimizer = field(default_factory=Optimizer)
    transfer: Transfer = field(default_factory=Transfer)
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    parallel: Parallel = field(default_factory=Parallel)
    # Says which runs there are, not what one of them is: no part of a run's identity.
    sweep: dict[str, Any] = field(default_factory=dict, compare=False)


def default_config() -> ConfigDict:
    """Returns the schema's defaults, locked: a misspelt field is an error where it is written."""
    return _config_dict(dataclasses.asdict(Config()))


def load(path: str | Path) -> ConfigDict:
    """Runs a config file's `get_config` and returns its ConfigDict.

    Args:
      path: a Python file; with an argument of `get_config` after a colon: `imagenet.py:v1.5`.

    Raises:
      UserError: there is no such file, it does not run, or it returns something else.
    """
    name, colon, argument = str(path).partition(".py:")
    file = Path(name + ".py" if colon else name)
    get_config = getattr(run_file(file), "get_config", None)
    if not callable(get_config):
        raise UserError(f"{file}: has no function get_config(); it must return a ConfigDict")
    with faults_of(file):
        given = get_config(argument) if colon else get_config()
    if not isinstance(given, ConfigDict):
        kind = type(given).__name__
        raise UserError(f"{file}: get_config() returned {kind}; return a ConfigDict")
    config = default_config()
    with faults_of(file):
        config.update(given.to_dict())
    return config


def override(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of `config` in which dotted fields have other values.

    Strings are read by the field's type, so `{"model.depth": "56"}` is `{"model.depth": 56}`.
    Booleans are written `true` and `false`, tuples `0.5,0.75`, and an open field `None`
    (`none` is a shortcut's name). In the free sections a string is the Python literal that it
    looks like, a comma-separated tuple of such, or itself.

    Raises:
      UserError: a field that the schema lacks, or a string that is no value of its type.
    """
    changed = config.to_dict()
    for path, value in overrides.items():
        kind = _kind_of(path)
        *sections, name = path.split(".")
        section = changed
        for key in sections:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise UserError(f"{path}: {key} holds {section!r}, it has no fields")
        if isinstance(value, str):
            value = _parse(value, kind, path)
        section[name] = _check(value, kind, path)
    return _config_dict(changed)


def resolve(config: ConfigDict) -> Config:
    """Fills what `config` leaves open and checks all of it.

    With `transfer.weights` the network is that of the weights, wherever the model section leaves a
    field open.

    Raises:
      UserError: a misspelt field, a wrong type, a value out of bounds, an unknown architecture,
        depth or data set, values that cannot go together, or weights that are not there.
    """
    resolved: Config = _check(config.to_dict(), _Kind(Config), "")
    _check_combinations(resolved)
    if why := why_unknown(resolved.data.name):
        raise UserError(f"data.name: {why}")
    model, transfer = resolved.model, resolved.transfer
    try:
        if transfer.weights is not None:
            model = _over(_model_of(Path(transfer.weights)), model)
        filled = architecture(**{name: getattr(model, name) for name in ARCHITECTURE})
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    model = dataclasses.replace(model, **(filled | {"name": None}))
    # As numbers of one type, so that epoch 2 and epoch 2.0 are one run.
    thaw = {pattern: float(epoch) for pattern, epoch in transfer.thaw.items()}
    return dataclasses.replace(
        resolved, model=model, transfer=dataclasses.replace(transfer, thaw=thaw)
    )


def to_dict(config: Config) -> dict[str, Any]:
    """Returns what identifies a run, as a run folder's `config.json` holds it."""
    content = dataclasses.asdict(config)
    del content["sweep"], content["model"]["name"]
    # Through JSON, so that tuples and what was read from a file compare equal.
    return json.loads(json.dumps(content))


def from_dict(content: Mapping[str, Any]) -> Config:
    """Reads what `to_dict` returned, or an older version of resjax wrote.

    Raises:
      UserError: `content` is not a valid config.
    """
    return _check(rename_fields(content), _Kind(Config), "")


def digest(config: Config) -> str:
    """Returns a run's identity: eight hexadecimal digits that change with any field."""
    canonical = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def run_file(path: Path) -> types.ModuleType:
    """Runs a Python file of the user's and returns it as a module.

    Raises:
      UserError: there is no such file, or it does not run; says where.
    """
    if not path.is_file():
        beside = map(str, sorted(path.parent.glob("*.py")))
        raise UserError(f"{path}: no such file{nearest(path, beside)}")
    # The path as its name, so that the module shadows none that is imported.
    spec = importlib.util.spec_from_file_location(str(path), path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: is no Python file; its name must end in .py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with faults_of(path):
        spec.loader.exec_module(module)
    return module


@contextmanager
def faults_of(path: Path) -> Iterator[None]:
    """Turns what the user's code in `path` raises into a UserError that names file and line."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        file = path if error.filename == str(path.absolute()) else error.filename
        raise UserError(f"{file}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f":{frame.lineno}" for frame in frames if Path(frame.filename) == path.absolute()]
        where = f"{path}{lines[-1] if lines else ''}"
        # A locked ConfigDict's own complaint lists all that it holds.
        if misspelt := re.search(r'Key "(.+?)" does not exist and cannot be added', str(error)):
            raise UserError(f"{where}: {_no_such_field(misspelt[1])}") from error
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{where}: {what}") from error


class _Kind(NamedTuple):
    """What a field may hold, read from its annotation."""

    type: Any
    optional: bool = False
    item: type = float  # of a tuple
    choices: tuple[str, ...] = ()
    bounds: Bounds = Bounds()

    @property
    def is_section(self) -> bool:
        return dataclasses.is_dataclass(self.type)

    def __str__(self) -> str:
        words = {
            bool: "true or false",
            int: "an integer",
            float: "a number",
            str: "a name",
            tuple: {
                float: "numbers, as in 0.5,0.75",
                int: "integers, as in 5,6",
                str: "names, as in a,b",
            }[self.item],
        }
        return words.get(self.type, "a section with fields") + " or None" * self.optional


# What stands below a free section.
_FREE = _Kind(object)


def _kind(annotation: Any) -> _Kind:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])._replace(bounds=arguments[1])
    if origin is Literal:
        return _Kind(str, choices=arguments)
    if origin is tuple:
        return _Kind(tuple, item=arguments[0])
    if origin in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return _kind(inner)._replace(optional=True)
    return _Kind(origin or annotation)


@functools.cache
def _kinds(section: type) -> dict[str, _Kind]:
    hints = typing.get_type_hints(section, include_extras=True)
    return {name: _kind(annotation) for name, annotation in hints.items()}


def _kind_of(path: str) -> _Kind:
    """Finds the kind of a dotted field; below a free section everything is free."""
    kind = _Kind(Config)
    walked: list[str] = []
    for name in path.split("."):
        if kind.type in (dict, object):
            return _FREE
        if not kind.is_section:
            raise UserError(f"{path}: {'.'.join(walked)} holds {kind}, it has no fields")
        walked.append(name)
        if name not in _kinds(kind.type):
            raise UserError(_no_such_field(path))
        kind = _kinds(kind.type)[name]
    if kind.is_section:
        names = ", ".join(_kinds(kind.type))
        raise UserError(f"{path} is a section; set one of its fields: {names}")
    return kind


def _parse(text: str, kind: _Kind, path: str) -> Any:
    """Reads a string as a value of its field's kind."""
    if kind.optional and text == "None":
        return None
    try:
        if kind.type is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind.type in (int, float):
            return kind.type(text)
        if kind.type is tuple:
            return tuple(kind.item(item) for item in text.strip("()").split(",") if item.strip())
        if kind.type is str:
            return text
    except (KeyError, ValueError):
        raise UserError(f"{path}={text}: expected {kind}") from None
    return _parse_free(text)


def _parse_free(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if "," not in text:
            return text
        return tuple(_parse_free(item.strip()) for item in text.split(",") if item.strip())


def _check(value: Any, kind: _Kind, path: str) -> Any:
    """Returns `value` as its field holds it (2 as 2.0, a list as a tuple), or raises."""
    if value is None and kind.optional:
        return None
    if kind.is_section and isinstance(value, Mapping):
        kinds = _kinds(kind.type)
        fields = {}
        for name, item in value.items():
            inner = f"{path}.{name}" if path else str(name)
            if name not in kinds:
                raise UserError(_no_such_field(inner))
            fields[name] = _check(item, kinds[name], inner)
        return kind.type(**fields)
    if kind.type is object or (kind.type is dict and isinstance(value, Mapping)):
        return _plain(value, path)
    if kind.type is tuple and isinstance(value, (list, tuple)):
        return tuple(_check(item, _Kind(kind.item, bounds=kind.bounds), path) for item in value)
    if kind.type is bool and isinstance(value, bool):
        return value
    if kind.type is str and isinstance(value, str):
        if kind.choices and value not in kind.choices:
            raise UserError(_unknown(path, value, kind.choices))
        return value
    number = {int: Integral, float: Real}.get(kind.type)
    if number and isinstance(value, number) and not isinstance(value, bool):
        if kind.type(value) not in kind.bounds:
            raise UserError(f"{path}={value}: must be {kind.bounds}")
        return kind.type(value)
    raise UserError(f"{path}={value!r}: expected {kind}")


def _plain(value: Any, path: str) -> Any:
    """Returns a free section's value as JSON can hold it, with tuples for lists."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence):
        return tuple(_plain(item, path) for item in value)
    raise UserError(f"{path}={value!r}: expected numbers, strings, or lists or dicts of such")


def _check_combinations(config: Config) -> None:
    optimizer, steps = config.optimizer, config.train.steps
    if any(b >= c for b, c in zip(optimizer.boundaries, optimizer.boundaries[1:], strict=False)):
        boundaries = ",".join(f"{boundary:g}" for boundary in optimizer.boundaries)
        raise UserError(f"optimizer.boundaries={boundaries}: must increase")
    if optimizer.warmup_steps >= steps:
        raise UserError(
            f"optimizer.warmup_steps={optimizer.warmup_steps}: must be below train.steps={steps}"
        )
    if optimizer.schedule == "he2015" and optimizer.warmup_steps:
        raise UserError(
            f"optimizer.warmup_steps={optimizer.warmup_steps}: the schedule he2015 brings its own "
            "warm-up; set 0, or optimizer.schedule=steps"
        )
    log_every = config.train.log_every
    for name, every in (
        ("train.eval_every", config.train.eval_every),
        ("train.checkpoint_every", config.train.checkpoint_every),
        ("diagnostics.every", config.diagnostics.every),
    ):
        if every % log_every:
            below = every - every % log_every
            near = " or ".join(str(near) for near in (below, below + log_every) if near)
            raise UserError(
                f"{name}={every}: must be a multiple of train.log_every={log_every}, the "
                f"steps of one dispatch; nearest: {near}"
            )
    _check_names(config)
    if optimizer.schedule == "onecycle" and optimizer.warmup_steps:
        raise UserError(
            f"optimizer.warmup_steps={optimizer.warmup_steps}: onecycle warms up by itself; set 0"
        )
    if optimizer.nesterov and not optimizer.momentum:
        raise UserError("optimizer.nesterov=true: needs optimizer.momentum above 0")
    _check_subset(config.data)
    if len(jitter := config.data.color_jitter) not in (0, 3):
        strengths = ",".join(f"{strength:g}" for strength in jitter)
        raise UserError(
            f"data.color_jitter={strengths}: needs three strengths, of brightness, contrast and "
            "saturation; set 0 for one that stays"
        )

    _check_transfer(config)


SCHEDULES = ("steps", "constant", "cosine", "onecycle", "he2015")
TASKS = ("classification",)


def _check_names(config: Config) -> None:
    for path, name, known in (
        ("task.name", config.task.name, TASKS),
        ("optimizer.schedule", config.optimizer.schedule, SCHEDULES),
    ):
        if name not in known and ":" not in name:
            raise UserError(f"{_unknown(path, name, known)}; or package.module:name of your own")


def _check_transfer(config: Config) -> None:
    transfer = config.transfer
    for pattern, epoch in transfer.thaw.items():
        if isinstance(epoch, bool) or not isinstance(epoch, Real) or epoch < 0:
            raise UserError(
                f"transfer.thaw.{pattern}={epoch!r}: must be an epoch, a number of at least 0"
            )
    if transfer.first_rate is not None and transfer.layer_decay != 1:
        raise UserError(
            f"transfer.layer_decay={transfer.layer_decay:g} and "
            f"transfer.first_rate={transfer.first_rate:g}: either says how fast each stage trains; "
            "set one of them"
        )
    if transfer.weights is None:
        if transfer.head != "keep":
            raise UserError(f"transfer.head={transfer.head}: needs transfer.weights")
        if config.data.normalization == "weights":
            raise UserError("data.normalization=weights: needs transfer.weights")


# What describes the network of a weights folder and of a run folder, under the key "model".
DESCRIPTIONS = WEIGHTS_DESCRIPTION, "config.json"


def _model_of(folder: Path) -> Mapping[str, Any]:
    """The model that a folder of weights, or a run folder, says it holds."""
    where = f"transfer.weights={folder}"
    if folder.is_file():
        raise UserError(
            f"{where}: is a file; import it first: `resjax import {folder} --out=DIR`, then "
            "transfer.weights=DIR"
        )
    if not folder.is_dir():
        raise UserError(f"{where}: no such folder; `resjax import FILE --out={folder}` makes it")
    found = [folder / name for name in DESCRIPTIONS if (folder / name).is_file()]
    if not found:
        raise UserError(
            f"{where}: holds neither weights nor a run: it has no {' and no '.join(DESCRIPTIONS)}"
        )
    try:
        model = read_json_object(found[0]).get("model")
    except ValueError as error:
        raise UserError(f"transfer.weights: {error}") from error
    if not isinstance(model, dict):
        raise UserError(f"transfer.weights: {found[0]}: damaged, describes no model")
    return model


def _over(described: Mapping[str, Any], model: Model) -> Model:
    """The fields of `model`, and for those that it leaves open the described network's."""
    known = {
        name: _check(value, _kinds(Model)[name], f"transfer.weights: model.{name}")
        for name, value in described.items()
        if name in _kinds(Model)
    }
    asked, options = vars(model), {}
    if model.name is None:
        known |= architecture(**{name: known.get(name) for name in ARCHITECTURE})
        for kind in ("block", "shortcut"):  # options belong to the class they were written for
            if asked[kind] in (None, known[kind]):
                options[f"{kind}_options"] = known[f"{kind}_options"] | asked[f"{kind}_options"]
    else:  # a preset says all of the architecture
        known = {name: value for name, value in known.items() if name not in ARCHITECTURE}
    left = {name: value for name, value in known.items() if asked[name] is None}
    return Model(**{**asked, **left, **options})


def _check_subset(data: Data) -> None:
    given = f"data.classes={','.join(map(str, data.classes))}"
    if len(data.classes) == 1:
        raise UserError(f"{given}: one class is nothing to tell apart; name two, or none for all")
    if len(set(data.classes)) < len(data.classes):
        raise UserError(f"{given}: names a class twice")
    if data.subset_seed and data.per_class is None:
        raise UserError(
            f"data.subset_seed={data.subset_seed}: the seed of a draw; set the "
            "number of examples per class, data.per_class"
        )


def _config_dict(content: dict[str, Any]) -> ConfigDict:
    config = ConfigDict(content).lock()
    for free in (
        config.model.block_options,
        config.model.shortcut_options,
        config.task.options,
        config.optimizer.options,
        config.optimizer.schedule_options,
        config.transfer.thaw,
        config.diagnostics.options,
        config.sweep,
    ):
        free.unlock()
    return config


def _no_such_field(path: str) -> str:
    """Names the field that was meant: of that name in another section, or the nearest."""
    fields = list(_fields(Config))
    name = path.rpartition(".")[2]
    by_name = {field.rpartition(".")[2]: field for field in reversed(fields)}
    if name in by_name:
        meant = [by_name[name]]
    else:
        near = difflib.get_close_matches(path, fields)
        meant = near or [by_name[other] for other in difflib.get_close_matches(name, by_name)]
    hint = f"did you mean {meant[0]}?" if meant else f"the sections are {', '.join(_kinds(Config))}"
    return f"{path}: no such field; {hint}"


def _fields(section: type) -> Iterator[str]:
    for name, kind in _kinds(section).items():
        if kind.is_section:
            yield from (f"{name}.{field}" for field in _fields(kind.type))
        else:
            yield name


def _unknown(path: str, value: str, known: Iterable[str]) -> str:
    return f"{path}={value}: unknown{nearest(value, known)}"
