"""Images with boxes or masks in the format of COCO (Lin et al. 2014): `coco:PATH`.

PATH contains `annotations/*.json` and folders of images, such as `train2017` or `images/train`; or
folders of parts with a `.json` file beside the images. Of the files of COCO itself only the
`instances` are read. The categories are sorted by id and numbered from 1; class 0 is the
background, no object. As in torchvision's recipe, annotations of crowds are left out, boxes are cut
at the border of the image, and boxes without area are left out. Images without objects stay.

Masks are drawn from the segmentations only for tasks that need them; crowds are void in them.
"""

import functools
import importlib.util
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from resjax.data.boxes import cut_boxes, padded_boxes
from resjax.data.coco_masks import Region, semantic_mask
from resjax.data.decoding import upright_size
from resjax.data.examples import BOXES, MASK, VOID, DataError, Example, Source
from resjax.data.image_files import (
    HELD_OUT,
    PARTS,
    file_version,
    folders_in,
    part_of,
    read_image,
    training_share,
)
from resjax.errors import first_few, one_line
from resjax.text import printable

BACKGROUND = "background"
DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class CocoExamples:
    """Image files with boxes or masks."""

    root: Path
    file: Path  # of annotations, for messages
    targets: tuple[str, ...]
    files: Sequence[str]  # relative to root
    sizes: Int[np.ndarray, "images 2"]  # width and height, to which the boxes belong
    ends: Int[np.ndarray, "images+1"]  # the boxes of image i are those from ends[i] to ends[i + 1]
    boxes: Float[np.ndarray, "objects 4"]
    classes: Int[np.ndarray, "objects"]
    room: int  # for the boxes of an image
    regions: Sequence[str]  # of each image, if there are masks: as in `_Annotations`
    labels: Mapping[int, int]  # the class of each category

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        path = self.root / self.files[index]
        content = read_image(path)
        size, expected = upright_size(content, str(path)), tuple(self.sizes[index].tolist())
        if size != expected:
            raise DataError(
                f"{path}: is {size[0]}x{size[1]} pixels, but its annotations are for an image of "
                f"{expected[0]}x{expected[1]}"
            )
        targets = {}
        if "mask" in self.targets:
            targets["mask"] = self._mask(index, *size)
        if "boxes" in self.targets:
            own = slice(self.ends[index], self.ends[index + 1])
            targets |= padded_boxes(self.boxes[own], self.classes[own], self.room)
        return Example(content, targets, str(path))

    def _mask(self, index: int, width: int, height: int) -> UInt8[np.ndarray, "h w"]:
        regions = [
            Region(
                f"{self.file}: annotation {number}",
                VOID if category is None else self.labels[category],
                segmentation,
            )
            for number, category, segmentation in json.loads(self.regions[index])
        ]
        return semantic_mask(regions, height, width)


class _Annotations(NamedTuple):
    """The images, boxes and regions of a file of annotations."""

    categories: Mapping[int, str]
    names: list[str]  # of image files
    sizes: Int[np.ndarray, "images 2"]  # width and height
    owners: Int[np.ndarray, "objects"]  # the image of each box, in ascending order
    boxes: Float[np.ndarray, "objects 4"]
    ids: Int[np.ndarray, "objects"]  # of each box's category
    crowds: int  # number of annotations of crowds
    empty: int  # number of boxes without area, which are left out
    cut: int  # number of boxes that extend beyond their image
    # One JSON list per image, if masks are wanted, of annotation number, category (null for a
    # crowd) and segmentation. JSON takes a fifth of the memory of Python's lists.
    regions: list[str]


def open_coco(root: Path, targets: Sequence[str] = ()) -> Source:
    """Opens `coco:PATH`.

    Args:
      root: the folder.
      targets: those that a task needs; masks are drawn if `mask` is among them, and boxes are left
        out if they are not but masks are.

    Raises:
      DataError: a folder, file or image is missing; a file is damaged, or names images or
        categories that it does not have; or masks cannot be drawn.
    """
    masks = "mask" in targets
    offered = MASK * masks + BOXES * ("boxes" in targets or not masks)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    files = _files(root)
    read = {part: _read(file, *file_version(file), masks) for part, file in files.items()}
    first = next(iter(files))
    categories = read[first].categories
    for part, found in read.items():
        for number, name in found.categories.items():
            if categories.get(number) != name:
                ours = categories.get(number)
                known = f"is {ours!r}" if ours is not None else "does not exist"
                raise DataError(
                    f"{files[part]}: category {number} is {name!r}; in {files[first].name} it "
                    f"{known}"
                )
    room = max(int(np.bincount(each.owners, minlength=1).max()) for each in read.values())
    room = max(room, 1) if "boxes" in offered else 0
    labels = {number: label for label, number in enumerate(sorted(categories), 1)}
    splits = {
        part: _examples(root, files[part], part, offered, found, labels, room)
        for part, found in read.items()
    }
    notes = _notes(read.values(), offered)
    names = (BACKGROUND, *(printable(categories[number]) for number in sorted(categories)))
    if whole := splits.pop("whole", None):
        cut = training_share(files[first], len(whole))
        splits = {"train": _slice(whole, 0, cut), "test": _slice(whole, cut, len(whole))}
        notes = (HELD_OUT, *notes)
    test = next((name for name in ("test", "validation") if name in splits), None)
    return Source(splits, names, None, test=test, notes=notes, targets=offered, objects=room)


