"""Small networks, data and weights that resjax and PyTorch train alike, by formulas of NumPy."""

import zlib

import numpy as np

BATCH, SIDE, CLASSES, STEPS = 8, 16, 3, 10
OVERRIDES = {
    "model.family": "cifar",
    "model.depth": 8,
    "model.width": 4,
    "model.shortcut": "pad",
    "model.bn_unbiased": True,
    "data.batch_size": BATCH,  # all images, so that their order has no effect
    "train.steps": STEPS,
    "optimizer.learning_rate": 0.125,
    "optimizer.weight_decay": 0.0,
    "optimizer.schedule": "constant",
}
STEEP = {"optimizer.schedule": "steps", "optimizer.decay_factor": 0.25}
BOTTLENECK = {"model.depth": 11, "model.block": "bottleneck", "model.shortcut": "project"}

# By the name of a case, what differs from OVERRIDES.
CASES = {
    "plain": {"model.shortcut": "none"},
    "option A, weight decay": {"optimizer.weight_decay": 2**-6},
    "option B, Nesterov momentum": {"model.shortcut": "project", "optimizer.nesterov": True},
    "option C, decay of kernels, steps": {
        **{"model.shortcut": "project_all", "optimizer.weight_decay": 2**-6, **STEEP},
        "optimizer.weight_decay_on": "kernels",
    },
    "scanned, cosine": {"model.depth": 20, "model.loop": "scan", "optimizer.schedule": "cosine"},
    "unrolled, one cycle": {
        **{"model.depth": 14, "model.loop": "unroll", "model.remat": True},
        **{"optimizer.schedule": "onecycle", "optimizer.learning_rate": 0.5},
    },
    "bottleneck": BOTTLENECK,
    "bottleneck, stride in the 1x1, imagenet stem": {
        **BOTTLENECK,
        **{"model.stem": "imagenet", "model.block_options": {"stride_in_1x1": True}},
    },
    "ResNeXt": BOTTLENECK | {"model.block_options": {"groups": 4, "group_width": 32}},
    "squeeze and excitation": {"model.block_options": {"se_reduction": 2}, **STEEP},
    "ResNet-D": BOTTLENECK | {"model.stem": "deep", "model.shortcut": "project_avg"},
    "preactivation": {"model.block": "preact_basic", "model.shortcut": "project"},
    "preactivation, bottleneck": BOTTLENECK | {"model.block": "preact_bottleneck"},
    "BN after addition": {"model.block": "bn_after_addition_basic", "model.shortcut": "project"},
    "ReLU before addition": {"model.block": "relu_before_addition_basic"},
    "ReLU-only pre-activation": BOTTLENECK | {"model.block": "relu_preact_bottleneck"},
    "Fixup": {"model.block": "fixup_basic", "model.norm": "fixup"},
    "SkipInit": {"model.norm": "none", "model.branch_scale": "learned"},
    "wide": {
        **{"model.family": "wide", "model.depth": 10, "model.widen": 2},
        **{"model.block": "preact_basic", "model.shortcut": "project"},
    },
    "AdamW": {
        **{"optimizer.name": "adamw", "optimizer.learning_rate": 2**-6},
        **{"optimizer.weight_decay": 0.25, "optimizer.momentum": 0.875},
    },
    "label smoothing, other BN options": {
        **{"task.options": {"label_smoothing": 0.125}, "model.bn_epsilon": 2**-7},
        **{"model.bn_momentum": 0.75},
    },
}


def data():
    """Returns uint8 images (n, h, w, 3) and their labels.

    Pixels are black or white, so that normalized ones are exact in float32.
    """
    random = np.random.RandomState(0)
    images = 255 * random.randint(0, 2, (BATCH, SIDE, SIDE, 3)).astype(np.uint8)
    return images, np.arange(BATCH) % CLASSES


def weights(path, shape):
    """Returns the initial parameter at a path of the unrolled network, in float64."""
    random = np.random.RandomState(zlib.crc32(path.encode()))
    if path.endswith("kernel"):
        return random.normal(0, (2 / np.prod(shape[:-1])) ** 0.5, shape)
    if path.endswith("scale"):
        return np.asarray(random.uniform(0.5, 1.5, shape))
    return np.asarray(random.normal(0, 0.1, shape))
