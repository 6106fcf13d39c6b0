"""Data of one's own: a folder of image files, or a file of NumPy arrays.

Where there is no test part, the last fifth of every class is the test, in the order of the file
names or of the array: neighbours (frames of a video, digits of one hand) stay on one side.
"""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resjax.data.examples import DataError, Example, Source, Split, in_one_line, of_arrays

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)
TEST_NAMES = ("test", "val", "validation")


@dataclass(frozen=True)
class FileExamples:
    """Image files and their labels."""

    root: Path
    files: Sequence[str]  # below the root
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        path = self.root / self.files[index]
        try:
            return Example(path.read_bytes(), self.labels[index], str(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def open_folder(root: Path) -> Source:
    """Opens `folder:PATH`: one folder a class, whose sorted names are the classes.

    PATH holds either the classes' folders, or `train` and `test` (or `val`, or `validation`) which
    hold them. Images are files by their names (.jpg, .png, ...), in folders below too; others are
    passed over. They count as RGB, grey ones too.

    Raises:
      DataError: no such folder, no classes in it, a class without an image, or a test class that
        is not in the training part.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    inside = _folders(root)
    if "train" not in inside:
        return _without_parts(root, inside)
    class_names = _folders(root / "train")
    names = ["train", *(name for name in TEST_NAMES if name in inside)]
    splits = {name: _part(root / name, class_names) for name in names}
    return Source(splits, tuple(class_names), None, test=names[1] if names[1:] else None)


def _part(root: Path, class_names: Sequence[str]) -> FileExamples:
    classes = _folders(root)
    if strange := sorted(set(classes) - set(class_names)):
        raise DataError(f"{root / strange[0]}: the training part has no such class")
    numbers = [class_names.index(name) for name in classes]
    files, labels = _images(root, classes)
    return FileExamples(root, files, [numbers[label] for label in labels])


def _without_parts(root: Path, classes: Sequence[str]) -> Source:
    files, labels = _images(root, classes)
    splits = {
        name: FileExamples(root, [files[at] for at in part], [labels[at] for at in part])
        for name, part in zip(("train", "test"), last_fifth(np.array(labels)), strict=True)
    }
    return Source(splits, tuple(classes), None)


def _folders(root: Path) -> list[str]:
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    classes = [name for name in names if not name.startswith(".")]
    if not classes:
        raise DataError(f"{root}: holds no folder; it takes one a class, with its images")
    return classes


def _images(root: Path, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = [path.relative_to(root).as_posix() for path in image_files(root / name)]
        if not found:
            raise DataError(f"{root / name}: holds no image (.jpg, .png, ...)")
        files += found
        labels += [label] * len(found)
    return files, labels


def image_files(folder: Path) -> list[Path]:
    """Images by their names, in the folder and those below, sorted."""
    images = (
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    return sorted(images, key=Path.as_posix)  # paths themselves sort part by part


def open_npz(path: Path) -> Source:
    """Opens `npz:PATH`, a file that `numpy.savez` wrote.

    It holds x_train, y_train, x_test and y_test, or else images and labels: images of uint8 as
    (n, h, w) or (n, h, w, c) with one channel or three, labels as n whole numbers from 0. An array
    class_names of strings is optional.

    Raises:
      DataError: no such file, damaged, or the arrays are not of that kind.
    """
    arrays = _arrays(path)
    given = arrays.get("class_names")
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        splits = {
            name: _split(path, arrays, f"x_{name}", f"y_{name}") for name in ("train", "test")
        }
        if splits["train"].images.shape[1:] != splits["test"].images.shape[1:]:
            raise DataError(f"{path}: images in x_train and x_test differ in shape")
    elif {"images", "labels"} <= arrays.keys():
        whole = _split(path, arrays, "images", "labels")
        halves = zip(("train", "test"), last_fifth(whole.labels), strict=True)
        splits = {name: Split(whole.images[at], whole.labels[at]) for name, at in halves}
    else:
        raise DataError(
            f"{path}: holds {', '.join(arrays) or 'nothing'}; it takes x_train, y_train, x_test "
            "and y_test, or images and labels"
        )
    labels = np.concatenate([split.labels for split in splits.values()])
    classes = len(given) if given is not None else int(labels.max()) + 1
    if labels.min() < 0:
        raise DataError(f"{path}: a label is {labels.min()}; classes are numbered from 0")
    if labels.max() >= classes:
        raise DataError(f"{path}: a label is {labels.max()}, but class_names has {classes}")
    if given is None and len(missing := np.setdiff1d(np.arange(classes), labels)):
        raise DataError(
            f"{path}: no label is {missing[0]}, but one is {classes - 1}; number the classes from "
            "0, or name them in an array class_names"
        )
    names = map(str, range(classes) if given is None else given)
    return of_arrays(str(path), splits, tuple(names))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return dict(arrays)
    # What NumPy raises for what is no archive, damaged, or holds Python objects.
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: cannot be read as an .npz file: {in_one_line(error)}") from error


def _split(path: Path, arrays: Mapping[str, np.ndarray], x: str, y: str) -> Split:
    images, labels = arrays[x], arrays[y]
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(
            f"{path}: {x} is {arrays[x].dtype} of shape {arrays[x].shape}; it takes uint8 as "
            "(n, h, w) or (n, h, w, c) with 1 or 3 channels"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(images),):
        raise DataError(
            f"{path}: {y} is {labels.dtype} of shape {labels.shape}; it takes whole numbers as "
            f"({len(images)},)"
        )
    if not len(images):
        raise DataError(f"{path}: {x} is empty")
    return Split(images, labels.astype(np.int32))


def last_fifth(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the first four fifths and of the last fifth of every class, each in order.

    A class of fewer than five gives one to the test, a class of one none.
    """
    train, test = [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        cut = len(members) - max(len(members) // 5, min(1, len(members) - 1))
        train.append(members[:cut])
        test.append(members[cut:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))
