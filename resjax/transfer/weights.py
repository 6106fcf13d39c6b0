"""A network's weights with everything needed to use them, in memory and as a weights folder.

`resjax import` writes weights folders. `weights.safetensors` holds each array under its path in the
unrolled layout, `weights.json` describes the network and its preprocessing, and SHA256SUMS holds
the digests of both.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resjax.config import WEIGHTS_DESCRIPTION as DESCRIPTION
from resjax.config import Config
from resjax.config import Task as TaskConfig
from resjax.config.schema import FIELDS
from resjax.data.crops import usual_shorter_side
from resjax.data.decoding import Interpolation
from resjax.data.normalization import Statistics
from resjax.disk import DamagedError, verify_checksums, write_atomically, write_checksums
from resjax.errors import UserError, first_few, one_line
from resjax.models.layout import Variables, unrolled_shapes
from resjax.models.presets import ARCHITECTURE, architecture
from resjax.models.resnet import ResNet, build
from resjax.run_files import read_json_object
from resjax.tasks import TASKS, DatasetInfo, Task, make_task
from resjax.user_code import require_trusted

ARRAYS = "weights.safetensors"
LARGEST_SIDE = 1 << 14  # of an image in pixels
CLASSIFICATION: Mapping[str, Any] = {"name": "classification", "options": {}}
# Model fields that change how a network is trained or compiled, but not what it computes.
TRAINING_ONLY = frozenset(("name", "loop", "remat", "stochastic_depth", "zero_init_residual"))


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input in evaluation.

    It is resized so that its shorter side has `shorter_side` pixels, then a square is cropped from
    its center.
    """

    size: int  # side of the square in pixels
    shorter_side: int
    channels: int = 3
    interpolation: Interpolation = "bilinear"
    squash: bool = False  # resize both sides to `shorter_side`, which changes the aspect ratio

    def __post_init__(self) -> None:
        """Raises ValueError if a field, which may come from a file, has an impossible value."""
        for name in ("size", "shorter_side", "channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= LARGEST_SIDE:
                raise ValueError(f"{name} must be a whole number from 1 to {LARGEST_SIDE:,}")
        if self.shorter_side < self.size:
            raise ValueError(f"a square of {self.size} needs a shorter side of as much")
        if self.interpolation not in get_args(Interpolation) or not isinstance(self.squash, bool):
            raise ValueError("interpolation or squash has an unknown value")


@dataclass(frozen=True)
class Weights:
    """A trained network.

    Attributes:
      model: fields of `resjax.build`: architecture, `classes`, ...
      variables: `params` and `batch_stats` in the unrolled layout, as float32 NumPy arrays. A
        backbone has no `params/head`.
      statistics: normalization of RGB images, for `resjax.data.normalization.normalize`.
      preprocessing: what precedes the normalization.
      class_names: one for each class, or empty if they are unknown.
      task: `name` and `options` of the task whose head the weights have, as in a config.
      source: where the weights come from: `file`, its `sha256`, `format`, ...
    """

    model: Mapping[str, Any]
    variables: Variables
    statistics: Statistics
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=lambda: CLASSIFICATION)

    def network(self, **overrides: Any) -> ResNet:
        """Returns the network, with overrides such as `loop="scan"` or `dtype="bfloat16"`."""
        return network_of({**self.model, **overrides}, self.task)

    def made_task(self) -> Task:
        """Returns the task whose head the weights have.

        Raises:
          UserError: there is no such task, or it has no such options.
        """
        return task_of(self.task, self.model["classes"], self.class_names)


def describe_run(
    config: Config,
    statistics: Statistics,
    image_shape: Sequence[int],
    class_names: Sequence[str],
    *,
    streamed: bool,
) -> dict[str, Any]:
    """Returns what a run's checkpoints record as `weights`, for `from_description`.

    The preprocessing is that of the run's evaluation; for `data.eval_crop=ten`, which averages over
    ten crops, it is the center crop alone.

    Args:
      config: of the run, resolved.
      statistics: those that the run normalizes images with.
      image_shape: (h, w, c) of a batch's images.
      class_names: one for each class.
      streamed: whether images are cropped on the host, from files of any size.

    Returns:
      A JSON object. Its `preprocessing` is None if images are not square. Without classes, as for
      every task of the user's, the weights are a backbone.
    """
    height, width, channels = image_shape
    preprocessing = None
    if height == width:
        resized = streamed and config.data.image_size is not None
        shorter_side = usual_shorter_side(height) if resized else height
        preprocessing = Preprocessing(int(height), int(shorter_side), int(channels))
    model = {k: v for k, v in asdict(config.model).items() if k not in TRAINING_ONLY}
    task: Mapping[str, Any] = asdict(config.task)
    if config.task.name not in TASKS:
        class_names, task = (), CLASSIFICATION
    if config.task.name == "classification":
        task = CLASSIFICATION  # its options are those of the loss
    return _description(
        {**model, "classes": len(class_names)}, statistics, preprocessing, class_names, task
    )


