"""Datasets, the feed that draws batches from them, and augmentation on the device.

Imports no JAX, so that a misspelt dataset is refused at once.
"""

from typing import NamedTuple


class Spec(NamedTuple):
    """What is known of a dataset before it is read."""

    classes: int
    image_shape: tuple[int, int, int]  # height, width, channels
    train_images: int
    test_images: int
    source: str
    embedded: bool = False  # comes with the installation
    synthetic: bool = False  # no data, but noise of the right shape


DATASETS = {
    "digits": Spec(
        10,
        (8, 8, 1),
        1_437,
        360,
        "handwritten digits (Alpaydin & Kaynak 1998, UCI), as scikit-learn carries them",
        embedded=True,
    ),
    "cifar10": Spec(10, (32, 32, 3), 50_000, 10_000, "Krizhevsky 2009"),
    "imagenet2012": Spec(1000, (224, 224, 3), 1_281_167, 50_000, "Russakovsky et al. 2015"),
    "synthetic_cifar": Spec(
        10,
        (32, 32, 3),
        50_000,
        1_000,
        "noise of the shape of CIFAR-10: measures speed, teaches nothing",
        embedded=True,
        synthetic=True,
    ),
    "synthetic_imagenet": Spec(
        1000,
        (224, 224, 3),
        1_281,
        50,
        "noise of the shape of a thousandth of ImageNet: measures speed, teaches nothing",
        embedded=True,
        synthetic=True,
    ),
}
