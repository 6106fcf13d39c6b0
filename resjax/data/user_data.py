"""User data: a folder of image files, or a file of NumPy arrays.

Without a test part, the last fifth of each class becomes the test split, in the order of file names
or rows, so that neighbors (frames of a video, digits by one writer) mostly stay together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resjax.data.examples import DataError, Example, Source, Split, array_source
from resjax.data.image_files import Skipped, find_layout, image_files, read_image
from resjax.data.npz import read_npz
from resjax.errors import first_few
from resjax.text import printable

ARRAYS = ("x_train", "y_train", "x_test", "y_test", "images", "labels", "class_names")
HELD_OUT = "the last fifth of each class is the test split"


@dataclass(frozen=True)
class FileExamples:
    """Examples of image files."""

    root: Path
    files: Sequence[str]  # relative to root
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        path = self.root / self.files[index]
        return Example(read_image(path), {"label": self.labels[index]}, str(path))


def open_folder(root: Path) -> Source:
    """Opens `folder:PATH`, whose classes are the sorted names of folders.

    `resjax.data.image_files` says which files are images of which class and part. Images are read
    as RGB. The parts test and validation are splits under these names and under those of their
    folders; the first that exists is the test split.

    Raises:
      DataError: the folder or its class folders do not exist, a class has no image, or a test class
        is not in the training part.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    skipped = Skipped(root)
    layout = find_layout(root, skipped)
    class_names = tuple(layout.parts.get("train", layout.parts.get("whole", {})))
    parts = {
        part: _examples(root, folders, class_names, skipped)
        for part, folders in layout.parts.items()
    }
    notes = (f"skipped {skipped}",) if str(skipped) else ()
    names = tuple(map(printable, class_names))
    if whole := parts.get("whole"):
        held_out = zip(("train", "test"), hold_out_fifth(np.array(whole.labels)), strict=True)
        splits = {
            split: FileExamples(
                root, [whole.files[i] for i in part], [whole.labels[i] for i in part]
            )
            for split, part in held_out
        }
        return Source(splits, names, None, notes=(HELD_OUT, *notes))
    folders = layout.folders
    notes = (f"parts: {', '.join(folders.values())}", *notes)
    splits = parts | {name: parts[part] for part, name in folders.items()}
    test = next((part for part in ("test", "validation") if part in parts), None)
    return Source(splits, names, None, test=test, notes=notes)


def _examples(
    root: Path, folders: Mapping[str, Path], class_names: Sequence[str], skipped: Skipped
) -> FileExamples:
    files: list[str] = []
    labels: list[int] = []
    for name, folder in folders.items():
        if name not in class_names:
            raise DataError(f"{folder}: the training part has no such class")
        found = [path.relative_to(root).as_posix() for path in image_files(folder, skipped)]
        if not found:
            raise DataError(f"{folder}: contains no image (.jpg, .png, ...)")
        files += found
        labels += [class_names.index(name)] * len(found)
    return FileExamples(root, files, labels)


def open_npz(path: Path) -> Source:
    """Opens `npz:PATH`, a file that `numpy.savez` wrote.

    It contains x_train, y_train, x_test and y_test, or images and labels. Images are uint8 of shape
    (n, h, w) or (n, h, w, c) with 1 or 3 channels, labels are integers from 0 of shape (n,). An
    array class_names of strings is optional.

    Raises:
      DataError: the file is missing or damaged, or its arrays are different.
    """
    arrays, found = read_npz(path, ARRAYS)
    class_names: Any = arrays.get("class_names")
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        splits = {
            name: _split(path, arrays, f"x_{name}", f"y_{name}") for name in ("train", "test")
        }
        if splits["train"].images.shape[1:] != splits["test"].images.shape[1:]:
            raise DataError(f"{path}: images in x_train and x_test differ in shape")
    elif {"images", "labels"} <= arrays.keys():
        whole = _split(path, arrays, "images", "labels")
        parts = zip(("train", "test"), hold_out_fifth(whole.labels), strict=True)
        splits = {name: whole[i] for name, i in parts}
    else:
        raise DataError(
            f"{path}: contains {first_few(found) or 'nothing'}; it needs x_train, y_train, x_test "
            "and y_test, or images and labels"
        )
    if class_names is not None and class_names.ndim != 1:
        raise DataError(f"{path}: class_names has shape {class_names.shape}; it must be a list")
    labels = np.unique(np.concatenate([split.labels for split in splits.values()]))
    classes = int(labels.max()) + 1 if class_names is None else len(class_names)
    if labels.max() >= classes:
        raise DataError(f"{path}: a label is {labels.max()}, but class_names has {classes}")
    if class_names is None and len(labels) < classes:
        missing = np.flatnonzero(labels != np.arange(len(labels)))[0]
        raise DataError(
            f"{path}: no label is {missing}, but one is {classes - 1}; number the classes from "
            "0, or name them in an array class_names"
        )
    class_names = range(classes) if class_names is None else class_names
    notes = () if "x_train" in arrays else (HELD_OUT,)
    source = array_source(str(path), splits, tuple(printable(str(name)) for name in class_names))
    return source._replace(notes=notes)


def _split(path: Path, arrays: Mapping[str, np.ndarray], x: str, y: str) -> Split:
    images, labels = arrays[x], arrays[y]
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(
            f"{path}: {x} is {arrays[x].dtype} of shape {arrays[x].shape}; it must be uint8 "
            "of shape (n, h, w) or (n, h, w, c) with 1 or 3 channels"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(images),):
        raise DataError(
            f"{path}: {y} is {labels.dtype} of shape {labels.shape}; it must be integers of "
            f"shape ({len(images)},)"
        )
    if not images.size:
        raise DataError(f"{path}: {x} is empty")
    if labels.max() > (largest := np.iinfo(np.int32).max):
        raise DataError(f"{path}: a label is {labels.max()}, more than {largest}")
    if labels.min() < 0:
        raise DataError(f"{path}: a label is {labels.min()}; classes are numbered from 0")
    return Split.labeled(images, labels.astype(np.int32))


def hold_out_fifth(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sorted indices of the first four fifths and of the last fifth of each class.

    A class of two to four examples holds out one, a class of one example none.
    """
    train, test = [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        cut = len(members) - max(len(members) // 5, min(1, len(members) - 1))
        train.append(members[:cut])
        test.append(members[cut:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))
