"""Translates the names that libraries give the arrays of a residual network to ours.

A table of patterns of modules describes the names of a library. Every array of a file is
translated, known to have no counterpart, or left over.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

Arrays = Mapping[str, np.ndarray]

# Counters of batch norms, and of PyTorch's AveragedModel.
COUNTERS = r"(.*\.)?num_batches_tracked|n_averaged"


class Naming(NamedTuple):
    """The names of one library.

    Attributes:
      library: as users know it.
      marks: names that only its residual networks have all of.
      modules: lines of one of its modules and our path. `#` is a number, `{1}` the first of them,
        `{1+}` that plus one, `{1-}` minus one. `Norm` is a norm of either kind, `Either` a
        convolution or a norm.
      leaves: its names of a module's arrays, and ours.
      separator: between modules.
      unused: a pattern of arrays without influence on the output.
      convert: converts the arrays, once they have our names.
      task: name and options of the task whose head its networks have; None for classification.
    """

    library: str
    marks: tuple[str, ...]
    modules: str
    leaves: Mapping[str, str]
    separator: str = "."
    unused: str = COUNTERS
    convert: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict
    task: Mapping[str, Any] | None = None


class Translated(NamedTuple):
    """The arrays of a file under our paths, and the names that no pattern matches."""

    naming: Naming
    arrays: dict[str, np.ndarray]
    left_over: list[str]
    averages: bool  # shortcuts average before they project, so their convolution is second


# The prefixes that DataParallel and torch.compile add to every name.
_WRAPPERS = re.compile(r"(?:module\.|_orig_mod\.)*")


def without_wrappers(name: str) -> str:
    """Returns a name without the prefixes that DataParallel and torch.compile add."""
    return name[_WRAPPERS.match(name).end() :]  # type: ignore[union-attr]


def is_counter(name: str) -> bool:
    return re.fullmatch(COUNTERS, name) is not None


def wrapper_prefixes(arrays: Arrays) -> list[str]:
    """Returns the distinct prefixes that wrappers added to the names."""
    names = [name for name in arrays if not is_counter(name)]
    return list({name.removesuffix(without_wrappers(name)) for name in names})


def network_prefixes(arrays: Arrays) -> list[str]:
    """Returns the prefix of each network of a known library, in the file's order."""
    found = []
    for name in arrays:
        for naming in NAMINGS:
            first, *others = naming.marks
            prefix = name.removesuffix(first)
            ends = prefix == "" or prefix.endswith((".", "/"))
            if prefix != name and ends and all(prefix + other in arrays for other in others):
                found.append(prefix)
    return list(dict.fromkeys(found))


def translate(arrays: Arrays) -> Translated | None:
    """Translates the names of a file; returns None if they are not those of a known network."""
    naming = next((naming for naming in NAMINGS if arrays.keys() >= {*naming.marks}), None)
    if naming is None:
        return None
    norm = "GroupNorm" if not any(re.search(STATISTICS, name) for name in arrays) else "BatchNorm"
    ours, left_over = {}, []
    for name, array in arrays.items():
        if path := _path(naming, name, array):
            ours[path.replace("Norm_", f"{norm}_")] = _reorder_axes(naming, path, array)
        elif not re.fullmatch(naming.unused, name):
            left_over.append(name)
    averages = any(
        re.search(r"downsample\.1\.weight$", name) and array.ndim == 4
        for name, array in arrays.items()
    )
    return Translated(naming, naming.convert(ours), left_over, averages)


NUMBER = r"([0-9]{1,4})"  # of a stage, a block or a layer
STATISTICS = r"running_mean$|moving_mean$"  # which group norms lack


def _path(naming: Naming, name: str, array: np.ndarray) -> str | None:
    """Returns our path of an array, or None."""
    module, _, leaf = name.rpartition(naming.separator)
    rows = (row.split() for row in naming.modules.strip().splitlines() if row)
    patterns = ((re.escape(theirs).replace(r"\#", NUMBER), ours) for theirs, ours in rows)
    matches = (
        (re.fullmatch(pattern, module.removeprefix("resnet.")), ours) for pattern, ours in patterns
    )
    match, template = next((found for found in matches if found[0]), (None, ""))
    if match is None:
        return None
    if leaf == "weight":
        leaf = "scale" if array.ndim == 1 else "kernel"
    elif leaf not in naming.leaves:
        return None
    ours = naming.leaves.get(leaf, leaf)
    collection = "batch_stats" if ours in ("mean", "var") else "params"
    either = "Conv_" if array.ndim == 4 else "Norm_"
    return f"{collection}/{_fill(template, match)}/{ours}".replace("Either_", either)


