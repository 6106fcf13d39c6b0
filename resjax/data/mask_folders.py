"""Images with masks in two folders: `masks:PATH`.

PATH contains `images` and `masks` (or `annotations`, or `labels`), whose files have equal names but
for the suffix, at any depth. The parts training, test and validation are folders in both, or
contain both. The pixels of a mask are numbers of classes from 0; 255 is void. A file `classes.txt`
names the classes, one per line; without it, all masks are read to count their values.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from resjax.data.decoding import decode_mask, upright_size
from resjax.data.examples import MASK, VOID, DataError, Example, Source
from resjax.data.image_files import (
    HELD_OUT,
    NO_MASK,
    NO_PICTURE,
    Skipped,
    file_version,
    folders_in,
    image_files,
    parts_among,
    read_image,
    training_share,
)
from resjax.text import printable

IMAGES, MASKS = ("images",), ("masks", "annotations", "labels")
CLASSES = "classes.txt"


@dataclass(frozen=True)
class MaskedExamples:
    """Image files with a mask each."""

    root: Path
    pairs: Sequence[tuple[str, str]]  # image and mask, relative to root
    classes: int

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        image, mask = (self.root / name for name in self.pairs[index])
        content = read_image(image)
        pixels = decode_mask(read_image(mask), str(mask))
        require_mask_fits(pixels, content, str(mask), str(image), self.classes)
        return Example(content, {"mask": pixels}, str(image))


def require_mask_fits(
    mask: UInt8[np.ndarray, "h w"], image: bytes, origin: str, image_origin: str, classes: int
) -> None:
    """Checks that a mask has the size of its image, and no value beyond the classes.

    Raises:
      BadImageError: `image` is not an image.
      DataError: the mask has another size, or such a value.
    """
    width, height = upright_size(image, image_origin)
    if mask.shape != (height, width):
        raise DataError(
            f"{origin}: is {mask.shape[1]}x{mask.shape[0]} pixels, its image {width}x{height}"
        )
    found = values(mask)
    if (beyond := np.flatnonzero(found[classes:VOID])).size:
        raise DataError(
            f"{origin}: has a pixel of class {classes + beyond[0]}, but there are {classes} "
            f"classes, from 0; {VOID} is void"
        )


def values(mask: UInt8[np.ndarray, "h w"]) -> Bool[np.ndarray, "256"]:
    """Returns which values occur in a mask."""
    return np.bincount(mask.ravel(), minlength=VOID + 1) > 0


def open_masks(root: Path) -> Source:
    """Opens `masks:PATH`.

    Raises:
      DataError: a folder is missing, no image has a mask, or the classes are not numbered from 0.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    skipped = Skipped(root)
    folders = _folders_of_parts(root)
    pairs = {part: _pairs(root, *both, skipped) for part, both in folders.items()}
    notes = (f"skipped {skipped}",) if str(skipped) else ()
    names = _class_names(root, [mask for part in pairs.values() for _, mask in part])
    if held := pairs.get("whole"):
        cut = training_share(root, len(held))
        pairs, notes = {"train": held[:cut], "test": held[cut:]}, (HELD_OUT, *notes)
    splits = {part: MaskedExamples(root, found, len(names)) for part, found in pairs.items()}
    test = next((part for part in ("test", "validation") if part in splits), None)
    return Source(splits, names, None, test=test, notes=notes, targets=MASK)


def _folders_of_parts(root: Path) -> dict[str, tuple[Path, Path]]:
    """Returns the folders of images and of masks, by part or only `whole`."""
    if both := _both(root):
        images, masks = (parts_among(folders_in(folder)) for folder in both)
        if "train" not in images:
            return {"whole": both}
        for part, folder in images.items():
            if part not in masks:
                raise DataError(f"{both[1]}: contains no folder {folder.name}")
        return {part: (folder, masks[part]) for part, folder in images.items()}
    parts = parts_among(folders_in(root)).items()
    found = {part: both for part, folder in parts if (both := _both(folder))}
    if "train" not in found:
        raise DataError(
            f"{root}: contains no folders images and masks, nor a folder train that contains them"
        )
    return found


def _both(root: Path) -> tuple[Path, Path] | None:
    found = {path.name.lower(): path for path in folders_in(root)}
    images, masks = (
        next((found[name] for name in names if name in found), None) for names in (IMAGES, MASKS)
    )
    return (images, masks) if images and masks else None


def _pairs(root: Path, images: Path, masks: Path, skipped: Skipped) -> list[tuple[str, str]]:
    found = [_by_stem(folder, skipped) for folder in (images, masks)]
    for stem in sorted(found[0].keys() ^ found[1].keys()):
        has_image = stem in found[0]
        skipped.add(NO_MASK if has_image else NO_PICTURE, found[not has_image][stem])
    both = sorted(found[0].keys() & found[1].keys())
    if not both:
        raise DataError(
            f"{images}: no image has a mask of the same name, but for the suffix, in {masks}"
        )
    names = [
        {stem: path.relative_to(root).as_posix() for stem, path in part.items()} for part in found
    ]
    return [(names[0][stem], names[1][stem]) for stem in both]


def _by_stem(folder: Path, skipped: Skipped) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in image_files(folder, skipped):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in files:
            raise DataError(f"{files[stem]} and {path.name} have one name; rename one")
        files[stem] = path
    return files


def _class_names(root: Path, masks: Iterable[str]) -> tuple[str, ...]:
    file = root / CLASSES
    if file.is_file():
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read: {error}") from error
        names = tuple(printable(line.strip()) for line in lines if line.strip())
        if not 1 < len(names) <= VOID:
            raise DataError(f"{file}: names {len(names)} classes; there must be 2 to {VOID}")
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{file}: names the class {twice[0]!r} twice")
        return names
    paths = [root / mask for mask in masks]
    stamps = [(path, *file_version(path)) for path in paths]
    found = np.flatnonzero(_values_of_all(tuple(stamps)))
    known = found[found != VOID]
    missing = np.setdiff1d(np.arange(max(known, default=0)), known)
    hint = f"number the classes from 0, or name them in {file}"
    if len(missing):
        raise DataError(f"{root}: no pixel is {missing[0]}, but one is {known[-1]}; {hint}")
    if len(known) < 2:
        shown = ", ".join(map(str, found))
        raise DataError(f"{root}: the pixels of all masks are {shown}; {VOID} is void; {hint}")
    return tuple(map(str, known))


@functools.lru_cache(maxsize=4)
def _values_of_all(stamps: tuple[tuple[Path, int, int], ...]) -> Bool[np.ndarray, "256"]:
    """Returns which values occur in any mask, once per version: all masks are decoded."""
    found = np.zeros(VOID + 1, bool)
    for path, _, _ in stamps:
        found |= values(decode_mask(read_image(path), str(path)))
    return found
