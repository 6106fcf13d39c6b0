"""Foreign weights in: read, recognised, and every array accounted for.

What is missing, left over or of another shape than the network's is an error: an importer that
passes over what it does not know gives a network that is almost right.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resjax.data.normalization import Statistics
from resjax.disk import digest
from resjax.errors import UserError
from resjax.models.presets import architecture
from resjax.models.resnet import build
from resjax.transfer import conventions, sources
from resjax.transfer.files import Arrays, read_arrays
from resjax.transfer.naming import NAMINGS, Translated, translate
from resjax.transfer.recognition import UnknownNetworkError, recognize
from resjax.transfer.surgery import backbone
from resjax.transfer.weights import Preprocessing, Weights, flat, from_description, nested

SHOWN = 5  # names that a message lists
KERAS_EPSILON = 1.001e-5  # of keras.applications.resnet
# Networks of timm that share names and shapes with others, and differ in layers without weights.
WITHOUT_A_TRACE = ("blur", "resnetaa", "nextaa")


@dataclass(frozen=True)
class Options:
    """What a user knows of a file that it does not tell.

    Attributes:
      prefix: of the names of the network in it, such as `backbone.body.`; the others are left.
      v1: bottlenecks stride in their first 1x1; None is as the library has it.
      without_head: take the backbone; a head that is there is dropped.
      class_names: a text file with one a line.
      image_size: pixels; None is what the weights were evaluated on.
    """

    prefix: str = ""
    v1: bool | None = None
    without_head: bool = False
    class_names: Path | None = None
    image_size: int | None = None


def import_weights(
    source: str, options: Options | None = None, tell: Callable[[str], None] = lambda _: None
) -> Weights:
    """Reads a network's weights from a foreign file.

    Args:
      source: a file or folder; `https:` or `hub:OWNER/NAME`, which are fetched once.
      options: what the file does not tell.
      tell: is told what is worth knowing, such as that numbers were widened.

    Raises:
      UserError: it cannot be had or read, is of no residual network that we have, or an array is
        missing, left over, or of a wrong shape; one line.
    """
    options = options or Options()
    path = sources.local(source, tell)
    file = read_arrays(path)
    for note in file.notes:
        tell(f"{source}: {note}")
    try:
        made = _made(path, file, options)
    except UnknownNetworkError as error:
        raise UserError(f"{source}: is no ResNet that is known: {error}") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return apply_options(made, options)


def _made(path: Path, file: Arrays, options: Options) -> Weights:
    arrays = {
        name.removeprefix(options.prefix): array
        for name, array in file.arrays.items()
        if name.startswith(options.prefix)
    }
    translated = translate(arrays)
    if translated is None:
        raise UserError(_why_unknown(arrays, options.prefix))
    library = translated.naming.library
    # What `exporting` wrote.
    described = json.loads(file.metadata.get("header", {}).get("resjax", "null"))
    if described:
        fields, epsilon = dict(described["model"]), {}
    else:
        _require_plain(file.metadata)
        fields = recognize(
            translated.arrays,
            v1=_is_v1(library, file.metadata) if options.v1 is None else options.v1,
            averages=translated.averages,
        )
        epsilon = {"bn_epsilon": KERAS_EPSILON} if library == "Keras" else {}
    model = {**architecture(**_without(fields, "classes", "bn_epsilon")), **fields, **epsilon}
    channels = translated.arrays["params/stem/Conv_0/kernel"].shape[2]
    _require_all(translated, model, channels, options.without_head)
    variables = nested(translated.arrays)
    source = {"file": path.name, "sha256": _digest(path), "format": f"{file.format}, {library}"}
    if described:
        return from_description({**described, "model": model}, variables, source)
    statistics, prepared = _preprocessing(library, path, file.metadata, channels)
    return Weights(
        model=model,
        variables=variables,
        statistics=statistics,
        preprocessing=prepared,
        class_names=_class_names(file.metadata, model["classes"]),
        source=source,
    )


def _require_plain(metadata: Mapping[str, Any]) -> None:
    """Refuses what differs from the networks here in layers that have no weights."""
    config = metadata.get("config", {})
    name = str(config.get("architecture", ""))
    if any(trait in name for trait in WITHOUT_A_TRACE):
        raise UserError(f"{name} has layers without weights that no network here has")
    if (act := config.get("hidden_act", "relu")) != "relu":
        raise UserError(f"its activation is {act}; networks here have relu")
    if config.get("downsample_in_first_stage"):
        raise UserError("its first stage strides; in networks here it does not")


def _is_v1(library: str, metadata: Mapping[str, Any]) -> bool:
    return library == "Keras" or bool(metadata.get("config", {}).get("downsample_in_bottleneck"))


def _require_all(
    translated: Translated, model: Mapping[str, Any], channels: int, without_head: bool
) -> None:
    """Refuses weights of which one is missing, left over, or of another shape than it should be."""
    network = build({**model, "loop": "unroll"}, classes=model["classes"] or 1)
    images = jax.ShapeDtypeStruct((1, 64, 64, channels), np.float32)
    shapes = flat(jax.eval_shape(network.init, jax.random.key(0), images), leaf=lambda x: x.shape)
    there = translated.arrays
    missing = [path for path in shapes if path not in there]
    if missing and all(path.startswith("params/head/") for path in missing):
        if not without_head:
            raise UserError("it has no head; --backbone takes what there is")
        missing = []
    wrong = [
        f"{path} is {there[path].shape} and should be {shapes[path]}"
        for path in shapes
        if path in there and there[path].shape != shapes[path]
    ]
    left = [*translated.left_over, *(path for path in there if path not in shapes)]
    faults = [
        f"{what}: {_some(names)}"
        for what, names in (("missing", missing), ("left over", left), ("of a wrong shape", wrong))
        if names
    ]
    if faults:
        raise UserError(f"is not just a ResNet of {translated.naming.library}; {'; '.join(faults)}")


def _why_unknown(arrays: Mapping[str, Any], prefix: str) -> str:
    if not arrays:
        return f"no name in it begins with {prefix!r}"
    for naming in NAMINGS:
        first, *others = naming.marks
        for name in arrays:
            found = name.removesuffix(first)
            if found != name and all(found + other in arrays for other in others):
                return (
                    f"it holds more than a ResNet, whose names begin with {found!r}; "
                    f"--prefix={found} --backbone takes that"
                )
    libraries = ", ".join(dict.fromkeys(naming.library for naming in NAMINGS))
    return (
        f"is no ResNet that is known; its arrays are named {_some(list(arrays), 3)}; known are "
        f"those of {libraries}"
    )


def _preprocessing(
    library: str, path: Path, metadata: Mapping[str, Any], channels: int
) -> tuple[Statistics, Preprocessing]:
    if given := metadata.get("config", {}).get("pretrained_cfg"):
        return conventions.of_timm(given, channels)
    if given := metadata.get("preprocessor"):
        return conventions.of_hugging_face(given, channels)
    return conventions.of_library(library, path.name, channels)


def _class_names(metadata: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    """What is written beside the weights, or the 1,000 of ImageNet for as many."""
    config = metadata.get("config", {})
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
    """The weights with what the user says of them: names of classes, size of images, no head.

    Raises:
      UserError: the names cannot be read, or are not as many as the classes.
    """
    if options.class_names:
        names = _read_names(options.class_names, weights.model["classes"])
        weights = replace(weights, class_names=names)
    if options.image_size:
        before = weights.preprocessing
        shorter = round(before.shorter_side * options.image_size / before.size)
        sized = replace(before, size=options.image_size, shorter_side=shorter)
        weights = replace(weights, preprocessing=sized)
    return backbone(weights) if options.without_head else weights


def _read_names(file: Path, classes: int) -> tuple[str, ...]:
    try:
        names = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text") from error
    if len(names) != classes:
        raise UserError(f"{file} names {len(names):,} classes of {classes:,}")
    return tuple(names)


def _digest(path: Path) -> str:
    """Of a file, or of the first weights in a folder."""
    return digest(path if path.is_file() else min(path.glob("*.safetensors")))


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _some(names: list[str], shown: int = SHOWN) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