def _files(root: Path) -> dict[str, Path]:
    """Returns the files of annotations by part, or only `whole`."""
    if (root / "annotations").is_dir():
        files = sorted((root / "annotations").glob("*.json"))
        files = [path for path in files if path.stem.startswith("instances")] or files
        if not files:
            raise DataError(f"{root / 'annotations'}: contains no .json file")
        named = [(_part_of_words(path.stem), path) for path in files]
    else:
        named = [
            (part, path)
            for folder in folders_in(root)
            if (part := part_of(folder.name))
            for path in sorted(folder.glob("*.json"))
        ] or [(None, path) for path in sorted(root.glob("*.json"))]
    if len(named) == 1:
        return {"whole": named[0][1]}
    parts: dict[str, Path] = {}
    for part, path in named:
        if part is None:
            raise DataError(f"{path}: its name contains none of {', '.join(PARTS)}")
        if part in parts:
            raise DataError(f"{path} and {parts[part].name} are both named {part}; remove one")
        parts[part] = path
    if "train" not in parts:
        raise DataError(
            f"{root}: contains no annotations of a training part, such as "
            "annotations/instances_train.json"
        )
    return {part: parts[part] for part in PARTS if part in parts}


def _part_of_words(stem: str) -> str | None:
    words = stem.replace("-", "_").replace(".", "_").split("_")
    return next((part for word in words[::-1] if (part := part_of(_without_year(word)))), None)


def _without_year(word: str) -> str:
    return word.rstrip("0123456789")


@functools.lru_cache(maxsize=4)
def _read(path: Path, modified: int, size: int, masks: bool) -> _Annotations:
    """Reads a file of annotations, once per version: COCO's own takes ten seconds."""
    try:
        content = json.loads(path.read_bytes())
        categories = {int(each["id"]): str(each["name"]) for each in content["categories"]}
        images = {each["id"]: index for index, each in enumerate(content["images"])}
        names = [str(each["file_name"]) for each in content["images"]]
        sizes = np.array(
            [(int(each["width"]), int(each["height"])) for each in content["images"]], np.int32
        )
        annotations = content.get("annotations", [])
        kept = [each for each in annotations if not each.get("iscrowd", 0)]
        fault = next(filter(None, (_fault(each, images, categories) for each in annotations)), None)
    except DAMAGE as error:
        raise DataError(
            f"{path}: cannot be read as annotations of COCO: {one_line(error)}"
        ) from error
    if not names:
        raise DataError(f"{path}: names no images")
    if not all(names):
        raise DataError(f"{path}: one of its images has no file_name")
    if len(images) < len(names):
        raise DataError(f"{path}: two of its images have one id")
    if not categories:
        raise DataError(f"{path}: names no categories")
    if len(categories) < len(content["categories"]):
        raise DataError(f"{path}: two of its categories have one id")
    if fault:
        raise DataError(f"{path}: {fault}")
    if masks and len(categories) >= VOID:
        raise DataError(
            f"{path}: names {len(categories)} categories; a mask has room for {VOID - 1}"
        )
    corners = np.array([each["bbox"] for each in kept], np.float64).reshape(len(kept), 4)
    boxes = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1)
    ids = np.array([int(each["category_id"]) for each in kept], np.int64)
    image = np.array([images[each["image_id"]] for each in kept], np.int64)
    cut, left = cut_boxes(boxes, sizes[image])
    changed = int((cut != boxes).any(1)[left].sum())
    order = np.flatnonzero(left)[np.argsort(image[left], kind="stable")]
    return _Annotations(
        categories,
        names,
        sizes,
        image[order],
        cut[order].astype(np.float32),
        ids[order],
        len(annotations) - len(kept),
        int((~left).sum()),
        changed,
        _regions(path, annotations, images) if masks else [],
    )


