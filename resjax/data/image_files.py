"""Finds the images in a tree of folders, and their classes and parts.

A file is an image if its suffix says so (.jpg, .png, ..., in any case), at any depth below the
folder of its class. Hidden files and folders and those of file managers and NAS systems are
skipped. Links are followed, and each folder is read once, so a loop of links ends.

Three layouts of classes and parts are known:

- `cat`, `dog`: one folder per class;
- `train/cat`, `train/dog`, `test/cat`, ...: parts, each of which contains classes;
- `cat/train`, `cat/test`, `dog/train`, ...: classes, each of which contains all parts.

Parts are recognized in any case, alone or followed by `set`, `data` or `images`: train, training;
test, testing; val, valid, validation. A folder with such a name is a class if it contains no folder
but images, and a folder without such a name lies beside it.
"""

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from resjax.data.examples import BadImageError, DataError
from resjax.errors import first_few

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
)
SYSTEM_NAMES = frozenset(  # of macOS, Windows, Synology, QNAP, Linux and Python; in lower case
    (
        *("__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
        *("@eadir", "#recycle", "#snapshot", "@recycle", "lost+found", "__pycache__"),
    )
)
_PART = re.compile(
    r"(?:(train|test)(?:ing)?|val(?:id(?:ation)?)?)[ _.-]*(?:set|data|images?)?", re.IGNORECASE
)
PARTS = ("train", "test", "validation")
HELD_OUT = "the last fifth of the images is the test split"
SHOWN = 5  # names per reason
FAULTS_OF_A_FILE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP),
    *(errno.ENXIO, errno.ENAMETOOLONG),
)


class Skipped:
    """The files and folders of a tree that were left out, by reason."""

    def __init__(self, root: Path):
        self._root = root
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, path: str | Path) -> None:
        self._names.setdefault(reason, []).append(os.path.relpath(path, self._root))

    def add_entry(self, entry: "os.DirEntry[str]", reason: str) -> None:
        """Adds an entry as hidden, as no image by its name, or else for `reason`."""
        if not _is_hidden(entry.name):
            self.add(reason if _is_image(entry.name) else NO_IMAGE, entry.path)
        elif entry.is_dir() or _is_image(entry.name):  # nobody misses .DS_Store
            self.add(HIDDEN, entry.path)

    def __str__(self) -> str:
        """Returns one line, such as "hidden: cat/.cache; not an image: cat/a.txt, cat/b.txt"."""
        reasons = (
            f"{reason}: {first_few(sorted(names), SHOWN)}" for reason, names in self._names.items()
        )
        return "; ".join(reasons)


HIDDEN = "hidden or of the system"
LINKED = "a link to a folder that is read already"
NO_CLASS = "an image in no class"
NO_MASK = "an image without a mask"
NO_PICTURE = "a mask without an image"
NO_IMAGE = "not an image by its suffix"
NO_PART = "beside the parts"
SPECIAL = "neither a file nor a folder"


class Layout(NamedTuple):
    """The folders of classes by part and class: `train`, `test`, `validation`, or only `whole`."""

    parts: Mapping[str, Mapping[str, Path]]
    folders: Mapping[str, str]  # the names of the parts' own folders


def find_layout(root: Path, skipped: Skipped) -> Layout:
    """Returns the folders in `root` that hold the images of each part and class.

    Raises:
      DataError: there is no folder, or the names of the folders contradict each other.
    """
    folders = _require_folders(root, skipped)
    parts = parts_among(folders)
    without_part = [path for path in folders if path not in parts.values()]
    if "train" in parts and (folders_in(parts["train"]) or not without_part):
        for path in without_part:
            skipped.add(NO_PART, path)
        inner = {part: _require_folders(path, skipped) for part, path in parts.items()}
        return Layout(
            {part: {path.name: path for path in paths} for part, paths in inner.items()},
            {part: path.name for part, path in parts.items()},
        )
    if parts and not without_part:
        raise DataError(f"{root}: contains {first_few(p.name for p in folders)}, but no train")
    parts_of = {path: parts_among(folders_in(path)) for path in folders}
    divided = {path: inner for path, inner in parts_of.items() if "train" in inner}
    if not divided:
        return Layout({"whole": {path.name: path for path in folders}}, {})
    first = next(iter(divided))
    if len(folders) == 1:
        raise DataError(f"{root}: contains only {first.name}; did you mean folder:{first}?")
    if whole := [path for path in folders if path not in divided]:
        raise DataError(f"{first} contains {divided[first]['train'].name}, but {whole[0]} does not")
    names = {part: path.name for inner in divided.values() for part, path in inner.items()}
    classes = {
        part: {path.name: inner[part] for path, inner in divided.items() if part in inner}
        for part in names
    }
    return Layout(classes, names)


