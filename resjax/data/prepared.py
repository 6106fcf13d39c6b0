"""Datasets in the format of TensorFlow Datasets (TFDS), read without TensorFlow.

They are in TFDS's folder, $TFDS_DATA_DIR or else ~/tensorflow_datasets, prepared as array_record by
`resjax data prepare` or by TFDS. Records are read here because TFDS's reader decodes all features
and takes much longer.
"""

import bisect
import functools
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from resjax.data.boxes import cut_boxes, padded_boxes
from resjax.data.cache import cached_arrays
from resjax.data.decoding import decode_mask, upright_size
from resjax.data.examples import (
    BOXES,
    LABEL,
    MASK,
    VOID,
    DataError,
    Example,
    NotPreparedError,
    Source,
)
from resjax.data.mask_folders import require_mask_fits, values
from resjax.errors import one_line
from resjax.text import user_path

IMAGE_FEATURES = ("image", "image_left")
MASK_FEATURES = ("segmentation_mask", "segmentation_label", "annotation", "mask")
LEFT_OUT = ("is_crowd", "is_difficult")  # objects that evaluation does not count
MOST_OBJECTS = 100  # in an image; COCO has at most 93, PASCAL VOC 56

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


def data_dir() -> Path:
    """Returns the folder of prepared datasets."""
    return user_path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


class PreparedSet(NamedTuple):
    """Facts about a prepared dataset."""

    name: str  # in TFDS: name or name/config
    folder: Path
    images: Mapping[str, int]  # by split
    format: str  # of its files: array_record, or another that needs TensorFlow
    bytes: int


def list_prepared() -> Iterator[PreparedSet]:
    """Yields the newest version of each prepared dataset, without TFDS, whose import takes seconds.

    Raises:
      DataError: the description of a dataset is damaged.
    """
    root = data_dir()
    infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
    for folder in sorted(info.parent for info in infos):
        if folder != _newest(folder.parent):
            continue
        try:
            info = json.loads((folder / "dataset_info.json").read_bytes())
            images = {
                split["name"]: sum(map(int, split.get("shardLengths", ())))
                for split in info["splits"]
            }
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: damaged, prepare it again: {error!r}") from error
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        name = folder.parent.relative_to(root).as_posix()
        yield PreparedSet(name, folder, images, info.get("fileFormat", "tfrecord"), size)


def find_prepared(name: str) -> Path:
    """Returns the folder of a prepared dataset, without network access.

    Args:
      name: in TFDS: `name` or `name/config`, optionally followed by `:1.2.3`.

    Raises:
      NotPreparedError: the dataset is not in the data folder.
      DataError: the dataset has several configurations and `name` selects none.
    """
    path, _, version = name.partition(":")
    root = data_dir() / path
    folder = root / version if version else _newest(root)
    if folder and (folder / "dataset_info.json").is_file():
        return folder
    configs = [inner.name for inner in sorted(root.glob("*/")) if _newest(inner)]
    if configs and not version:
        default = root / ".config" / "metadata.json"  # TFDS's record of the default
        chosen = json.loads(default.read_bytes())["default_config_name"] if default.exists() else ""
        if chosen in configs or len(configs) == 1:
            return find_prepared(f"{path}/{chosen if chosen in configs else configs[0]}")
        raise DataError(f"{path} has several configurations; name one: {path}/{configs[0]}, ...")
    raise NotPreparedError(f"{name} is not prepared in {data_dir()}")


def _newest(root: Path) -> Path | None:
    versions = [path.parent for path in root.glob("*/dataset_info.json")]
    numbered = [(match, path) for path in versions if (match := _VERSION.fullmatch(path.name))]
    if not numbered:
        return None
    return max(numbered, key=lambda pair: tuple(map(int, pair[0].groups())))[1]


def open_prepared(name: str, label: str, test_split: str = "test") -> Source:
    """Opens a prepared dataset without reading a record.

    Args:
      name: in TFDS.
      label: the name for messages.
      test_split: name of the default test split; `validation` if the dataset lacks it.

    Raises:
      NotPreparedError: the dataset is not in the data folder.
      DataError: it is damaged, has another file format, or has no images with labels, boxes or
        masks.
    """
    folder = find_prepared(name)
    info = _builder(folder).info
    formats = {format.value for format in info.available_file_formats()}
    if "array_record" not in formats:
        raise DataError(
            f"{folder} contains {' and '.join(sorted(formats))} files, which need TensorFlow; "
            "prepare it again with file_format='array_record' in TFDS"
        )
    features = info.features
    image = next((name for name in IMAGE_FEATURES if _is(features, name, "Image")), "")
    mask = next((name for name in MASK_FEATURES if _is(features, name, "Image")), "")
    objects = getattr(_feature(features, "objects"), "feature", None)
    shape = features[image].shape if image and None not in features[image].shape else None
    targets: tuple[str, ...] = LABEL
    names: tuple[str, ...] = ()
    if image and _is(features, "label", "ClassLabel"):
        names = tuple(features["label"].names)
    elif image and objects and _is(objects, "bbox", "BBoxFeature"):
        targets, names = BOXES, ("background", *objects["label"].names)
    elif image and mask:
        targets = MASK
        names = tuple(getattr(features[mask], "names", None) or ())
    else:
        raise DataError(
            f"{name} has no images with labels, boxes or masks; its features are {_list(features)}"
        )
    splits = {
        split: PreparedExamples(
            folder, split, label, part.num_examples, len(names), image, targets, mask
        )
        for split, part in info.splits.items()
    }
    if targets == MASK and not names:
        names = _classes_of_masks(folder, splits)
        splits = {split: replace(part, classes=len(names)) for split, part in splits.items()}
    test = next((split for split in (test_split, "validation") if split in splits), None)
    room = MOST_OBJECTS if targets == BOXES else 0
    return Source(splits, names, shape, test=test, targets=targets, objects=room)