def describe(weights: Weights) -> dict[str, Any]:
    """Returns a JSON object of everything about weights except their arrays and their source."""
    return _description(
        weights.model,
        weights.statistics,
        weights.preprocessing,
        weights.class_names,
        weights.task,
    )


def _description(
    model: Mapping[str, Any],
    statistics: Statistics,
    preprocessing: Preprocessing | None,
    class_names: Sequence[str],
    task: Mapping[str, Any],
) -> dict[str, Any]:
    mean, std = (np.asarray(array, np.float32).tolist() for array in statistics[:2])
    return {
        "model": dict(model),
        "statistics": {"mean": mean, "std": std},
        "preprocessing": preprocessing and asdict(preprocessing),
        "class_names": list(class_names),
        **({} if task == CLASSIFICATION else {"task": dict(task)}),
    }


def from_description(
    description: Mapping[str, Any], variables: Variables, source: Mapping[str, Any]
) -> Weights:
    """Returns weights from what `describe` or `describe_run` returned, and their arrays.

    Raises:
      UserError: the description is damaged, or the images are not square, so no preprocessing
        leads to them.
    """
    with reading("the description"):
        if description["preprocessing"] is None:
            raise UserError(
                "was trained on images that are not square, which weights cannot describe; train "
                "on square ones, such as with data.image_size"
            )
        arrays = description.get("statistics", description)  # older exports have them at the top
        mean, std = (np.asarray(arrays[name], np.float32) for name in ("mean", "std"))
        return Weights(
            model=dict(description["model"]),
            variables=variables,
            statistics=Statistics(mean, std),
            preprocessing=Preprocessing(**description["preprocessing"]),
            class_names=tuple(description["class_names"]),
            source=dict(source),
            task=dict(description.get("task", CLASSIFICATION)),
        )


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns the errors that values of a wrong type in a file cause into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{what} is damaged ({one_line(error, 160)})") from error


def require_network(model: Mapping[str, Any]) -> None:
    """Checks the fields of a network, which may come from anywhere, before it is built.

    Raises:
      UserError: there is no such network, or its code is not ours and the user has not named it.
    """
    require_trusted([model.get("block"), model.get("shortcut")], "the description")
    with reading("the description"):
        for name, value in model.items():
            if name != "classes":
                FIELDS[f"model.{name}"].check(value, f"model.{name}")
        architecture(**{name: model[name] for name in ARCHITECTURE if name in model})
        classes = model["classes"]
        if not isinstance(classes, int) or not 0 <= classes <= LARGEST_SIDE**2:
            raise ValueError("classes must be a whole number")


def task_of(task: Mapping[str, Any], classes: int, class_names: Sequence[str] = ()) -> Task:
    """Returns the task that a description names, for images of any size.

    Raises:
      UserError: there is no such task, or it has no such options.
    """
    with reading("the description"):
        config = TaskConfig(name=task["name"], options=dict(task["options"]))
        if config.name not in TASKS:
            raise ValueError(f"there is no task {config.name!r}")
    names = tuple(class_names) or tuple(map(str, range(classes)))
    return make_task(config, DatasetInfo(names, (64, 64, 3)))


def network_of(model: Mapping[str, Any], task: Mapping[str, Any] = CLASSIFICATION) -> ResNet:
    """Returns the network with the head of a task; without classes, the backbone."""
    if task["name"] == CLASSIFICATION["name"] or not model["classes"]:
        return build(model)
    return build(model, head=task_of(task, model["classes"]).head())


