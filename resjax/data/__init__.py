"""Datasets, batches and augmentation.

This module does not import JAX, so that a misspelled dataset name is reported at once.

User data has names too: `tfds:NAME` is a dataset that TFDS prepared, `folder:PATH` a folder of
image files with one subfolder per class, `npz:PATH` a file of NumPy arrays, `masks:PATH` a folder
of images and masks, `coco:PATH` one of images and boxes in COCO's format.
"""

import difflib
from typing import NamedTuple

USER_DATA = ("tfds:", "folder:", "npz:", "masks:", "coco:")  # prefixes of names


class KnownDataset(NamedTuple):
    """Facts about a dataset that are known before it is read."""

    classes: int
    image_shape: tuple[int, int, int] | None  # height, width, channels; None if sizes differ
    train_images: int
    test_images: int
    tfds: str = ""  # its name in TFDS, if it has to be prepared
    test_split: str = "test"  # name of the split to test on
    synthetic: bool = False  # noise, to measure speed
    extra: str = ""  # of resjax, which installs the package that contains it


DATASETS = {
    # Handwritten digits, part of scikit-learn (Alpaydin & Kaynak 1998, UCI).
    "digits": KnownDataset(10, (8, 8, 1), 1_437, 360),
    # Scenes of these digits, with masks and boxes: resjax.data.scenes
    "scenes": KnownDataset(11, (64, 64, 1), 2_000, 400),
    # Tiles of an image of cells, with masks and boxes (Caicedo et al. 2019): resjax.data.nuclei
    "nuclei": KnownDataset(2, (64, 64, 1), 48, 16, extra="nuclei"),
    # Krizhevsky 2009
    "cifar10": KnownDataset(10, (32, 32, 3), 50_000, 10_000, "cifar10"),
    "cifar100": KnownDataset(100, (32, 32, 3), 50_000, 10_000, "cifar100"),
    # LeCun et al. 1998
    "mnist": KnownDataset(10, (28, 28, 1), 60_000, 10_000, "mnist"),
    # Xiao et al. 2017
    "fashion_mnist": KnownDataset(10, (28, 28, 1), 60_000, 10_000, "fashion_mnist"),
    # Netzer et al. 2011
    "svhn": KnownDataset(10, (32, 32, 3), 73_257, 26_032, "svhn_cropped"),
    # Russakovsky et al. 2015
    "imagenet2012": KnownDataset(1000, None, 1_281_167, 50_000, "imagenet2012", "validation"),
    # Parkhi et al. 2012
    "oxford_iiit_pet": KnownDataset(37, None, 3_680, 3_669, "oxford_iiit_pet"),
    # Nilsback & Zisserman 2008
    "oxford_flowers102": KnownDataset(102, None, 1_020, 6_149, "oxford_flowers102"),
    # The shape of CIFAR-10, and that of ImageNet with a thousandth of its images.
    "synthetic_cifar": KnownDataset(10, (32, 32, 3), 50_000, 1_000, synthetic=True),
    "synthetic_imagenet": KnownDataset(1000, (224, 224, 3), 1_281, 50, synthetic=True),
}


def invalid_name(name: str) -> str | None:
    """Returns what is wrong with a dataset's name, or None if it is valid."""
    if name in DATASETS:
        return None
    if name.startswith(USER_DATA):
        kind, _, which = name.partition(":")
        return None if which else f"{name} lacks {'a name' if kind == 'tfds' else 'a path'}"
    near = difflib.get_close_matches(name, DATASETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(DATASETS)}"
    own = ", ".join(f"{kind}{'NAME' if kind == 'tfds:' else 'PATH'}" for kind in USER_DATA)
    return f"no dataset {name!r}; {hint} (your own data: {own})"
