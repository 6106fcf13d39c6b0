"""A network's weights with everything needed to use them, in memory and as a weights folder.

`resjax import` writes weights folders. `weights.safetensors` holds each array under its path in the
unrolled layout, `weights.json` describes the network and its preprocessing, and SHA256SUMS holds
the digests of both.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resjax.config import WEIGHTS_DESCRIPTION as DESCRIPTION
from resjax.config import Config
from resjax.data.crops import usual_shorter_side
from resjax.data.decoding import Interpolation
from resjax.data.normalization import Statistics
from resjax.disk import DamagedError, verify_checksums, write_atomically, write_checksums
from resjax.errors import UserError
from resjax.models.layout import Variables
from resjax.models.resnet import ResNet, build

ARRAYS = "weights.safetensors"
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
      source: where the weights come from: `file`, its `sha256`, `format`, ...
    """

    model: Mapping[str, Any]
    variables: Variables
    statistics: Statistics
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)

    def network(self, **overrides: Any) -> ResNet:
        """Returns the network, with overrides such as `loop="scan"` or `dtype="bfloat16"`."""
        return build({**self.model, **overrides})


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
      every task but classification, the weights are a backbone.
    """
    height, width, channels = image_shape
    preprocessing = None
    if height == width:
        resized = streamed and config.data.image_size is not None
        shorter_side = usual_shorter_side(height) if resized else height
        preprocessing = Preprocessing(height, shorter_side, channels)
    model = {k: v for k, v in asdict(config.model).items() if k not in TRAINING_ONLY}
    if config.task.name != "classification":
        class_names = ()
    return _description(
        {**model, "classes": len(class_names)}, statistics, preprocessing, class_names
    )


def describe(weights: Weights) -> dict[str, Any]:
    """Returns a JSON object of everything about weights except their arrays and their source."""
    return _description(
        weights.model, weights.statistics, weights.preprocessing, weights.class_names
    )


def _description(
    model: Mapping[str, Any],
    statistics: Statistics,
    preprocessing: Preprocessing | None,
    class_names: Sequence[str],
) -> dict[str, Any]:
    mean, std = (np.asarray(array, np.float32).tolist() for array in statistics[:2])
    return {
        "model": dict(model),
        "statistics": {"mean": mean, "std": std},
        "preprocessing": preprocessing and asdict(preprocessing),
        "class_names": list(class_names),
    }


def from_description(
    description: Mapping[str, Any], variables: Variables, source: Mapping[str, Any]
) -> Weights:
    """Returns weights from what `describe` or `describe_run` returned, and their arrays.

    Raises:
      UserError: the images are not square, so no preprocessing leads to them.
    """
    if description["preprocessing"] is None:
        raise UserError(
            "was trained on images that are not square, which weights cannot describe; train on "
            "square ones, such as with data.image_size"
        )
    arrays = description.get("statistics", description)  # older exports have them at the top
    mean, std = (np.asarray(arrays[name], np.float32) for name in ("mean", "std"))
    return Weights(
        model=description["model"],
        variables=variables,
        statistics=Statistics(mean, std),
        preprocessing=Preprocessing(**description["preprocessing"]),
        class_names=tuple(description["class_names"]),
        source=source,
    )


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
    from safetensors.numpy import load_file

    if not is_weights_folder(folder):
        raise UserError(f"{folder} is not a weights folder: it has no {DESCRIPTION}")
    try:
        verify_checksums(folder)
        description = json.loads((folder / DESCRIPTION).read_bytes())
        arrays = load_file(folder / ARRAYS)
    except DamagedError as error:
        raise UserError(f"{folder} is damaged: {error}; import the weights again") from error
    if "statistics/mean" in arrays:  # as resjax 0.1 wrote them
        mean, std = arrays.pop("statistics/mean"), arrays.pop("statistics/std")
        description["statistics"] = {"mean": mean, "std": std}
    return from_description(description, unflatten(arrays), description["source"])


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
    """Returns which array of a network holds a number that no training can have left; "" if none.

    Args:
      arrays: by path: parameters must be finite, and variances not negative either.
    """
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
