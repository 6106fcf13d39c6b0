"""A network's weights and what it takes to use them, in memory and as a folder.

A weights folder is what `resjax import` makes: `weights.safetensors`, which holds every array under
its path in the unrolled layout, `weights.json`, which says what network they are of and how images
come to it, and a seal. It needs no resjax to be read.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

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
    """What an image goes through before the network, as those evaluate who trained it.

    The shorter side is brought to `shorter_side`, and the square of `size` in the middle is cut.
    """

    size: int  # pixels, of the square that the network sees
    shorter_side: int
    channels: int = 3
    interpolation: Interpolation = "bilinear"
    squash: bool = False  # bring both sides to `shorter_side`, whatever that does to the image


@dataclass(frozen=True)
class Weights:
    """Weights of a network.

    Attributes:
      model: what `resjax.build` takes to make the network: architecture, `classes`, ...
      variables: `params` and `batch_stats` in the unrolled layout, float32 NumPy arrays. Without
        `params/head` they are a backbone.
      statistics: for `resjax.data.normalization.normalize`, of images in the order RGB.
      preprocessing: what comes before that.
      class_names: one a class; empty where nobody knows them.
      source: where they come from: `file`, its `sha256`, `format`, ...
    """

    model: Mapping[str, Any]
    variables: Variables
    statistics: Statistics
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)

    def network(self, **overrides: Any) -> ResNet:
        """The network of these weights, such as with `loop="scan"` or `dtype="bfloat16"`."""
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
      A JSON object. Its `preprocessing` is None if images are not square.
    """
    height, width, channels = image_shape
    resized = streamed and config.data.image_size is not None
    shorter_side = usual_shorter_side(height) if resized else height
    fields = asdict(config.model).items()
    return {
        "model": {
            **{name: value for name, value in fields if name not in TRAINING_ONLY},
            "classes": len(class_names),
        },
        "statistics": _statistics_as_json(statistics),
        "preprocessing": asdict(Preprocessing(height, shorter_side, channels))
        if height == width
        else None,
        "class_names": list(class_names),
    }


def describe(weights: Weights) -> dict[str, Any]:
    """Returns everything about weights but their arrays and source, as a JSON object."""
    return {
        "model": dict(weights.model),
        "statistics": _statistics_as_json(weights.statistics),
        "preprocessing": asdict(weights.preprocessing),
        "class_names": list(weights.class_names),
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


def _statistics_as_json(statistics: Statistics) -> dict[str, Any]:
    return {
        "mean": np.asarray(statistics.mean, np.float32).tolist(),
        "std": np.asarray(statistics.std, np.float32).tolist(),
    }


def is_weights_folder(path: Path) -> bool:
    return (path / DESCRIPTION).is_file()


def save(weights: Weights, folder: Path) -> None:
    """Writes a weights folder; what a file of it held before is replaced.

    Raises:
      OSError: the folder cannot be written.
    """
    from safetensors.numpy import save as to_bytes

    arrays = flat(weights.variables)
    description = {**describe(weights), "source": dict(weights.source)}
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.asarray(array, order="C") for name, array in sorted(arrays.items())}
    write_atomically(folder / ARRAYS, to_bytes(contiguous))
    write_atomically(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    write_checksums(folder)


def load(folder: Path) -> Weights:
    """Reads a weights folder.

    Raises:
      UserError: there is none, or it is not what was written.
    """
    from safetensors.numpy import load_file

    if not is_weights_folder(folder):
        raise UserError(f"{folder} is no weights folder: it has no {DESCRIPTION}")
    try:
        verify_checksums(folder)
        described = json.loads((folder / DESCRIPTION).read_bytes())
        arrays = load_file(folder / ARRAYS)
    except DamagedError as error:
        raise UserError(f"{folder} is damaged: {error}; import the weights again") from error
    if "statistics/mean" in arrays:  # written before descriptions held them
        mean, std = arrays.pop("statistics/mean"), arrays.pop("statistics/std")
        described["statistics"] = {"mean": mean, "std": std}
    return from_description(described, nested(arrays), described["source"])


def summarize(weights: Weights) -> str:
    """In two lines: the network, and how images come to it."""
    model, made = weights.model, weights.preprocessing
    parameters = sum(array.size for array in flat(weights.variables["params"]).values())
    options = {**model.get("block_options", {})}
    told = "".join(f", {name}={value}" for name, value in sorted(options.items()))
    how = "squashed" if made.squash else f"of a shorter side of {made.shorter_side}"
    return (
        f"{model['family']} depth {model['depth']}, {model['block']} blocks{told}, "
        f"{model['shortcut']} shortcuts, {model['norm']} norms; {parameters:,} parameters, "
        f"{model['classes']:,} classes\n"
        f"images of {made.size} pixels {how}, {made.interpolation}, {made.channels} channels"
    )


def flat(variables: Variables, leaf: Callable[[Any], Any] = np.asarray) -> dict[str, Any]:
    """Arrays by path, such as `params/stage1/block1/Conv_0/kernel`.

    Args:
      variables: or any tree of dicts.
      leaf: what to give of an array.
    """
    paths: dict[str, Any] = {}
    for name, value in variables.items():
        if isinstance(value, Mapping):
            below = flat(dict(value), leaf)
            paths |= {f"{name}/{rest}": inner for rest, inner in below.items()}
        else:
            paths[name] = leaf(value)
    return paths


def nested(arrays: Mapping[str, Any]) -> Variables:
    """The inverse of `flat`."""
    tree: Variables = {"params": {}, "batch_stats": {}}
    for path, array in arrays.items():
        *modules, name = path.split("/")
        inner = tree
        for module in modules:
            inner = inner.setdefault(module, {})
        inner[name] = array
    return tree