def _fault(
    annotation: Mapping[str, Any], images: Mapping[Any, int], categories: Mapping[int, str]
) -> str | None:
    """Returns what is wrong with an annotation, or None; of a crowd only the image matters."""
    number, image = annotation.get("id", "(without id)"), annotation.get("image_id")
    if image not in images:
        return f"annotation {number} names image {image}, which is not in its images"
    if annotation.get("iscrowd", 0):
        return None
    category, box = annotation.get("category_id"), annotation.get("bbox")
    if category is None or int(category) not in categories:
        return f"annotation {number} names category {category}, which is not in its categories"
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))):
        return f"annotation {number} has the box {box}, not four numbers"
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _regions(
    path: Path, annotations: Sequence[Mapping[str, Any]], images: Mapping[Any, int]
) -> list[str]:
    """Returns the annotations of each image as `_Annotations.regions` has them."""
    found: list[list[Any]] = [[] for _ in images]
    for each in annotations:
        number, segmentation = each.get("id", "(without id)"), each.get("segmentation")
        if not segmentation:
            raise DataError(f"{path}: annotation {number} has no segmentation, which a mask needs")
        category = None if each.get("iscrowd", 0) else int(each["category_id"])
        found[images[each["image_id"]]].append((number, category, segmentation))
    polygons = any(isinstance(each["segmentation"], list) for each in annotations)
    if polygons and importlib.util.find_spec("pycocotools") is None:
        raise DataError(
            f"{path}: has polygons, which pycocotools draws: pip install 'resjax[detection]'"
        )
    return [json.dumps(each) for each in found]


def _examples(
    root: Path,
    file: Path,
    part: str,
    targets: tuple[str, ...],
    found: _Annotations,
    labels: Mapping[int, int],
    room: int,
) -> CocoExamples:
    folder = _image_folder(root, file, part, found.names)
    inner = os.path.relpath(folder, root)
    names = [os.path.join(inner, name) for name in found.names]
    ends = np.searchsorted(found.owners, np.arange(len(names) + 1))
    classes = (np.searchsorted(list(labels), found.ids) + 1).astype(np.int32)
    return CocoExamples(
        root,
        file,
        targets,
        names,
        found.sizes,
        ends,
        found.boxes,
        classes,
        room,
        found.regions,
        labels,
    )


def _image_folder(root: Path, file: Path, part: str, names: Sequence[str]) -> Path:
    """Returns the folder that contains the images of a file of annotations."""
    tops = [root, root / "images"]
    inner = [path for top in tops if top.is_dir() for path in folders_in(top)]
    word = file.stem.rpartition("_")[2]
    named = [path for path in inner if path.name == word]
    alike = [path for path in inner if part_of(_without_year(path.name)) == part]
    beside = [] if file.parent == root / "annotations" else [file.parent]
    folders = list(dict.fromkeys([*beside, *named, *alike, *tops[::-1]]))
    best = min(folders, key=lambda folder: len(_missing(folder, names[:1])))
    if missing := _missing(best, names):
        where = "" if len(missing) < len(names) else f" (looked into {_list(root, folders)})"
        raise DataError(
            f"{file}: names {len(missing):,} images that {best} lacks: "
            f"{first_few(missing, 3)}{where}"
        )
    return best


def _missing(folder: Path, names: Sequence[str]) -> list[str]:
    """Returns the files that a folder lacks; one listing is faster than a call for each file."""
    present = {
        parent: {path.name for path in where.iterdir()}
        if (where := folder / parent).is_dir()
        else ()
        for parent in {PurePosixPath(name).parent for name in names}
    }
    return [
        name
        for name in names
        if PurePosixPath(name).name not in present[PurePosixPath(name).parent]
    ]


def _list(root: Path, folders: Iterable[Path]) -> str:
    return ", ".join(path.relative_to(root).as_posix() for path in folders)


def _slice(examples: CocoExamples, start: int, stop: int) -> CocoExamples:
    return replace(
        examples,
        files=examples.files[start:stop],
        sizes=examples.sizes[start:stop],
        ends=examples.ends[start : stop + 1],
        regions=examples.regions[start:stop],
    )


def _notes(files: Iterable[_Annotations], targets: tuple[str, ...]) -> tuple[str, ...]:
    files = list(files)
    crowds = sum(each.crowds for each in files)
    counts = {}
    if "mask" in targets:
        counts["annotations of crowds are void"] = crowds
    if "boxes" in targets:
        counts |= {
            "annotations of crowds are left out": crowds,
            "boxes without area are left out": sum(each.empty for each in files),
            "boxes are cut at the border of their image": sum(each.cut for each in files),
        }
    counts["images have no object"] = sum(
        len(each.names) - len(np.unique(each.owners)) for each in files
    )
    return tuple(f"{count:,} {what}" for what, count in counts.items() if count)
