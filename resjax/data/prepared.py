"""Sets in the format of TensorFlow Datasets, read without TensorFlow.

They lie where TFDS keeps them, in $TFDS_DATA_DIR or else ~/tensorflow_datasets, and may have been
prepared by `resjax data prepare` or by TFDS itself, as array_record. TFDS tells what they hold; the
records are read here, because its own reader decodes every feature, and takes much longer.
"""

import bisect
import functools
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from resjax.data.examples import DataError, Example, NotPreparedError, Source, in_one_line

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


def data_dir() -> Path:
    default = Path.home() / "tensorflow_datasets"
    return Path(os.environ.get("TFDS_DATA_DIR", default)).expanduser()


class Prepared(NamedTuple):
    """A prepared set, as a listing shows it."""

    name: str  # as TFDS writes it: name, or name/config
    folder: Path
    images: Mapping[str, int]  # by split
    format: str  # of its files: array_record, or what only TensorFlow reads
    bytes: int


def prepared_sets() -> Iterator[Prepared]:
    """The newest version of every set in the data folder, told without TFDS, which takes seconds.

    Raises:
      DataError: what describes a set cannot be read.
    """
    root = data_dir()
    infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
    for folder in sorted(info.parent for info in infos):
        if folder != _newest(folder.parent):
            continue
        try:
            info = json.loads((folder / "dataset_info.json").read_text())
            images = {
                split["name"]: sum(map(int, split.get("shardLengths", ())))
                for split in info["splits"]
            }
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: damaged, prepare it again: {error!r}") from error
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        name = folder.parent.relative_to(root).as_posix()
        yield Prepared(name, folder, images, info.get("fileFormat", "tfrecord"), size)


def find(name: str) -> Path:
    """Finds a set's folder without any network.

    Args:
      name: as TFDS writes it: `name`, `name/config`, either with `:1.2.3` behind.

    Raises:
      NotPreparedError: it is not in the data folder.
      DataError: it has several configurations and none is asked for.
    """
    path, _, version = name.partition(":")
    root = data_dir() / path
    folder = root / version if version else _newest(root)
    if folder and (folder / "dataset_info.json").is_file():
        return folder
    configs = [inner.name for inner in sorted(root.glob("*/")) if _newest(inner)]
    if configs and not version:
        default = root / ".config" / "metadata.json"  # TFDS's note of which one is meant
        chosen = json.loads(default.read_text())["default_config_name"] if default.exists() else ""
        if chosen in configs or len(configs) == 1:
            return find(f"{path}/{chosen if chosen in configs else configs[0]}")
        raise DataError(f"{path} has several configurations; name one: {path}/{configs[0]}, ...")
    raise NotPreparedError(f"{name} is not prepared in {data_dir()}")


def _newest(root: Path) -> Path | None:
    versions = [path.parent for path in root.glob("*/dataset_info.json")]
    numbered = [(match, path) for path in versions if (match := _VERSION.fullmatch(path.name))]
    if not numbered:
        return None
    return max(numbered, key=lambda pair: tuple(map(int, pair[0].groups())))[1]


def open_prepared(name: str, label: str, test_split: str = "test") -> Source:
    """Opens a set without reading a record.

    Args:
      name: as TFDS writes it.
      label: what messages call it.
      test_split: which split is its test; where there is none of that name, `validation` is.

    Raises:
      NotPreparedError: it is not here.
      DataError: it is here, but in another format, damaged, or not of images with one label each.
    """
    folder = find(name)
    info = _builder(folder).info
    import tensorflow_datasets as tfds

    formats = {format.value for format in info.available_file_formats()}
    if "array_record" not in formats:
        raise DataError(
            f"{folder} holds {' and '.join(sorted(formats))} files, which only TensorFlow reads; "
            "prepare it again with TFDS's file_format='array_record'"
        )
    image, target = (_feature(info.features, feature) for feature in ("image", "label"))
    if not (
        isinstance(image, tfds.features.Image) and isinstance(target, tfds.features.ClassLabel)
    ):
        raise DataError(
            f"{name} is no image classification; its features are {_described(info.features)}"
        )
    shape = image.shape if None not in image.shape else None
    splits = {
        split: PreparedExamples(folder, split, label, part.num_examples, target.num_classes)
        for split, part in info.splits.items()
    }
    test = next((split for split in (test_split, "validation") if split in splits), None)
    return Source(splits, tuple(target.names), shape, test=test)


def _feature(features: Any, name: str) -> Any:
    return features[name] if hasattr(features, "keys") and name in features else None


def _described(features: Any) -> str:
    parts = features.items() if hasattr(features, "keys") else [("a row", features)]
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in parts)


@functools.cache
def _builder(folder: Path) -> Any:
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    try:
        return tfds.builder_from_directory(folder)
    except (OSError, ValueError, KeyError, ParseError) as error:
        raise DataError(
            f"{folder}: cannot be read, prepare it again: {in_one_line(error)}"
        ) from error


class PreparedExamples:
    """A split of a prepared set; its images are still encoded."""

    def __init__(self, folder: Path, split: str, name: str, length: int, classes: int):
        self.folder = folder
        self.split = split
        self.name = name
        self.length = length
        self.classes = classes

    def __reduce__(self) -> Any:  # files are opened where it is used
        arguments = (self.folder, self.split, self.name, self.length, self.classes)
        return PreparedExamples, arguments

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.length:
            raise IndexError(index)
        from tensorflow_datasets.proto import tf_example_pb2

        shard = bisect.bisect_right(self._ends, index)
        first = self._ends[shard - 1] if shard else 0
        feature = tf_example_pb2.Example.FromString(self._shards[shard].read(index - first))
        (image,) = feature.features.feature["image"].bytes_list.value
        (label,) = feature.features.feature["label"].int64_list.value
        origin = f"{self.name} {self.split}[{index}]"
        if not 0 <= label < self.classes:
            raise DataError(f"{origin}: its label is {label}, but there are {self.classes} classes")
        return Example(image, label, origin)

    @cached_property
    def _shards(self) -> list["_Shard"]:
        import resource

        instructions = _builder(self.folder).info.splits[self.split].file_instructions
        # All shards stay open; ImageNet's 1,024 are more than most systems allow at first.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + len(instructions), hard), hard))
        return [_Shard(os.fspath(instruction.filename)) for instruction in instructions]

    @cached_property
    def _ends(self) -> list[int]:
        """Where every shard's examples end within the split's."""
        instructions = _builder(self.folder).info.splits[self.split].file_instructions
        return list(accumulate(instruction.take for instruction in instructions))


class _Shard:
    """A file of records with random access.

    A seek and a read of one record take 4 µs where array_record's own data source takes 200, as it
    sends every single record through its thread pool.
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
                    f"{self.path}: record {index} cannot be read: {in_one_line(error)}; "
                    "if the file is damaged, prepare the set again"
                ) from error

    @cached_property
    def _reader(self) -> Any:
        from array_record.python import array_record_module

        # Its documentation's options for random access.
        options = "readahead_buffer_size:0,max_parallelism:0"
        return array_record_module.ArrayRecordReader(self.path, options)
