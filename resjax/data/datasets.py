"""Datasets by name: opened, to read their images one by one, or loaded, whole or in part.

Every kind of source offers its splits as sequences of examples, so TFDS's split expressions, such
as `train[:90%]`, work on all of them.
"""

from collections.abc import Sequence
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from resjax.data import DATASETS, KnownDataset, invalid_name, nuclei
from resjax.data.cache import cached_arrays
from resjax.data.coco_folders import open_coco
from resjax.data.decoding import as_image, decode, open_image
from resjax.data.examples import (
    LABEL,
    ArrayExamples,
    BadImageError,
    DataError,
    Example,
    Examples,
    NotPreparedError,
    Shape,
    Slices,
    Source,
    Split,
    Targets,
    array_source,
    select,
)
from resjax.data.mask_folders import open_masks
from resjax.data.placement import View, fit, whole
from resjax.data.prepared import PreparedExamples, data_dir, open_prepared
from resjax.data.scenes import CLASS_NAMES, scenes
from resjax.data.subsets import class_indices, sample_per_class, select_classes
from resjax.data.user_data import open_folder, open_npz
from resjax.text import printable, user_path

__all__ = [
    "BadImageError",
    "DataError",
    "Dataset",
    "Example",
    "Examples",
    "NotPreparedError",
    "OnBadImage",
    "OpenDataset",
    "Split",
    "load",
    "open_dataset",
    "prepared_folder",
]

OnBadImage = Literal["error", "skip"]


class Dataset(NamedTuple):
    """A dataset in memory."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    skipped: int = 0  # images that could not be decoded
    notes: tuple[str, ...] = ()  # of the source

    def __str__(self) -> str:
        """Returns one line: the number of images and classes, and the notes."""
        train, test, class_names, skipped, notes = self
        if skipped:
            notes = (*notes, f"skipped {skipped:,} images that cannot be decoded")
        return describe(len(train), len(test), len(class_names), notes)


class OpenDataset(NamedTuple):
    """A dataset whose images are read one by one."""

    train: Slices
    test: Slices
    class_names: tuple[str, ...]
    image_shape: Shape | None  # None if sizes differ or are not known yet
    notes: tuple[str, ...] = ()  # of the source
    targets: tuple[str, ...] = LABEL  # names of every example's targets
    objects: int = 0  # length of every example's `boxes` and `classes`

    def __str__(self) -> str:
        """Returns one line: the number of images and classes, and the notes."""
        return describe(len(self.train), len(self.test), len(self.class_names), self.notes)


def empty_targets(
    opened: OpenDataset, image_shape: Sequence[int], examples: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Returns zeros of the shapes and types that the targets of a batch have.

    Args:
      opened: the dataset.
      image_shape: (h, w, c) of a batch's images.
      examples: the leading axes.
    """
    known: dict[str, tuple[Sequence[int], type[np.generic]]] = {
        "label": ((), np.int32),
        "mask": (image_shape[:2], np.uint8),
        "boxes": ((opened.objects, 4), np.float32),
        "classes": ((opened.objects,), np.int32),
    }
    shapes = {name: known[name] for name in opened.targets}
    return {name: np.zeros((*examples, *shape), kind) for name, (shape, kind) in shapes.items()}


def describe(train: int, test: int, classes: int, notes: Sequence[str]) -> str:
    """Returns one line about a dataset."""
    counts = f"{train:,} training images, {test:,} test images, {classes:,} classes"
    return printable("; ".join((counts, *notes)))


def open_dataset(
    name: str,
    train_split: str | None = None,
    test_split: str | None = None,
    *,
    targets: Sequence[str] = (),
) -> OpenDataset:
    """Opens a dataset without reading an image.

    Args:
      name: a key of DATASETS, or `tfds:NAME`, `folder:PATH` and the like.
      train_split: a split expression, such as `train[:90%]`; None is the dataset's default.
      test_split: a split expression; None is the dataset's default.
      targets: those that the task needs; of `coco:PATH` they decide whether masks are drawn.

    Raises:
      NotPreparedError: the dataset is known but its files are not on this machine.
      DataError: the dataset or split does not exist, or its files are damaged.
    """
    source = _open_source(name, targets)
    test_split = test_split or source.test
    if test_split is None:
        raise DataError(
            f"{name} has no test split, only {', '.join(source.splits)}; set data.train_split and "
            f"data.test_split, such as train[:80%] and train[80%:]"
            f"{''.join(f' ({note})' for note in source.notes)}"
        )
    return OpenDataset(
        select(train_split or source.train, source.splits),
        select(test_split, source.splits),
        source.class_names,
        source.image_shape,
        source.notes,
        source.targets,
        source.objects,
    )