def network_shapes(
    model: Mapping[str, Any], channels: int, task: Mapping[str, Any] = CLASSIFICATION
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array of a network by path, in the unrolled layout."""
    network = network_of({**model, "loop": "scan"}, task)
    images = jax.ShapeDtypeStruct((1, 64, 64, channels), np.float32)
    return unrolled_shapes(jax.eval_shape(network.init, jax.random.key(0), images))


def require_usable(weights: Weights) -> None:
    """Checks weights that may come from anywhere.

    Raises:
      UserError: as `require_network`; the arrays are not those of the network or not finite, or
        images cannot be normalized or classified as described.
    """
    model, images, statistics = weights.model, weights.preprocessing, weights.statistics
    require_network(model)
    arrays = flatten(weights.variables)
    with reading("the description"):
        if not all(isinstance(name, str) for name in weights.class_names):
            raise ValueError("a class name is not text")
        if len(weights.class_names) not in (0, model["classes"]):
            raise ValueError(
                f"it names {len(weights.class_names):,} of {model['classes']:,} classes"
            )
        shape = (images.size, images.size, images.channels)
        for array in statistics[:2]:
            if np.broadcast_shapes(array.shape, shape) != shape:
                raise ValueError(f"statistics of shape {array.shape} for images of {shape}")
        if not (np.isfinite(statistics.mean).all() and (statistics.std > 0).all()):
            raise ValueError("a mean is not finite, or a standard deviation is not above 0")
        expected = network_shapes(model, images.channels, weights.task)
        shapes = {path: np.shape(array) for path, array in arrays.items()}
        if other := [path for path in shapes | expected if shapes.get(path) != expected.get(path)]:
            raise ValueError(f"the arrays are those of another network: {first_few(other, 2)}")
    if fault := describe_fault(arrays):
        raise UserError(f"{fault}; the weights are unusable")


def is_weights_folder(path: Path) -> bool:
    return (path / DESCRIPTION).is_file()


def save(weights: Weights, folder: Path) -> None:
    """Writes a weights folder, or replaces its files.

    Raises:
      OSError: the folder cannot be written.
    """
    from safetensors.numpy import save as to_bytes

    arrays = {
        name: np.asarray(array, order="C")
        for name, array in sorted(flatten(weights.variables).items())
    }
    description = {**describe(weights), "source": dict(weights.source)}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ARRAYS, to_bytes(arrays))
    write_atomically(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    write_checksums(folder)


def load(folder: Path) -> Weights:
    """Reads a weights folder.

    Raises:
      UserError: it is not a weights folder, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not is_weights_folder(folder):
        raise UserError(f"{folder} is not a weights folder: it has no {DESCRIPTION}")
    try:
        verify_checksums(folder)
        description = read_json_object(folder / DESCRIPTION)
        arrays = load_file(folder / ARRAYS)
    except (DamagedError, SafetensorError, FileNotFoundError) as error:
        reason = one_line(error) if isinstance(error, SafetensorError) else error
        raise UserError(f"{folder} is damaged: {reason}; import the weights again") from error
    if "statistics/mean" in arrays:  # as resjax 0.1 wrote them
        mean, std = arrays.pop("statistics/mean"), arrays.pop("statistics/std")
        description["statistics"] = {"mean": mean, "std": std}
    try:
        variables = unflatten(arrays)
        return from_description(description, variables, description.get("source", {}))
    except UserError as error:
        raise UserError(f"{folder / DESCRIPTION}: {error}") from error


def summarize(weights: Weights) -> str:
    """Returns two lines about the network and its preprocessing."""
    model, images = weights.model, weights.preprocessing
    parameters = sum(array.size for array in flatten(weights.variables["params"]).values())
    options = sorted(model.get("block_options", {}).items())
    options += [(name, model[name]) for name in ("stem_pool", "dilated_stages") if model.get(name)]
    resized = "squashed" if images.squash else f"from a shorter side of {images.shorter_side}"
    return (
        f"{model['family']} depth {model['depth']}, {model['block']} blocks"
        f"{''.join(f', {name}={value}' for name, value in options)}, {model['shortcut']} "
        f"shortcuts, {model['norm']} norms; {parameters:,} parameters, {model['classes']:,} "
        f"classes\nimages of {images.size} pixels {resized}, {images.interpolation}, "
        f"{images.channels} channels"
    )


def describe_fault(arrays: Mapping[str, Any]) -> str:
    """Returns which array is not finite, or is a variance and negative; "" if none is."""
    for path, array in arrays.items():
        host = np.asarray(array)
        if not np.isfinite(host).all():
            count = np.count_nonzero(~np.isfinite(host))
            return f"{path} is not finite ({count:,} of {host.size:,} values)"
        if path.endswith("/var") and (host < 0).any():
            return f"{path} is a variance and has negative values"
    return ""


def flatten(variables: Variables) -> dict[str, Any]:
    """Returns a tree's arrays by path, such as `params/stage1/block1/Conv_0/kernel`."""
    return flatten_dict(dict(variables), sep="/")


def unflatten(arrays: Mapping[str, Any]) -> Variables:
    """Returns the variables whose arrays are given by path."""
    return {"params": {}, "batch_stats": {}, **unflatten_dict(dict(arrays), sep="/")}
