"""The preprocessing of foreign weights, from their files or by the conventions of their library.

Statistics are those of RGB images in [0, 1].
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from resjax.data.normalization import Statistics
from resjax.transfer.weights import Preprocessing

Interpolation = Literal["nearest", "bilinear", "bicubic"]

# torchvision.models, transforms of the V1 weights.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# keras.applications.imagenet_utils.preprocess_input, mode "caffe", which is BGR and not scaled.
CAFFE = (tuple(mean / 255 for mean in (123.68, 116.779, 103.939)), (1 / 255,) * 3)
# google-research/big_transfer, input_pipeline_tf2_or_jax.py: [-1, 1].
SYMMETRIC = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# Pillow's filters by the number in Hugging Face's `resample`; others become bicubic.
RESAMPLE: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}

# torchvision evaluates its V2 weights at 232 pixels, not 256; the file's name identifies them.
V2_FILES = re.compile(
    r"resnet50-11ad3fa6|resnet101-cd907fc2|resnet152-f82ba261|resnext50_32x4d-1a0047aa"
    r"|resnext101_32x8d-110c445d|resnext101_64x4d-173b62eb|wide_resnet50_2-9ba9bcbe"
    r"|wide_resnet101_2-d733dc28"
)


def of_library(
    library: str, file: str, channels: int, *, small: bool = False
) -> tuple[Statistics, Preprocessing]:
    """Returns the convention of a library for weights without a config.

    Args:
      library: as in `naming`.
      file: its name, which may be that of published weights.
      channels: of the images.
      small: whether the stem is that of networks for CIFAR.
    """
    if small:
        return _statistics(IMAGENET, channels), Preprocessing(32, 32, channels)
    if library == "Keras":
        keras = Preprocessing(224, 224, channels, "nearest", squash=True)
        return _statistics(CAFFE, channels), keras
    if library == "BiT":
        side = 480 if "ILSVRC2012" in file else 224  # fine-tuned, or as it was pretrained
        return _statistics(SYMMETRIC, channels), Preprocessing(side, side, channels, squash=True)
    shorter = 232 if V2_FILES.search(file) else 256
    return _statistics(IMAGENET, channels), Preprocessing(224, shorter, channels)


def of_timm(config: Mapping[str, Any], channels: int) -> tuple[Statistics, Preprocessing]:
    """Reads the `pretrained_cfg` of timm's config.json."""
    size = config["input_size"][-1]
    interpolation = config.get("interpolation", "bicubic")
    preprocessing = Preprocessing(
        size=size,
        shorter_side=math.floor(size / config.get("crop_pct", 0.875)),
        channels=channels,
        interpolation=interpolation if interpolation in RESAMPLE.values() else "bicubic",
        squash=config.get("crop_mode", "center") == "squash",
    )
    return _statistics((config["mean"], config["std"]), channels), preprocessing


def of_hugging_face(config: Mapping[str, Any], channels: int) -> tuple[Statistics, Preprocessing]:
    """Reads the preprocessor_config.json of the image processors that their ResNets use."""
    size = config.get("size", {})
    side = size if isinstance(size, int) else size.get("shortest_edge", size.get("height", 224))
    crop = config.get("crop_size", side)
    crop = crop if isinstance(crop, int) else crop.get("height", side)
    # ConvNextImageProcessor scales by crop_pct and cuts, but squashes from 384 pixels on.
    shorter = math.floor(side / config["crop_pct"]) if "crop_pct" in config and side < 384 else side
    preprocessing = Preprocessing(
        size=crop,
        shorter_side=max(shorter, crop),
        channels=channels,
        interpolation=RESAMPLE.get(config.get("resample", 2), "bicubic"),
        squash="crop_pct" in config and side >= 384,
    )
    given = config.get("image_mean", IMAGENET[0]), config.get("image_std", IMAGENET[1])
    return _statistics(given, channels), preprocessing


def _statistics(given: tuple[Any, Any], channels: int) -> Statistics:
    """Returns statistics for a number of channels: the mean of RGB's for any other than three.

    Raises:
      ValueError: they are those of another number of channels.
    """
    mean, std = (np.asarray(values, np.float32).reshape(-1) for values in given)
    if len(mean) != len(std) or len(mean) not in (1, 3, channels):
        raise ValueError(f"statistics of {len(mean)} and {len(std)} channels")
    if len(mean) != channels:
        mean, std = np.full(channels, mean.mean()), np.full(channels, std.mean())
    return Statistics(mean.astype(np.float32), std.astype(np.float32))
