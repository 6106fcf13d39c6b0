"""Facts about a network that the names and shapes of its arrays do not show.

The user's options take precedence over a config beside the file, the config over the name of the
network or file, and the name over the library's default. A default is reported, because it may be
wrong.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from resjax.errors import UserError

KERAS_EPSILON = 1.001e-5  # of keras.applications.resnet
OUTPUT_STRIDES = {32: 0, 16: 1, 8: 2}  # timm's, by the stages that are dilated

# Facts implied by the name of a network or file.
NAMES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    # timm: resnetaa50, seresnextaa101d_32x8d, resnetblur50.
    (r"res(net|next)aa\d", {"antialias": "average", "stem_pool": "average"}),
    (r"res(net|next)blur\d", {"antialias": "blur", "stem_pool": "blur"}),
    # torchvision.models.segmentation, whose backbones replace strides with dilation.
    (r"(deeplabv3|fcn)_resnet\d", {"dilated_stages": 2}),
    # torchvision.models.detection sets the epsilon of its COCO_V1 weights to zero.
    (r"(rcnn|retinanet)_resnet50_fpn_coco-", {"bn_epsilon": 0.0}),
)
# Names of networks whose arrays fit ours, but which cannot be built here: mmdetection's copies of
# Caffe's ResNets take BGR images that are not divided by a standard deviation.
OTHERS = ((r"resnet\d+_(caffe|msra)", "Caffe's ResNets, which take BGR images, are not supported"),)
# Descriptions of the facts for messages.
ASSUMED = {
    "stem_pool": "{} pooling after the stem",
    "bn_epsilon": "a BN epsilon of {}",
    "antialias": "{} anti-aliasing",
    "v1": "stride in the {} convolution",
    "dilated_stages": "{} dilation",
}
# The heads of torchvision's DeepLabV3 and FCN, beside the names of the backbone.
DILATED_HEADS = r"classifier\.0\.(convs\.0\.0\.weight|weight)"


@dataclass(frozen=True)
class Hidden:
    """Facts about a network that its arrays do not show; None means unknown.

    Attributes:
      v1: whether bottlenecks stride in their first 1x1 convolution instead of the 3x3.
      stem_pool: max, average, blur or none.
      antialias: the filter before strides: average, blur or none.
      dilated_stages: how many of the last stages are dilated instead of strided.
      bn_epsilon: of the batch norms.
      shortcut: pad, pad_center or none, if no shortcut has arrays. `pad_center` puts the channels
        that a shortcut carries between the zeros, as https://github.com/akamaster/
        pytorch_resnet_cifar10 does; `pad` puts them first.
    """

    v1: bool | None = None
    stem_pool: str | None = None
    antialias: str | None = None
    dilated_stages: int | None = None
    bn_epsilon: float | None = None
    shortcut: str | None = None

    def known(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts in a config.json of Hugging Face or timm.

    Raises:
      UserError: it describes a network that `resjax.build` cannot make.
    """
    if (act := config.get("hidden_act", "relu")) != "relu":
        raise UserError(f"its activation is {act}; networks here have relu")
    if config.get("downsample_in_first_stage"):
        raise UserError("its first stage strides; in networks here it does not")
    arguments = config.get("model_args") or {}
    if unknown := sorted(arguments.keys() - {"output_stride", "num_classes", "in_chans"}):
        raise UserError(f"its model_args change {unknown[0]}, which is not supported")
    found: dict[str, Any] = {}
    if config.get("model_type") == "resnet" or "downsample_in_bottleneck" in config:
        v1 = bool(config.get("downsample_in_bottleneck"))
        found = {"v1": v1, "stem_pool": "max", "antialias": "none", "dilated_stages": 0}
        found["bn_epsilon"] = 1e-5
    if (stride := arguments.get("output_stride", 32)) not in OUTPUT_STRIDES:
        raise UserError(f"its output_stride is {stride!r}, not one of 8, 16 and 32")
    return found | ({"dilated_stages": OUTPUT_STRIDES[stride]} if stride != 32 else {})


