"""Imports foreign weights: reads a file, recognizes the network and accounts for every array.

An array that is missing, left over or has a wrong shape is an error, because an importer that
ignores what it does not know returns a network that is almost right. What the arrays do not show
(`assumptions`) is reported. A hint is tried on the file before it is given.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resjax.data.normalization import Statistics
from resjax.disk import digest
from resjax.errors import UserError, first_few
from resjax.models.presets import ARCHITECTURE, architecture
from resjax.transfer import assumptions, conventions, sources
from resjax.transfer.files import Arrays, file_in, read_arrays
from resjax.transfer.naming import (
    NAMINGS,
    Translated,
    is_counter,
    network_prefixes,
    translate,
    wrapper_prefixes,
)
from resjax.transfer.recognition import UnknownNetworkError, dense_task, recognize
from resjax.transfer.surgery import backbone
from resjax.transfer.weights import (
    CLASSIFICATION,
    Preprocessing,
    Weights,
    from_description,
    network_shapes,
    reading,
    require_network,
    unflatten,
)

# Heads of classifiers, and those of self-supervised training, by their names in all libraries.
HEADS = re.compile(
    r"(resnet/)?(fc|head|linear|classifier|predictions"
    r"|projection_head|projector|predictor|prototypes)[./]"
)

TRIED = 4  # networks in one file, at most, for which a hint is tried


@dataclass(frozen=True)
class Options:
    """Options for reading a foreign weights file.

    Attributes:
      prefix: prefix of the network's names, such as `backbone.body.`; other arrays are ignored.
      key: the key of the state dict in a checkpoint of PyTorch, such as `state_dict_ema`.
      hidden: what the arrays do not show.
      without_head: whether to import the backbone alone.
      class_names: a text file with one class name per line.
      image_size: side of the images in pixels; None for that of the weights' evaluation.
    """

    prefix: str = ""
    key: str = ""
    hidden: assumptions.Hidden = field(default_factory=assumptions.Hidden)
    without_head: bool = False
    class_names: Path | None = None
    image_size: int | None = None

    def require_own(self, source: Any) -> None:
        """Raises UserError if an option is set that applies to foreign files only."""
        if self.prefix or self.key or self.hidden.known():
            raise UserError(
                f"{source}: resjax wrote it, so it describes its network; only --backbone, "
                "--class-names and --image-size apply"
            )


class Network(NamedTuple):
    """A network that was recognized in a file."""

    library: str
    arrays: dict[str, np.ndarray]  # by our paths
    model: Mapping[str, Any]  # fields of `resjax.build`
    description: Mapping[str, Any] | None  # what `export_torchvision` wrote
    notes: tuple[str, ...]  # what was assumed or left out
    task: Mapping[str, Any]  # whose head it has


def import_weights(
    source: str, options: Options | None = None, notify: Callable[[str], None] = lambda _: None
) -> Weights:
    """Reads a network's weights from a foreign file.

    Args:
      source: a file or folder; `https://...` or `hub:OWNER/NAME`, which are downloaded once.
      options: what the file does not say.
      notify: called with notes of one line, such as what was assumed of the network.

    Raises:
      UserError: the file cannot be downloaded or read, holds no residual network that is known, or
        an array is missing, left over, or has a wrong shape.
    """
    options = options or Options()
    path = sources.fetch(source, notify)
    file = _without_wrappers(read_arrays(path, options.key))
    try:
        network = _recognize(source, file, options)
        weights = _with_preprocessing(path, file, network)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    for note in (*file.notes, *network.notes):
        notify(f"{source}: {note}")
    return apply_options(weights, options)


def _without_wrappers(file: Arrays) -> Arrays:
    """Removes a prefix that all names share, such as `module.` or `model.`."""
    notes, arrays = list(file.notes), file.arrays
    for prefixes in (wrapper_prefixes, network_prefixes):
        prefix, *others = prefixes(arrays) or [""]
        if prefix and not others and all(n.startswith(prefix) or is_counter(n) for n in arrays):
            arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
            notes.append(f"the prefix {prefix[:80]!r} was removed from every name")
    return replace(file, arrays=arrays, notes=tuple(notes))


def _recognize(source: str, file: Arrays, options: Options) -> Network:
    """Returns the network in a file.

    Raises:
      UserError: there is none; if --backbone would help, the message says so.
    """
    try:
        return _recognize_with(source, file, options)
    except UserError as error:
        if options.without_head or not _works(source, file, replace(options, without_head=True)):
            raise
        raise UserError(f"{error}; --backbone imports the rest") from error


def _works(source: str, file: Arrays, options: Options) -> bool:
    try:
        return bool(_recognize_with(source, file, options))
    except UserError:
        return False


def _recognize_with(source: str, file: Arrays, options: Options) -> Network:
    arrays = {
        name.removeprefix(options.prefix): array
        for name, array in file.arrays.items()
        if name.startswith(options.prefix)
    }
    if not arrays:
        raise UserError(f"no name in it begins with {options.prefix!r}")
    translated, heads = translate(arrays), list[str]()
    if options.without_head and not (translated and translated.naming.task):
        heads = [name for name in arrays if HEADS.match(name)]
        translated = translate({n: array for n, array in arrays.items() if n not in {*heads}})
    if translated is None:
        raise UserError(_explain_unknown(source, file, options))
    description, notes = _description(file), []
    try:
        task = dense_task(translated)
    except (UnknownNetworkError, ValueError) as error:
        raise UserError(f"has no complete head of a RetinaNet: {error}") from error
    if heads:
        notes.append(f"left out: {first_few(heads, 3)}")
    if description and (given := options.hidden.known()):
        raise UserError(f"it describes its network, and leaves {first_few(given)} no choice")
    if description:
        classes = {"classes": 0} if heads else {}
        found, fields = translated.arrays, {**description["model"], **classes}
    else:
        found, fields = _shown(translated, options)
        facts = _facts(source, file, options)
        default = assumptions.defaults(translated.naming.library, fields)
        if task["name"] == "segmentation":
            facts = {"dilated_stages": 2, **facts}
        fields = assumptions.apply(fields, {**default, **facts})
        if translated.naming.library != "Keras" and fields["norm"] == "batch":
            fields["bn_unbiased"] = True  # as PyTorch's running variances are
        if assumed := {name: value for name, value in default.items() if name not in facts}:
            notes.append(assumptions.describe(assumed))
    try:
        known = {name: fields[name] for name in ARCHITECTURE if name in fields}
        model = {**architecture(**known), **fields}
    except ValueError as error:
        raise UserError(str(error)) from error
    _require_complete(translated._replace(arrays=found), model, task, options.without_head)
    return Network(translated.naming.library, found, model, description, tuple(notes), task)


def _description(file: Arrays) -> dict[str, Any] | None:
    text = file.metadata.get("header", {}).get("resjax")
    if not text:
        return None
    with reading("the description of the network in its metadata"):
        description: dict[str, Any] = json.loads(text)
        model = dict(description["model"])
        require_network(model)
        return {**description, "model": model}


def _shown(translated: Translated, options: Options) -> tuple[dict[str, np.ndarray], Any]:
    """Returns the arrays, and the fields of the network that their names and shapes show."""
    arrays, shortcut = translated.arrays, options.hidden.shortcut
    try:
        fields = recognize(arrays, averages=translated.averages, shortcut=shortcut)
    except UnknownNetworkError as error:
        raise UserError(f"is not a known ResNet: {error}") from error
    except (ValueError, LookupError, ZeroDivisionError) as error:  # of shapes that none has
        raise UserError("is not a known ResNet: its arrays have other shapes") from error
    return (assumptions.carried_first(arrays) if shortcut == "pad_center" else arrays), fields


def _facts(source: str, file: Arrays, options: Options) -> dict[str, Any]:
    """Returns the facts that names, other arrays, the config and the user give."""
    config = file.metadata.get("config", {})
    names = source, str(config.get("architecture", "")), file.metadata.get("architecture", "")
    with reading("its config.json"):
        return {
            **assumptions.from_names(*names),
            **assumptions.from_other_arrays(file.arrays, options.prefix),
            **assumptions.from_config(config),
            **options.hidden.known(),
        }


def _with_preprocessing(path: Path, file: Arrays, network: Network) -> Weights:
    variables, model = unflatten(network.arrays), network.model
    source = {
        "file": path.name,
        "sha256": digest(path if path.is_file() else file_in(path)),
        "format": f"{file.format}, {network.library}",
    }
    if network.description:
        return from_description({**network.description, "model": model}, variables, source)
    config = file.metadata.get("config", {})
    with reading("its config.json or preprocessor_config.json"):
        statistics, preprocessing = _preprocessing(path, file, network)
        names = _class_names(config, model["classes"])
    if network.task != CLASSIFICATION:  # the whole image counts, not its center
        preprocessing = replace(preprocessing, squash=True)
    return Weights(model, variables, statistics, preprocessing, names, source, network.task)


def _preprocessing(path: Path, file: Arrays, network: Network) -> tuple[Statistics, Preprocessing]:
    config, channels = file.metadata.get("config", {}), _channels(network.arrays)
    if timm := config.get("pretrained_cfg"):
        return conventions.of_timm(timm, channels)
    if processor := file.metadata.get("preprocessor"):
        return conventions.of_hugging_face(processor, channels)
    small = network.model["stem"] == "cifar"
    return conventions.of_library(network.library, path.name, channels, small=small)


def _channels(arrays: Mapping[str, np.ndarray]) -> int:
    return int(arrays["params/stem/Conv_0/kernel"].shape[2])


def _require_complete(
    translated: Translated, model: Mapping[str, Any], task: Mapping[str, Any], without_head: bool
) -> None:
    """Raises UserError if an array is missing, left over, or has a wrong shape."""
    arrays = translated.arrays
    shapes = network_shapes(model, _channels(arrays), task)
    missing = [path for path in shapes if path not in arrays]
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
    if not (model["classes"] or without_head):
        raise UserError("it has no head")


def _explain_unknown(source: str, file: Arrays, options: Options) -> str:
    """Returns why the names are unknown, and the options that import a network in the file."""
    inside = {n.removeprefix(options.prefix): a for n, a in file.arrays.items()}
    found_prefixes = (prefix for prefix in network_prefixes(inside) if prefix)
    prefixes = [options.prefix + prefix for prefix in islice(found_prefixes, TRIED)]
    commands = [_command(source, file, options, prefix) for prefix in prefixes]
    if found := list(filter(None, commands)):
        others = f" (or with {first_few(found[1:], 3)})" if found[1:] else ""
        return f"it holds more than a ResNet; `resjax import` reads it with {found[0]}{others}"
    if prefixes:
        try:
            _recognize_with(source, file, replace(options, prefix=prefixes[0]))
        except UserError as error:
            return f"what begins with {prefixes[0]!r} in it: {error}"
    libraries = ", ".join(dict.fromkeys(naming.library for naming in NAMINGS))
    return (
        f"is not a known ResNet; its arrays are named {first_few(file.arrays, 3)}; the names of "
        f"{libraries} are known"
    )


def _command(source: str, file: Arrays, options: Options, prefix: str) -> str:
    """Returns the options that import the network below a prefix; empty if none do."""
    for headless, end in ((options.without_head, ""), (True, " --backbone")):
        if _works(source, file, replace(options, prefix=prefix, without_head=headless)):
            return f"--prefix={prefix}{end}"
    return ""


def _class_names(config: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    """Returns the names in the config, or those of ImageNet if there are 1,000 classes."""
    if isinstance(names := config.get("id2label"), Mapping) and len(names) == classes:
        return tuple(str(names[str(index)]) for index in range(classes))
    if len(names := config.get("label_names", ())) == classes:
        return tuple(map(str, names))
    return imagenet_classes() if classes == 1000 else ()


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Returns the names of the classes of ILSVRC 2012 in its order, as torchvision writes them."""
    text = resources.files("resjax.transfer").joinpath("imagenet_classes.txt").read_text("utf-8")
    return tuple(text.splitlines())


def apply_options(weights: Weights, options: Options) -> Weights:
    """Returns the weights with the class names and image size of `options`, and without a head.

    Raises:
      UserError: the names cannot be read, or their number is not that of the classes.
    """
    if file := options.class_names:
        try:
            names = tuple(file.read_text("utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read as text") from error
        if len(names) != (classes := weights.model["classes"]):
            raise UserError(f"{file} names {len(names):,} classes of {classes:,}")
        weights = replace(weights, class_names=names)
    if size := options.image_size:
        images = weights.preprocessing
        if weights.statistics.mean.shape[:-1] not in ((), (size, size)):
            raise UserError(
                f"--image-size={size}: the weights subtract a mean image of {images.size} pixels"
            )
        shorter_side = round(images.shorter_side * size / images.size)
        images = replace(images, size=size, shorter_side=shorter_side)
        weights = replace(weights, preprocessing=images)
    return backbone(weights) if options.without_head else weights
