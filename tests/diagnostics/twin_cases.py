"""Small networks, data and weights that resjax and PyTorch measure alike, by formulas of NumPy."""

import zlib

import numpy as np

BATCH, SIDE, CLASSES = 8, 16, 3
OVERRIDES = {
    "model.family": "cifar",
    "model.depth": 14,
    "model.width": 4,
    "model.shortcut": "pad",
    "model.bn_unbiased": True,
    "data.batch_size": BATCH,  # all images, so that their order has no effect
    "train.steps": 10,
    "optimizer.learning_rate": 0.125,
    "optimizer.weight_decay": 2**-6,
    "optimizer.schedule": "constant",
    "diagnostics.every": 100,
    "diagnostics.names": ("all",),
}
BOTTLENECK = {"model.depth": 20, "model.block": "bottleneck"}

# By the name of a case: what differs from OVERRIDES, and the steps before the measured one.
CASES = {
    "option A": ({}, 2),
    "plain": ({"model.shortcut": "none"}, 0),
    "option B, bottleneck": (BOTTLENECK | {"model.shortcut": "project"}, 0),
    "preactivation": ({"model.block": "preact_basic", "model.shortcut": "project"}, 0),
}


def data():
    """Returns uint8 images (n, h, w, 3) and their labels.

    Pixels are black or white, so that normalized ones are exact in float32.
    """
    random = np.random.RandomState(1)
    images = 255 * random.randint(0, 2, (BATCH, SIDE, SIDE, 3)).astype(np.uint8)
    return images, np.arange(BATCH) % CLASSES


def weights(path, shape):
    """Returns the initial parameter at a path of the unrolled network, in float64.

    A third of the norms have a channel that is negative everywhere, so that its ReLU is dead.
    """
    seed = zlib.crc32(path.encode())
    random = np.random.RandomState(seed)
    if path.endswith("kernel"):
        return random.normal(0, (2 / np.prod(shape[:-1])) ** 0.5, shape)
    if path.endswith("scale"):
        return random.uniform(0.5, 1.5, shape)
    array = random.normal(0, 0.1, shape)
    array[0] -= 8.0 * (seed % 3 == 0 and "head" not in path)
    return array