def _fill(template: str, match: re.Match[str]) -> str:
    def number(field: re.Match[str]) -> str:
        value = int(match[int(field[1])])
        return str({"": value, "+": value + 1, "-": value - 1}[field[2]])

    return re.sub(r"\{(\d)(|\+|-)\}", number, template)


def _reorder_axes(naming: Naming, path: str, array: np.ndarray) -> np.ndarray:
    """Returns the array with our order of axes: (h, w, in, out) or (in, out)."""
    if not path.endswith("/kernel"):
        return array
    order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    if naming.leaves is TORCH and order:
        array = array.transpose(order)
    # The head may be a 1x1 convolution.
    return array[0, 0] if path == "params/head/kernel" and array.ndim == 4 else array


TORCH = {"bias": "bias", "running_mean": "mean", "running_var": "var"}
KERAS = {
    "kernel": "kernel",
    "bias": "bias",
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
}


def _convert_keras(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Moves biases of convolutions into the means of the norms, and reverses BGR to RGB.

    Neither changes the output: the norm subtracts its mean from what the bias was added to.
    """
    changed = dict(arrays)
    for path in arrays:
        if match := re.fullmatch(r"params/(.*)/Conv_(\d)/bias", path):
            mean = f"batch_stats/{match[1]}/BatchNorm_{match[2]}/mean"
            if mean in changed:
                changed[mean] = changed[mean] - changed.pop(path)
    if (first := "params/stem/Conv_0/kernel") in changed:
        changed[first] = changed[first][:, :, ::-1]
    return changed


STEM = """
conv1  stem/Conv_0
bn1    stem/Norm_0
"""
DEEP_STEM = """
conv1.0  stem/Conv_0
conv1.1  stem/Norm_0
conv1.3  stem/Conv_1
conv1.4  stem/Norm_1
conv1.6  stem/Conv_2
bn1      stem/Norm_2
"""
TORCHVISION = """
layer#.#.conv#         stage{1}/block{2+}/Conv_{3-}
layer#.#.bn#           stage{1}/block{2+}/Norm_{3-}
layer#.#.se.fc#        stage{1}/block{2+}/SqueezeExcite_0/Conv_{3-}
layer#.#.downsample.#  stage{1}/block{2+}/shortcut/Either_0
layer#.#.shortcut.#    stage{1}/block{2+}/shortcut/Either_0
fc                     head
linear                 head
"""
RESNETV2 = """
stem.conv                          stem/Conv_0
stages.#.blocks.#.conv#            stage{1+}/block{2+}/Conv_{3-}
stages.#.blocks.#.norm#            stage{1+}/block{2+}/Norm_{3-}
stages.#.blocks.#.downsample.conv  stage{1+}/block{2+}/shortcut/Conv_0
norm                               norm
head.fc                            head
"""
HUGGING_FACE = """
embedder.embedder.convolution                     stem/Conv_0
embedder.embedder.normalization                   stem/Norm_0
encoder.stages.#.layers.#.layer.#.convolution     stage{1+}/block{2+}/Conv_{3}
encoder.stages.#.layers.#.layer.#.normalization   stage{1+}/block{2+}/Norm_{3}
encoder.stages.#.layers.#.shortcut.convolution    stage{1+}/block{2+}/shortcut/Conv_0
encoder.stages.#.layers.#.shortcut.normalization  stage{1+}/block{2+}/shortcut/Norm_0
classifier.1                                      head
"""
KERAS_APPLICATIONS = """
conv1_conv            stem/Conv_0
conv1_bn              stem/Norm_0
conv#_block#_0_conv   stage{1-}/block{2}/shortcut/Conv_0
conv#_block#_0_bn     stage{1-}/block{2}/shortcut/Norm_0
conv#_block#_#_conv   stage{1-}/block{2}/Conv_{3-}
conv#_block#_#_bn     stage{1-}/block{2}/Norm_{3-}
predictions           head
"""
BIT = """
resnet/root_block/standardized_conv2d            stem/Conv_0
resnet/block#/unit#/a/proj/standardized_conv2d   stage{1}/block{2}/shortcut/Conv_0
resnet/block#/unit#/a/standardized_conv2d        stage{1}/block{2}/Conv_0
resnet/block#/unit#/b/standardized_conv2d        stage{1}/block{2}/Conv_1
resnet/block#/unit#/c/standardized_conv2d        stage{1}/block{2}/Conv_2
resnet/block#/unit#/a/group_norm                 stage{1}/block{2}/Norm_0
resnet/block#/unit#/b/group_norm                 stage{1}/block{2}/Norm_1
resnet/block#/unit#/c/group_norm                 stage{1}/block{2}/Norm_2
resnet/group_norm                                norm
resnet/head/conv2d                               head
"""
FCN = """
classifier.0      head/classifier/Conv_0
classifier.1      head/classifier/Norm_0
classifier.4      head/classifier/logits
"""
DEEPLABV3 = """
classifier.0.convs.0.0    head/classifier/Conv_0
classifier.0.convs.0.1    head/classifier/Norm_0
classifier.0.convs.4.1    head/classifier/Conv_4
classifier.0.convs.4.2    head/classifier/Norm_4
classifier.0.project.0    head/classifier/Conv_5
classifier.0.project.1    head/classifier/Norm_5
classifier.1              head/classifier/Conv_6
classifier.2              head/classifier/Norm_6
classifier.4              head/classifier/logits
classifier.0.convs.#.0    head/classifier/Conv_{1}
classifier.0.convs.#.1    head/classifier/Norm_{1}
"""
AUXILIARY = """
aux_classifier.0  head/aux_classifier/Conv_0
aux_classifier.1  head/aux_classifier/Norm_0
aux_classifier.4  head/aux_classifier/logits
"""
# Rows without the last number are for version 1 of torchvision's modules, whose convolutions and
# ReLUs were one sequence, as in the published retinanet_resnet50_fpn_coco.
RETINANET = """
backbone.fpn.inner_blocks.#.0         head/fpn/inner{1}
backbone.fpn.layer_blocks.#.0         head/fpn/layer{1}
backbone.fpn.inner_blocks.#           head/fpn/inner{1}
backbone.fpn.layer_blocks.#           head/fpn/layer{1}
backbone.fpn.extra_blocks.p6          head/fpn/coarse1
backbone.fpn.extra_blocks.p7          head/fpn/coarse2
head.classification_head.conv.#.0     head/classification/convs_{1}
head.classification_head.conv.#.1     head/classification/norms_{1}
head.classification_head.conv.0       head/classification/convs_0
head.classification_head.conv.2       head/classification/convs_1
head.classification_head.conv.4       head/classification/convs_2
head.classification_head.conv.6       head/classification/convs_3
head.classification_head.cls_logits   head/classification/last
head.regression_head.conv.#.0         head/regression/convs_{1}
head.regression_head.conv.#.1         head/regression/norms_{1}
head.regression_head.conv.0           head/regression/convs_0
head.regression_head.conv.2           head/regression/convs_1
head.regression_head.conv.4           head/regression/convs_2
head.regression_head.conv.6           head/regression/convs_3
head.regression_head.bbox_reg         head/regression/last
"""


def _below(prefix: str, modules: str) -> str:
    """Returns the lines of modules that another module contains."""
    return "\n".join(f"{prefix}{line}" for line in modules.strip().splitlines() if line) + "\n"


HUGGING_FACE_MARK = "encoder.stages.0.layers.0.layer.0.convolution.weight"
BIT_MARK = "resnet/block1/unit01/a/standardized_conv2d/kernel"

NAMINGS = (
    Naming(
        "torchvision", ("backbone.conv1.weight", "classifier.0.project.0.weight"),
        _below("backbone.", STEM + TORCHVISION) + DEEPLABV3 + AUXILIARY, TORCH,
        task={"name": "segmentation", "options": {"decoder": "deeplabv3"}},
    ),
    Naming(
        "torchvision", ("backbone.conv1.weight", "classifier.0.weight", "classifier.4.weight"),
        _below("backbone.", STEM + TORCHVISION) + FCN + AUXILIARY, TORCH,
        task={"name": "segmentation", "options": {"decoder": "fcn"}},
    ),
    Naming(
        "torchvision", ("backbone.body.conv1.weight", "head.classification_head.cls_logits.weight"),
        _below("backbone.body.", STEM + TORCHVISION) + RETINANET, TORCH,
        task={"name": "detection", "options": {}},
    ),
    Naming("timm", ("layer1.0.conv1.weight", "conv1.0.weight"), DEEP_STEM + TORCHVISION, TORCH),
    Naming("torchvision", ("layer1.0.conv1.weight", "conv1.weight"), STEM + TORCHVISION, TORCH),
    Naming("timm", ("stages.0.blocks.0.conv1.weight",), RESNETV2, TORCH),
    Naming("Hugging Face", (f"resnet.{HUGGING_FACE_MARK}",), HUGGING_FACE, TORCH),
    Naming("Hugging Face", (HUGGING_FACE_MARK,), HUGGING_FACE, TORCH),
    Naming(
        "Keras", ("conv2_block1_1_conv/kernel",), KERAS_APPLICATIONS, KERAS, "/",
        convert=_convert_keras,
    ),
    Naming("BiT", (BIT_MARK,), BIT, KERAS, "/"),
)  # fmt: skip


def to_torchvision(
    path: str,
    array: np.ndarray,
    *,
    deep: bool,
    averages: bool,
    task: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and array of torchvision, or timm, for one of ours; inverts `translate`.

    Args:
      path: our path of the array.
      array: with our order of axes.
      deep: whether the stem has three convolutions, as in ResNet-D.
      averages: whether shortcuts average before they project, as in ResNet-D.
      task: name and options of the task whose head the network has; None for classification.
    """
    naming = _naming_of(task) if task else None
    _, *modules, leaf = path.split("/")
    last, _, index = modules[-1].rpartition("_")
    kind = {"Conv": "conv", "BatchNorm": "bn"}.get(last, "")
    if naming and modules[0] == "head":
        name = _head_name(naming, "/".join(modules))
    elif modules == ["head"]:
        name = "fc"
    elif modules[0] == "stem" and deep:
        name = f"conv1.{3 * int(index) + (kind == 'bn')}" if (kind, index) != ("bn", "2") else "bn1"
    elif modules[0] == "stem":
        name = f"{kind}1"
    else:
        stage, block = (int(re.sub(r"\D", "", module)) for module in modules[:2])
        name = f"layer{stage}.{block - 1}."
        if modules[2] == "shortcut":
            name += f"downsample.{(kind == 'bn') + averages}"
        else:
            name += f"{'se.fc' if modules[2] == 'SqueezeExcite_0' else kind}{int(index) + 1}"
    if naming and modules[0] != "head":
        name = naming.marks[0].removesuffix("conv1.weight") + name
    if leaf == "kernel":
        array = array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0))
    theirs = {"kernel": "weight", "scale": "weight", **{ours: it for it, ours in TORCH.items()}}
    yield f"{name}.{theirs[leaf]}", array
    if leaf == "mean":
        yield f"{name}.num_batches_tracked", np.zeros((), np.int64)


def exports(task: Mapping[str, Any]) -> bool:
    """Returns whether torchvision has networks with the head of a task."""
    return _naming_of(task) is not None


def _naming_of(task: Mapping[str, Any]) -> Naming | None:
    """Returns torchvision's names of the networks with the head of a task."""
    wanted = task["name"], task["options"].get("decoder")
    return next(
        (
            naming
            for naming in NAMINGS
            if naming.task
            and wanted == (naming.task["name"], naming.task["options"].get("decoder"))
        ),
        None,
    )


def _head_name(naming: Naming, path: str) -> str:
    """Returns torchvision's name of a module of a head."""
    for row in naming.modules.strip().splitlines():
        theirs, ours = row.split() if row.strip() else ("", "")
        pattern = re.escape(ours.replace("Norm_", "BatchNorm_")).replace(r"\{1\}", NUMBER)
        if theirs and (match := re.fullmatch(pattern, path)):
            return theirs.replace("#", match[1]) if match.groups() else theirs
    raise KeyError(path)
