"""Imports foreign weights: reads a file, recognizes the network and accounts for every array.

An array that is missing, left over or has a wrong shape is an error, because an importer that
ignores what it does not know returns a network that is almost right.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resjax.disk import digest
from resjax.errors import UserError, first_few
from resjax.models.presets import ARCHITECTURE, architecture
from resjax.models.resnet import build
from resjax.transfer import conventions, sources
from resjax.transfer.files import Arrays, read_arrays
from resjax.transfer.naming import NAMINGS, Translated, translate
from resjax.transfer.recognition import UnknownNetworkError, recognize
from resjax.transfer.surgery import backbone
from resjax.transfer.weights import Weights, flatten, from_description, unflatten

KERAS_EPSILON = 1.001e-5  # of keras.applications.resnet
# Parts of the names of timm's networks that differ from others in layers without weights alone.
WITHOUT_A_TRACE = ("blur", "resnetaa", "nextaa")


@dataclass(frozen=True)
class Options:
    """What the user knows of a file and the file does not tell.

    Attributes:
      prefix: prefix of the network's names, such as `backbone.body.`; other arrays are ignored.
      v1: whether bottlenecks stride in their first 1x1 convolution; None for the library's default.
      without_head: whether to import the backbone alone.
      class_names: a text file with one class name per line.
      image_size: side of the images in pixels; None for that of the weights' evaluation.
    """

    prefix: str = ""
    v1: bool | None = None
    without_head: bool = False
    class_names: Path | None = None
    image_size: int | None = None


def import_weights(
    source: str, options: Options | None = None, notify: Callable[[str], None] = lambda _: None
) -> Weights:
    """Reads a network's weights from a foreign file.

    Args:
      source: a file or folder; `https://...` or `hub:OWNER/NAME`, which are downloaded once.
      options: what the file does not tell.
      notify: called with notes of one line, such as that numbers were converted to float32.

    Raises:
      UserError: the file cannot be downloaded or read, holds no residual network that is known, or
        an array is missing, left over, or has a wrong shape.
    """
    options = options or Options()
    path = sources.fetch(source, notify)
    file = read_arrays(path)
    for note in file.notes:
        notify(f"{source}: {note}")
    try:
        weights = _import(path, file, options)
    except UnknownNetworkError as error:
        raise UserError(f"{source}: is not a known ResNet: {error}") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return apply_options(weights, options)


def _import(path: Path, file: Arrays, options: Options) -> Weights:
    arrays = {
        name.removeprefix(options.prefix): array
        for name, array in file.arrays.items()
        if name.startswith(options.prefix)
    }
    translated = translate(arrays)
    if translated is None:
        raise UserError(_explain_unknown(arrays, options.prefix))
    library, config = translated.naming.library, file.metadata.get("config", {})
    # What `export_torchvision` wrote.
    description = json.loads(file.metadata.get("header", {}).get("resjax", "null"))
    if description:
        fields = dict(description["model"])
    else:
        _require_supported(config)
        v1 = library == "Keras" or bool(config.get("downsample_in_bottleneck"))
        fields = recognize(
            translated.arrays,
            v1=v1 if options.v1 is None else options.v1,
            averages=translated.averages,
        )
        if library == "Keras":
            fields["bn_epsilon"] = KERAS_EPSILON
    known = {name: fields[name] for name in ARCHITECTURE if name in fields}
    model = {**architecture(**known), **fields}
    channels = translated.arrays["params/stem/Conv_0/kernel"].shape[2]
    _require_complete(translated, model, channels, options.without_head)
    variables = unflatten(translated.arrays)
    weights_file = path if path.is_file() else min(path.glob("*.safetensors"))
    source = {
        "file": path.name,
        "sha256": digest(weights_file),
        "format": f"{file.format}, {library}",
    }
    if description:
        return from_description({**description, "model": model}, variables, source)
    if timm := config.get("pretrained_cfg"):
        statistics, preprocessing = conventions.of_timm(timm, channels)
    elif processor := file.metadata.get("preprocessor"):
        statistics, preprocessing = conventions.of_hugging_face(processor, channels)
    else:
        statistics, preprocessing = conventions.of_library(library, path.name, channels)
    names = _class_names(config, model["classes"])
    return Weights(model, variables, statistics, preprocessing, names, source)


def _require_supported(config: Mapping[str, Any]) -> None:
    """Raises UserError if the network differs from ours in layers that have no weights."""
    name = str(config.get("architecture", ""))
    if any(trait in name for trait in WITHOUT_A_TRACE):
        raise UserError(f"{name} has layers without weights that no network here has")
    if (act := config.get("hidden_act", "relu")) != "relu":
        raise UserError(f"its activation is {act}; networks here have relu")
    if config.get("downsample_in_first_stage"):
        raise UserError("its first stage strides; in networks here it does not")


def _require_complete(
    translated: Translated, model: Mapping[str, Any], channels: int, without_head: bool
) -> None:
    """Raises UserError if an array is missing, left over, or has a wrong shape."""
    network = build({**model, "loop": "unroll"}, classes=model["classes"] or 1)
    images = jax.ShapeDtypeStruct((1, 64, 64, channels), np.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    shapes = {path: array.shape for path, array in flatten(variables).items()}
    arrays = translated.arrays
    missing = [path for path in shapes if path not in arrays]
    if missing and all(path.startswith("params/head/") for path in missing):
        if not without_head:
            raise UserError("it has no head; --backbone imports the rest")
        missing = []
    wrong = [
        f"{path} is {arrays[path].shape} and should be {shape}"
        for path, shape in shapes.items()
        if path in arrays and arrays[path].shape != shape
    ]
    left = [*translated.left_over, *(path for path in arrays if path not in shapes)]
    faults = [
        f"{what}: {first_few(names)}"
        for what, names in (("missing", missing), ("left over", left), ("of a wrong shape", wrong))
        if names
    ]
    if faults:
        library = translated.naming.library
        raise UserError(f"is not exactly a ResNet of {library}; {'; '.join(faults)}")


def _explain_unknown(arrays: Mapping[str, Any], prefix: str) -> str:
    if not arrays:
        return f"no name in it begins with {prefix!r}"
    for naming in NAMINGS:
        first, *others = naming.marks
        for name in arrays:
            found = name.removesuffix(first)
            if found != name and all(found + other in arrays for other in others):
                return (
                    f"it holds more than a ResNet, whose names begin with {found!r}; import that "
                    f"with --prefix={found} --backbone"
                )
    libraries = ", ".join(dict.fromkeys(naming.library for naming in NAMINGS))
    return (
        f"is not a known ResNet; its arrays are named {first_few(arrays, 3)}; the names of "
        f"{libraries} are known"
    )


def _class_names(config: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    """Returns the names in the config, or those of ImageNet if there are 1,000 classes."""
    if isinstance(names := config.get("id2label"), Mapping) and len(names) == classes:
        return tuple(str(names[str(index)]) for index in range(classes))
    if len(names := config.get("label_names", ())) == classes:
        return tuple(map(str, names))
    if classes == 1000:
        # Of ILSVRC 2012, in its order, as torchvision writes them.
        text = resources.files("resjax.transfer").joinpath("imagenet_classes.txt").read_text()
        return tuple(text.splitlines())
    return ()


def apply_options(weights: Weights, options: Options) -> Weights:
    """Returns the weights with the class names and image size of `options`, and without a head.

    Raises:
      UserError: the names cannot be read, or their number is not that of the classes.
    """
    if file := options.class_names:
        try:
            names = tuple(file.read_text().splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read as text") from error
        if len(names) != (classes := weights.model["classes"]):
            raise UserError(f"{file} names {len(names):,} classes of {classes:,}")
        weights = replace(weights, class_names=names)
    if size := options.image_size:
        images = weights.preprocessing
        shorter_side = round(images.shorter_side * size / images.size)
        images = replace(images, size=size, shorter_side=shorter_side)
        weights = replace(weights, preprocessing=images)
    return backbone(weights) if options.without_head else weights
