"""Datasets, the feeds that draw batches from them, and augmentation.

Imports no JAX, so that a misspelt dataset is refused at once.

Data of one's own has a name too: `tfds:NAME` is any image-classification set that TFDS prepared,
`folder:PATH` a folder of image files with one folder a class, `npz:PATH` a file of NumPy arrays.
"""

import difflib
from typing import NamedTuple

OWN = ("tfds:", "folder:", "npz:")


class Spec(NamedTuple):
    """What is known of a dataset before it is read."""

    classes: int
    image_shape: tuple[int, int, int] | None  # height, width, channels; None: sizes differ
    train_images: int
    test_images: int
    source: str
    embedded: bool = False  # comes with the installation
    synthetic: bool = False  # no data, but noise of the right shape
    tfds: str = ""  # its name there
    test_split: str = "test"  # what is its test here; such as ImageNet's validation split


DATASETS = {
    "digits": Spec(
        10,
        (8, 8, 1),
        1_437,
        360,
        "handwritten digits (Alpaydin & Kaynak 1998, UCI), as scikit-learn carries them",
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


def why_unknown(name: str) -> str | None:
    """What is wrong with a dataset's name; None where it is in DATASETS or names own data."""
    if name in DATASETS or name.startswith(OWN):
        return None
    near = difflib.get_close_matches(name, DATASETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(DATASETS)}"
    return f"no dataset {name!r}; {hint} (own data: tfds:NAME, folder:PATH, npz:PATH)"