def load(
    name: str,
    train_split: str | None = None,
    test_split: str | None = None,
    *,
    targets: Sequence[str] = (),
    image_size: int | None = None,
    whole_images: bool = False,
    on_bad_image: OnBadImage = "error",
    classes: Sequence[int | str] = (),
    per_class: int | None = None,
    subset_seed: int = 0,
) -> Dataset:
    """Loads a dataset, or a subset of it, into memory.

    Images decoded from a prepared dataset are cached in its folder.

    Args:
      name: a key of DATASETS, or `tfds:NAME`, `folder:PATH` and the like.
      train_split: a split expression, such as `train[:90%]`; None is the dataset's default.
      test_split: a split expression; None is the dataset's default.
      targets: those that the task needs, as in `open_dataset`.
      image_size: side in pixels of the square to which images are resized and cropped.
      whole_images: pad the images to squares instead of cropping them; needs `image_size`.
      on_bad_image: raise an error for an image that cannot be decoded, or skip and count it.
      classes: the classes to select, as `subsets.class_indices` takes them, renumbered in this
        order; () selects all.
      per_class: training examples to draw from each class; None is all.
      subset_seed: of that draw.

    Raises:
      NotPreparedError: the dataset is known but its files are not on this machine.
      DataError: the dataset, split or class does not exist; its files are damaged; a class has
        fewer than `per_class` examples; or images differ in size and `image_size` is None.
    """
    opened = open_dataset(name, train_split, test_split, targets=targets)
    class_names = opened.class_names
    if (classes or per_class is not None) and "label" not in opened.targets:
        raise DataError(
            "data.classes and data.per_class choose images by their label, but the images of "
            f"{name} have {' and '.join(opened.targets)} instead"
        )
    selected = class_indices(name, class_names, classes)
    channels = opened.image_shape[2] if opened.image_shape else 3
    view = View(whole if whole_images else fit, image_size) if image_size else None
    train, test = (
        _concatenate([_read(*part, channels, view, on_bad_image) for part in slices.parts])
        for slices in (opened.train, opened.test)
    )
    read, expected = len(train) + len(test), len(opened.train) + len(opened.test)
    _require_same_size(f"{name}: the test split", test.images[0], train.images)
    notes = opened.notes
    if selected:
        train, test = (select_classes(part, selected, class_names) for part in (train, test))
        class_names = tuple(class_names[index] for index in selected)
        notes = (f"data.classes are {', '.join(map(repr, class_names))}", *notes)
    if per_class is not None:
        train = sample_per_class(train, per_class, subset_seed, class_names)
    return Dataset(train, test, class_names, expected - read, notes)


def prepared_folder(slices: Slices) -> Path | None:
    """Returns the folder of the prepared dataset that holds all examples, or None."""
    folders = {getattr(examples, "folder", None) for examples, _, _ in slices.parts}
    return folders.pop() if len(folders) == 1 else None


def _open_source(name: str, targets: Sequence[str]) -> Source:
    if why := invalid_name(name):
        raise DataError(why)
    kind, _, rest = name.partition(":")
    if kind == "folder":
        return open_folder(user_path(rest))
    if kind == "npz":
        return open_npz(user_path(rest))
    if kind == "masks":
        return open_masks(user_path(rest))
    if kind == "coco":
        return open_coco(user_path(rest), targets)
    if name == "digits":
        return digits()
    if name == "scenes":
        return digit_scenes()
    if name == "nuclei":
        return array_source("nuclei", nuclei.read_tiles(), nuclei.CLASS_NAMES)
    info = DATASETS.get(name)
    if info and info.synthetic:
        return synthetic(name, info)
    try:
        return (
            open_prepared(info.tfds, name, info.test_split) if info else open_prepared(rest, name)
        )
    except NotPreparedError as error:
        embedded = ", ".join(
            key for key, info in DATASETS.items() if not info.tfds and not info.extra
        )
        raise NotPreparedError(
            f"dataset {name!r} is not prepared in {data_dir()}: run `resjax data prepare {name}`; "
            f"embedded: {embedded}"
        ) from error


