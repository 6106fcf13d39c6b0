"""Recognizes the network that weights belong to by the names and shapes of their arrays."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from resjax.models.presets import BLOCK_LAYERS, CIFAR_OFFSETS, IMAGENET_STAGES
from resjax.transfer.naming import Translated
from resjax.transfer.weights import CLASSIFICATION

Arrays = Mapping[str, np.ndarray]


class UnknownNetworkError(ValueError):
    """The arrays belong to no network that `resjax.build` can make; the message says why."""


def recognize(
    arrays: Arrays, *, averages: bool = False, shortcut: str | None = None
) -> dict[str, Any]:
    """Returns the fields of `resjax.build` for weights under our paths.

    Args:
      arrays: by path, in the unrolled layout, such as `params/stage1/block1/Conv_0/kernel`.
      averages: whether shortcuts average before they project, which shapes do not show.
      shortcut: that of a network without projections: "pad", "pad_center" or "none".

    Raises:
      UnknownNetworkError: there is no such network.
    """
    shapes = {path.removeprefix("params/"): array.shape for path, array in arrays.items()}
    blocks = _blocks(shapes)
    first = "stage1/block1/"
    norm = "group" if any("/GroupNorm_" in path for path in shapes) else "batch"
    preactivation = "norm/scale" in shapes
    bottleneck = first + "Conv_2/kernel" in shapes
    stem = _stem(shapes, bit=norm == "group" and preactivation)
    expansion = 4 if bottleneck else 1
    out = _shape(shapes, first + f"Conv_{2 if bottleneck else 1}/kernel")[-1]
    stem_width = _shape(shapes, f"stem/Conv_{2 if stem == 'deep' else 0}/kernel")[-1]
    name = f"{'preact_' if preactivation else ''}{'bottleneck' if bottleneck else 'basic'}"
    family = "imagenet" if len(blocks) == 4 else "cifar"
    fields: dict[str, Any] = {
        "family": family,
        "depth": _depth(family, blocks, BLOCK_LAYERS[name]),
        "block": name,
        "block_options": {},
        "shortcut": _shortcut(shapes, first if out == stem_width else "stage1/block2/", averages)
        or _named_shortcut(shortcut),
        "shortcut_options": {},
        "width": stem_width,
        "widen": max(out // expansion // stem_width, 1),
        "stem": stem,
        "norm": norm,
        "standardize": stem == "bit",
    }
    if bottleneck and not preactivation:
        fields["block_options"] = _bottleneck_options(shapes, first, out // expansion)
    if squeezed := shapes.get(first + "SqueezeExcite_0/Conv_0/kernel"):
        fields["block_options"]["se_reduction"] = squeezed[2] // squeezed[3]
    return {**fields, "classes": _classes(shapes)}


def _classes(shapes: Mapping[str, Any]) -> int:
    """Returns the number of classes that the head has, 0 without a head."""
    located = shapes.get("head/regression/last/bias", (0,))[0] // 4  # anchors per pixel
    for layer in ("head/kernel", "head/classifier/logits/kernel"):
        if layer in shapes:
            return int(shapes[layer][-1])
    if "head/classification/last/bias" in shapes and located:
        return int(shapes["head/classification/last/bias"][0] // located)
    return 0


def dense_task(translated: Translated) -> Mapping[str, Any]:
    """Returns name and options of the task whose head an imported network has."""
    task = translated.naming.task
    if task is None:
        return CLASSIFICATION
    shapes = {path.removeprefix("params/"): a.shape for path, a in translated.arrays.items()}
    options = dict(task["options"])
    if task["name"] == "segmentation":
        if "head/aux_classifier/logits/kernel" in shapes:
            options["auxiliary_weight"] = 0.5
        return {**task, "options": options}
    _, _, source, channels = _shape(shapes, "head/fpn/coarse1/kernel")
    options["channels"] = channels
    options["stages"] = sum(bool(re.fullmatch(r"head/fpn/inner\d/kernel", p)) for p in shapes)
    options["coarse_from"] = "pyramid" if source == channels else "backbone"
    if "head/classification/norms_0/scale" in shapes:  # as in torchvision's second version
        options |= {"group_norm": True, "box_loss": "giou"}
    return {**task, "options": options}


def _blocks(shapes: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the number of blocks in each stage."""
    found = [re.match(r"stage(\d+)/block(\d+)/", path) for path in shapes]
    numbers = Counter(stage for stage, _ in {(int(m[1]), int(m[2])) for m in found if m})
    return tuple(numbers[stage] for stage in range(1, max(numbers, default=0) + 1))


def _depth(family: str, blocks: tuple[int, ...], layers: int) -> int:
    if family == "cifar" and len(blocks) == 3 and len({*blocks}) == 1:
        return layers * sum(blocks) + CIFAR_OFFSETS[family]
    for depth, sizes in IMAGENET_STAGES[layers].items():
        if sizes == blocks:
            return depth
    raise UnknownNetworkError(
        f"no published depth has stages of {', '.join(map(str, blocks))} blocks"
    )


def _stem(shapes: Mapping[str, Any], bit: bool) -> str:
    if "stem/Conv_2/kernel" in shapes:
        return "deep"
    if bit:
        return "bit"
    return "cifar" if _shape(shapes, "stem/Conv_0/kernel")[0] == 3 else "imagenet"


def _named_shortcut(given: str | None) -> str:
    if given is None:
        raise UnknownNetworkError(
            "it has no projections, and its arrays do not show what its shortcuts are; give "
            "`resjax import` --shortcut=pad (zeros after the channels, as in He et al.), "
            "pad_center (zeros on both sides, as in akamaster's pytorch_resnet_cifar10), or none"
        )
    return "none" if given == "none" else "pad"


def _shortcut(shapes: Mapping[str, Any], equal: str, averages: bool) -> str:
    """Returns the name of a shortcut with arrays, or "".

    The block `equal`, if it exists, preserves its shape.
    """
    if "stage2/block1/shortcut/Conv_0/kernel" not in shapes:
        return ""
    if equal + "shortcut/Conv_0/kernel" in shapes:
        return "project_all"
    return "project_avg" if averages else "project"


def _bottleneck_options(shapes: Mapping[str, Any], block: str, features: int) -> dict[str, Any]:
    _, _, in_group, inner = _shape(shapes, block + "Conv_1/kernel")
    groups = inner // in_group
    return {"groups": groups, "group_width": inner * 64 // (features * groups)}


def _shape(shapes: Mapping[str, Any], path: str) -> tuple[int, ...]:
    if path not in shapes:
        raise UnknownNetworkError(f"it has no {path}")
    return shapes[path]
