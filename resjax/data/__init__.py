"""Datasets, batches and augmentation.

This module does not import JAX, so that a misspelled dataset name is reported at once.

User data has names too: `tfds:NAME` is an image-classification dataset that TFDS prepared,
`folder:PATH` a folder of image files with one subfolder per class, `npz:PATH` a file of NumPy
arrays.
"""

import difflib
from typing import NamedTuple

USER_DATA = ("tfds:", "folder:", "npz:")  # prefixes of names


class Spec(NamedTuple):
    """Facts about a dataset that are known before it is read."""

    classes: int
    image_shape: tuple[int, int, int] | None  # height, width, channels; None if sizes differ
    train_images: int
    test_images: int
    source: str
    embedded: bool = False  # part of the installation
    synthetic: bool = False  # noise in the right shape
    tfds: str = ""  # its name in TFDS
    test_split: str = "test"  # name of the split to test on; ImageNet's is validation


DATASETS = {
    "digits": Spec(
        10,
        (8, 8, 1),
        1_437,
        360,
        "handwritten digits (Alpaydin & Kaynak 1998, UCI), from scikit-learn",
        embedded=True,
    ),
    "cifar10": Spec(10, (32, 32, 3), 50_000, 10_000, "Krizhevsky 2009", tfds="cifar10"),
    "cifar100": Spec(100, (32, 32, 3), 50_000, 10_000, "Krizhevsky 2009", tfds="cifar100"),
    "mnist": Spec(10, (28, 28, 1), 60_000, 10_000, "LeCun et al. 1998", tfds="mnist"),
    "fashion_mnist": Spec(
        10, (28, 28, 1), 60_000, 10_000, "Xiao et al. 2017", tfds="fashion_mnist"
    ),
    "svhn": Spec(10, (32, 32, 3), 73_257, 26_032, "Netzer et al. 2011", tfds="svhn_cropped"),
    "imagenet2012": Spec(
        1000,
        None,
        1_281_167,
        50_000,
        "Russakovsky et al. 2015",
        tfds="imagenet2012",
        test_split="validation",
    ),
    "oxford_iiit_pet": Spec(37, None, 3_680, 3_669, "Parkhi et al. 2012", tfds="oxford_iiit_pet"),
    "oxford_flowers102": Spec(
        102, None, 1_020, 6_149, "Nilsback & Zisserman 2008", tfds="oxford_flowers102"
    ),
    "synthetic_cifar": Spec(
        10,
        (32, 32, 3),
        50_000,
        1_000,
        "noise in the shape of CIFAR-10, to measure speed",
        embedded=True,
        synthetic=True,
    ),
    "synthetic_imagenet": Spec(
        1000,
        (224, 224, 3),
        1_281,
        50,
        "noise in the shape of ImageNet, a thousandth of its size, to measure speed",
        embedded=True,
        synthetic=True,
    ),
}


def invalid_name(name: str) -> str | None:
    """Returns what is wrong with a dataset's name, or None if it is valid."""
    if name in DATASETS or name.startswith(USER_DATA):
        return None
    near = difflib.get_close_matches(name, DATASETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(DATASETS)}"
    return f"no dataset {name!r}; {hint} (your own data: tfds:NAME, folder:PATH, npz:PATH)"