def _classes_of_masks(folder: Path, splits: Mapping[str, "PreparedExamples"]) -> tuple[str, ...]:
    """Returns the numbers up to the highest value of all masks, which are read once."""

    def compute() -> dict[str, np.ndarray]:
        found = np.zeros(VOID + 1, bool)
        for examples in splits.values():
            for index in range(len(examples)):
                found |= values(examples.mask(index))
        return {"values": found}

    found = np.flatnonzero(cached_arrays(folder, "values-of-masks", compute)["values"])
    return tuple(map(str, range(max(found[found != VOID], default=0) + 1)))


def _is(features: Any, name: str, kind: str) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(_feature(features, name), getattr(tfds.features, kind))


def _feature(features: Any, name: str) -> Any:
    return features[name] if hasattr(features, "keys") and name in features else None


def _list(features: Any) -> str:
    parts = features.items() if hasattr(features, "keys") else [("each record", features)]
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in parts)


@functools.cache
def _builder(folder: Path) -> Any:
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    try:
        return tfds.builder_from_directory(folder)
    except (OSError, ValueError, KeyError, ParseError) as error:
        raise DataError(f"{folder}: cannot be read, prepare it again: {one_line(error)}") from error


@dataclass(frozen=True)
class PreparedExamples:
    """A split of a prepared dataset, with encoded images."""

    folder: Path
    split: str
    name: str  # for messages
    length: int
    classes: int
    image_feature: str = "image"
    targets: tuple[str, ...] = LABEL
    mask_feature: str = ""

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        feature = self._record(index)
        (image,) = feature[self.image_feature].bytes_list.value
        origin = f"{self.name} {self.split}[{index}]"
        if self.targets == MASK:
            mask = self._mask(feature, origin)
            require_mask_fits(mask, image, f"{origin}: its mask", origin, self.classes)
            return Example(image, {"mask": mask}, origin)
        if self.targets == BOXES:
            return Example(image, self._boxes(feature, image, origin), origin)
        (label,) = feature["label"].int64_list.value
        if not 0 <= label < self.classes:
            raise DataError(f"{origin}: its label is {label}, but there are {self.classes} classes")
        return Example(image, {"label": label}, origin)

    def mask(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """Returns the mask of an image."""
        return self._mask(self._record(index), f"{self.name} {self.split}[{index}]")

    def _record(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        from tensorflow_datasets.proto import tf_example_pb2

        shards, ends = _shards(self.folder, self.split)
        shard = bisect.bisect_right(ends, index)
        first = ends[shard - 1] if shard else 0
        record = tf_example_pb2.Example.FromString(shards[shard].read(index - first))
        return record.features.feature

    def _mask(self, feature: Any, origin: str) -> UInt8[np.ndarray, "h w"]:
        (encoded,) = feature[self.mask_feature].bytes_list.value
        return decode_mask(encoded, f"{origin}: its mask")

    def _boxes(self, feature: Any, image: bytes, origin: str) -> dict[str, np.ndarray]:
        """Returns boxes and classes without crowds and difficult objects.

        An image with more than `MOST_OBJECTS` keeps the largest.
        """
        size = upright_size(image, origin)
        fractions = np.array(feature["objects/bbox"].float_list.value).reshape(-1, 4)
        labels = np.array(feature["objects/label"].int64_list.value, np.int64)
        if len(labels) != len(fractions):
            raise DataError(f"{origin}: has {len(fractions)} boxes, but {len(labels)} labels")
        if (bad := labels[(labels < 0) | (labels >= self.classes - 1)]).size:
            raise DataError(
                f"{origin}: a label is {bad[0]}, but there are {self.classes - 1} classes"
            )
        boxes, left = cut_boxes(fractions[:, [1, 0, 3, 2]] * np.tile(size, 2), size)
        for name in LEFT_OUT:
            if flags := feature[f"objects/{name}"].int64_list.value:
                left &= np.array(flags) == 0
        sides = boxes[:, 2:] - boxes[:, :2]
        largest = np.argsort(-np.where(left, sides.prod(1), -1), kind="stable")
        chosen = np.sort(largest[: min(left.sum(), MOST_OBJECTS)])
        return padded_boxes(boxes[chosen], labels[chosen] + 1, MOST_OBJECTS)


@functools.cache
def _shards(folder: Path, split: str) -> tuple[list["_Shard"], list[int]]:
    """Returns the shards of a split and, for each, where its examples end within the split."""
    import resource

    instructions = _builder(folder).info.splits[split].file_instructions
    # All shards stay open. ImageNet's 1,024 are more files than the default limit of most systems.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS refuses what is near "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + len(instructions), hard), hard))
    shards = [_Shard(os.fspath(instruction.filename)) for instruction in instructions]
    return shards, list(accumulate(instruction.take for instruction in instructions))


class _Shard:
    """A file of records with random access.

    A seek and a read take 4 µs per record; array_record's own data source takes 200 µs, because it
    sends each record through its thread pool.
    """

    def __init__(self, path: str):
        self.path = path
        self._lock = threading.Lock()

    def read(self, index: int) -> bytes:
        with self._lock:
            try:
                self._reader.seek(index)
                return self._reader.read()
            except Exception as error:
                raise DataError(
                    f"{self.path}: record {index} cannot be read: {one_line(error)}; "
                    "if the file is damaged, prepare the set again"
                ) from error

    @cached_property
    def _reader(self) -> Any:
        from array_record.python import array_record_module

        # The options for random access in its documentation.
        options = "readahead_buffer_size:0,max_parallelism:0"
        return array_record_module.ArrayRecordReader(self.path, options)