def from_other_arrays(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """Returns the facts that the other arrays of a file imply about the backbone below `prefix`."""
    around = (
        re.fullmatch(DILATED_HEADS, name) and array.ndim == 4 for name, array in arrays.items()
    )
    return {"dilated_stages": 2} if prefix == "backbone." and any(around) else {}


def from_names(*names: str) -> dict[str, Any]:
    """Returns the facts that the names of the network and of its file imply.

    Raises:
      UserError: a name is that of a network that `resjax.build` cannot make.
    """
    for pattern, reason in OTHERS:
        if any(re.search(pattern, name, re.IGNORECASE) for name in names):
            raise UserError(f"is named as another network: {reason}")
    found: dict[str, Any] = {}
    for pattern, facts in NAMES:
        if any(re.search(pattern, name, re.IGNORECASE) for name in names):
            found |= facts
    return found


def defaults(library: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts that hold for the networks of a library unless something contradicts."""
    facts: dict[str, Any] = {"stem_pool": "none" if fields["stem"] == "cifar" else "max"}
    facts["bn_epsilon"] = KERAS_EPSILON if library == "Keras" else 1e-5
    if not fields["block"].startswith("preact"):
        facts["antialias"] = "none"
    if fields["block"].endswith("bottleneck"):
        facts |= {"v1": library == "Keras", "dilated_stages": 0}
    return facts


def apply(fields: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `resjax.build` with the facts that apply to such a network.

    Raises:
      UserError: a fact that is not a default does not apply to such a network.
    """
    block, options = fields["block"], dict(fields["block_options"])
    changed: dict[str, Any] = {
        name: facts[name] for name in ("stem_pool", "dilated_stages") if name in facts
    }
    if facts["bn_epsilon"] != 1e-5:
        changed["bn_epsilon"] = facts["bn_epsilon"]
    if block.endswith("bottleneck"):
        options["stride_in_1x1"] = facts["v1"]
    elif facts.get("v1"):
        raise UserError("its blocks have no 1x1 convolution that could stride (--v1)")
    if (kind := facts.get("antialias", "none")) != "none":
        options["antialias"] = kind
    return {**fields, **changed, "block_options": options}


def carried_first(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reorders channels so that shortcuts that pad on both sides pad after the last channel.

    The order of channels between blocks is free, so the outputs stay the same.
    """
    changed = dict(arrays)
    if any("SqueezeExcite" in path for path in arrays):
        raise UserError("--shortcut=pad_center of blocks with squeeze-and-excitation is unknown")
    branches: dict[tuple[int, int], int] = {}  # the last convolution of each block
    for path in arrays:
        if match := re.match(r"params/stage(\d+)/block(\d+)/Conv_(\d)/", path):
            key = int(match[1]), int(match[2])
            branches[key] = max(branches.get(key, 0), int(match[3]))
    order = np.arange(arrays["params/stem/Conv_0/kernel"].shape[3])  # the file's index of each
    for (stage, block), last in sorted(branches.items()):
        name = f"stage{stage}/block{block}"
        _reorder(changed, f"params/{name}/Conv_0/kernel", 2, order)
        width = arrays[f"params/{name}/Conv_{last}/kernel"].shape[3]
        if width != len(order):
            carried = order + (width - len(order)) // 2
            order = np.concatenate([carried, np.setdiff1d(np.arange(width), carried)])
        _reorder(changed, f"params/{name}/Conv_{last}/kernel", 3, order)
        for kind, leaves in (("params", ("scale", "bias")), ("batch_stats", ("mean", "var"))):
            for leaf in leaves:
                _reorder(changed, f"{kind}/{name}/BatchNorm_{last}/{leaf}", 0, order)
    _reorder(changed, "params/head/kernel", 0, order)
    return changed


def _reorder(arrays: dict[str, np.ndarray], path: str, axis: int, order: np.ndarray) -> None:
    if path in arrays and arrays[path].shape[axis] == len(order):  # the rest is refused later
        arrays[path] = arrays[path].take(order, axis)


def describe(facts: Mapping[str, Any]) -> str:
    """Returns one line about facts that were assumed, each with the option that changes it."""
    parts = []
    for name, value in facts.items():
        option = f"--{name.replace('_', '-')}"
        if name == "v1":
            value, option = ("first 1x1", "--no-v1") if value else ("3x3", "--v1")
        shown = "no" if value in (0, "none") else value
        parts.append(f"{ASSUMED[name].format(shown)} ({option})")
    return (
        f"assumed, as the file does not show it: {', '.join(parts)}; the options are "
        "`resjax import`'s"
    )
