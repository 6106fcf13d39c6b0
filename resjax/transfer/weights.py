"""A network's weights and what it takes to use them, in memory and as a folder.

A weights folder is what `resjax import` makes: `weights.safetensors`, which holds every array under
its path in the unrolled layout, `weights.json`, which says what network they are of and how images
come to it, and a seal. It needs no resjax to be read.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from resjax.config import WEIGHTS_DESCRIPTION as DESCRIPTION
from resjax.data.decoding import Interpolation
from resjax.data.resident import Statistics
from resjax.disk import DamagedError, verify_checksums, write_atomically, write_checksums
from resjax.errors import UserError
from resjax.models.layout import Variables
from resjax.models.resnet import ResNet, build

ARRAYS = "weights.safetensors"


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
      statistics: for `resjax.data.resident.normalize`, of images in the order RGB.
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


def is_weights_folder(path: Path) -> bool:
    return (path / DESCRIPTION).is_file()


def save(weights: Weights, folder: Path) -> None:
    """Writes a weights folder; what a file of it held before is replaced.

    Raises:
      OSError: the folder cannot be written.
    """
    from safetensors.numpy import save as to_bytes

    arrays = {
        **flat(weights.variables),
        "statistics/mean": weights.statistics.mean,
        "statistics/std": weights.statistics.std,
    }
    description = {
        "model": dict(weights.model),
        "preprocessing": asdict(weights.preprocessing),
        "class_names": list(weights.class_names),
        "source": dict(weights.source),
    }
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
    statistics = Statistics(arrays.pop("statistics/mean"), arrays.pop("statistics/std"))
    return Weights(
        model=described["model"],
        variables=nested(arrays),
        statistics=statistics,
        preprocessing=Preprocessing(**described["preprocessing"]),
        class_names=tuple(described["class_names"]),
        source=described["source"],
    )


def describe(weights: Weights) -> str:
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