def _read(
    examples: Examples,
    start: int,
    stop: int,
    channels: int,
    view: View | None,
    on_bad_image: OnBadImage,
) -> Split:
    if isinstance(examples, ArrayExamples) and not view:
        return examples.split[start:stop]

    def decoded() -> Split:
        part = Slices(((examples, start, stop),))
        return _decode_all(part, channels, view, on_bad_image)

    if not isinstance(examples, PreparedExamples):
        return decoded()
    size = "original" if view is None else f"{view.side}{'-whole' * (view.place is whole)}"
    key = f"{examples.split}-{start}-{stop}-{size}-{on_bad_image}"
    stored = {"images": "image", "labels": "label"}  # older than the names in a batch

    def arrays() -> dict[str, np.ndarray]:
        names = {name: key for key, name in stored.items()}
        return {names.get(name, name): array for name, array in decoded().arrays.items()}

    read = cached_arrays(examples.folder, key, arrays)
    read = {stored.get(key, key): array for key, array in read.items()}
    return Split(read.pop("image"), read)


def _concatenate(splits: Sequence[Split]) -> Split:
    if len(splits) == 1:
        return splits[0]
    names = splits[0].targets
    targets = {name: np.concatenate([each.targets[name] for each in splits]) for name in names}
    return Split(np.concatenate([each.images for each in splits]), targets)


def _decode_all(
    examples: Examples, channels: int, view: View | None, on_bad_image: OnBadImage
) -> Split:
    arrays: dict[str, np.ndarray] = {}
    count, bad = 0, None
    for index in range(len(examples)):
        try:
            example = examples[index]
            pixels, targets = _view(example, channels, view)
            read = {"image": pixels, **targets}
        except BadImageError as error:
            if on_bad_image == "error":
                raise
            bad = error
            continue
        for name, value in read.items():
            if not count:
                kind = getattr(value, "dtype", np.int32)  # a label is a Python integer
                arrays[name] = np.empty((len(examples), *np.shape(value)), kind)
            if name == "image":
                _require_same_size(example.origin, value, arrays[name])
            arrays[name][count] = value
        count += 1
    if not count:
        raise DataError(f"none of {len(examples):,} images can be decoded; the last: {bad}")
    images = arrays.pop("image")[:count]
    return Split(images, {name: array[:count] for name, array in arrays.items()})


def _view(
    example: Example, channels: int, view: View | None
) -> tuple[UInt8[np.ndarray, "h w c"], Targets]:
    image, targets, origin = example
    if view is None:
        return decode(image, channels, origin) if isinstance(image, bytes) else image, targets
    opened = open_image(image, channels, origin) if isinstance(image, bytes) else as_image(image)
    return view.targeted(opened, targets, np.random.default_rng(0))


def _require_same_size(origin: str, pixels: np.ndarray, others: np.ndarray) -> None:
    if pixels.shape != others.shape[1:]:
        sizes = ["x".join(map(str, shape)) for shape in (pixels.shape[:2], others.shape[1:3])]
        raise DataError(
            f"{origin} has {sizes[0]} pixels, others {sizes[1]}: set data.image_size to resize all "
            "images, or stream them with data.feed=stream"
        )


def digits() -> Source:
    """Returns scikit-learn's digits."""
    return array_source("digits", digit_splits(), tuple(map(str, range(10))))


def digit_splits() -> dict[str, Split]:
    """Returns scikit-learn's 1,797 grayscale digits of 8x8 pixels by split.

    The file is ordered by writer and its last fifth is the test split, so most test digits are by
    writers that training does not see.
    """
    # Importing scikit-learn would take a second.
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(file), delimiter=",", dtype=np.int32)  # 64 pixels from 0 to 16, a label
    images = np.round(table[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = np.ascontiguousarray(table[:, -1])
    count = DATASETS["digits"].train_images
    return {
        "train": Split.labeled(images[:count], labels[:count]),
        "test": Split.labeled(images[count:], labels[count:]),
    }


@cache
def digit_scenes() -> Source:
    """Returns the scenes of `resjax.data.scenes`, drawn once per process: they take two seconds."""
    info, shown = DATASETS["scenes"], digit_splits()
    splits = {
        "train": scenes(shown["train"], info.train_images, seed=0),
        "test": scenes(shown["test"], info.test_images, seed=1),
    }
    return array_source("scenes", splits, CLASS_NAMES)


def synthetic(name: str, info: KnownDataset) -> Source:
    """Returns noise in a dataset's shape, always the same, to measure speed."""
    generator = np.random.default_rng(0)
    assert info.image_shape

    def split(shape: Shape, count: int) -> Split:
        images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
        return Split.labeled(images, generator.integers(0, info.classes, count, dtype=np.int32))

    splits = {
        "train": split(info.image_shape, info.train_images),
        "test": split(info.image_shape, info.test_images),
    }
    return array_source(name, splits, tuple(map(str, range(info.classes))))
