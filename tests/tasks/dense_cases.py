"""Networks, images and targets on which segmentation and detection are compared with torchvision.

Parameters are drawn by their names in torchvision, so that both sides draw the same.
"""

import zlib

import numpy as np

STEPS, MOMENTUM = 5, 0.9
RATES = {"segmentation": 0.0003, "detection": 0.0001}
CLASSES = 6
SEGMENTATION_SIZE, DETECTION_SIZE = (33, 41), (67, 98)  # odd: every resampling rounds
SEGMENTATION_IMAGES = 4  # of fewer, the norm of DeepLabV3's pooled branch is ill-conditioned
MODEL = {"family": "imagenet", "depth": 14, "block": "bottleneck", "classes": CLASSES}

# By name: the task, and the number of dilated stages.
CASES = {
    "fcn": ({"name": "segmentation", "options": {"decoder": "fcn", "auxiliary_weight": 0.5}}, 2),
    "deeplabv3": ({"name": "segmentation", "options": {"decoder": "deeplabv3"}}, 2),
    "retinanet": (
        {"name": "detection", "options": {"channels": 256, "stages": 3, "coarse_from": "pyramid"}},
        0,
    ),
    "retinanet_v2": (
        {
            "name": "detection",
            "options": {
                "channels": 256,
                "stages": 3,
                "coarse_from": "backbone",
                "group_norm": True,
                "box_loss": "giou",
            },
        },
        0,
    ),
}


def parameter(name, shape):
    """Returns the array of a state dict of torchvision."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    leaf = name.rpartition(".")[2]
    if leaf in ("running_mean", "num_batches_tracked"):
        return np.zeros(shape, np.float32)
    if leaf == "running_var":
        return np.ones(shape, np.float32)
    if leaf == "bias":
        return generator.normal(0, 0.05, shape).astype(np.float32)
    if len(shape) == 1:
        return generator.uniform(0.8, 1.2, shape).astype(np.float32)
    deviation = 0.01 if name.startswith("head.") else np.sqrt(2 / np.prod(shape[1:]))
    return generator.normal(0, deviation, shape).astype(np.float32)


def images(size, count):
    """Returns images (n, h, w, 3), normalized."""
    return np.random.default_rng(1).normal(size=(count, *size, 3)).astype(np.float32)


def masks():
    """Returns masks (n, h, w) of large areas; some pixels are void."""
    generator = np.random.default_rng(2)
    coarse = generator.integers(0, CLASSES, (SEGMENTATION_IMAGES, 5, 6)).astype(np.uint8)
    mask = coarse.repeat(7, 1).repeat(7, 2)[:, : SEGMENTATION_SIZE[0], : SEGMENTATION_SIZE[1]]
    return np.where(generator.random(mask.shape) < 0.1, 255, mask).astype(np.uint8)


def objects():
    """Returns boxes (n, objects, 4) and classes; the second image has fewer objects."""
    height, width = DETECTION_SIZE
    boxes = np.array(
        [
            [[4, 6, 40, 50], [30.5, 10, 97, 66], [60, 20, 75, 33.5], [0, 0, width, height]],
            [[10, 30, 31, 60], [50, 2, 90, 44], [0, 0, 0, 0], [0, 0, 0, 0]],
        ],
        np.float32,
    )
    return boxes, np.array([[1, 5, 2, 2], [3, 3, 0, 0]], np.int32)