def part_of(name: str) -> str | None:
    """Returns the part that a folder's name means: `train`, `test`, `validation` or None."""
    match = _PART.fullmatch(name)
    return (match[1] or "validation").lower() if match else None


def parts_among(folders: Iterable[Path]) -> dict[str, Path]:
    """Returns the folders that are parts, in the order of `PARTS`.

    Raises:
      DataError: two folders are the same part.
    """
    parts: dict[str, Path] = {}
    for path in folders:
        if (part := part_of(path.name)) is None:
            continue
        if part in parts:
            raise DataError(f"{path} and {parts[part].name} are both named {part}; rename one")
        parts[part] = path
    return dict(sorted(parts.items(), key=lambda pair: PARTS.index(pair[0])))


def _require_folders(root: Path, skipped: Skipped) -> list[Path]:
    if folders := folders_in(root, skipped):
        return folders
    raise DataError(f"{root}: contains no folder; put the images of each class into one")


def folders_in(root: Path, skipped: Skipped | None = None) -> list[Path]:
    """Returns the visible folders in a folder in the order of their names."""
    found = []
    for entry in _entries(root):
        visible = not _is_hidden(entry.name)
        if visible and entry.is_dir():
            found.append(Path(entry.path))
        elif skipped:
            skipped.add_entry(entry, NO_CLASS)
    return found


def image_files(folder: Path, skipped: Skipped) -> list[Path]:
    """Returns the images in a folder, at any depth, in the order of their paths.

    Raises:
      DataError: a folder cannot be read.
    """
    seen = {_identity(os.stat(path)) for path in (folder, *folder.absolute().parents)}
    return sorted(_walk(folder, seen, skipped), key=Path.as_posix)  # not component by component


def training_share(origin: Path, images: int) -> int:
    """Returns the number of training images if the last fifth of all is the test split.

    Raises:
      DataError: there is only one image; `origin` is its place in the message.
    """
    if images == 1:
        raise DataError(f"{origin}: one image is too few for a training and a test split")
    return images - max(images // 5, 1)


def file_version(path: Path) -> tuple[int, int]:
    """Returns the time of a file's last change, in nanoseconds, and its size.

    Raises:
      DataError: the file is missing or cannot be read.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return status.st_mtime_ns, status.st_size


def read_image(path: Path) -> bytes:
    """Returns the content of a file.

    Raises:
      BadImageError: it is missing, may not be read, or is not a file; a pipe would block forever.
      DataError: the disk fails.
    """

    def without_blocking(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)

    try:
        with open(path, "rb", opener=without_blocking) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadImageError(f"{path}: cannot be read: it is not a file")
            return file.read()
    except OSError as error:
        kind = BadImageError if error.errno in FAULTS_OF_A_FILE else DataError
        raise kind(f"{path}: cannot be read: {error.strerror}") from error


def _walk(folder: Path, seen: set[tuple[int, int]], skipped: Skipped) -> Iterator[Path]:
    for entry in _entries(folder):
        visible = not _is_hidden(entry.name)
        if visible and entry.is_dir():
            if (identity := _identity(entry.stat())) in seen:
                skipped.add(LINKED, entry.path)
            else:
                seen.add(identity)
                yield from _walk(Path(entry.path), seen, skipped)
        # A broken link is an image that cannot be read.
        elif visible and _is_image(entry.name) and (entry.is_file() or not os.path.exists(entry)):
            yield Path(entry.path)
        else:
            skipped.add_entry(entry, SPECIAL)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
