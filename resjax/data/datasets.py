"""Datasets by name: opened, to read their images one by one, or loaded, whole or in part.

Every source (scikit-learn's digits, what TFDS prepared, folders and .npz files of one's own) gives
its splits as rows of examples. TFDS's split expressions, such as `train[:90%]`, work on all.
"""

from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from resjax.data import DATASETS, Spec, why_unknown
from resjax.data.cache import cached
from resjax.data.decoding import as_array, as_image, decode, open_image, resize
from resjax.data.examples import (
    ArrayExamples,
    BadImageError,
    DataError,
    Example,
    Examples,
    NotPreparedError,
    Piece,
    Pieces,
    Shape,
    Source,
    Split,
    of_arrays,
    pieces,
)
from resjax.data.prepared import PreparedExamples, data_dir, open_prepared
from resjax.data.subsets import few, of_classes
from resjax.data.user_data import open_folder, open_npz

__all__ = [
    "BadImageError",
    "DataError",
    "Dataset",
    "Example",
    "Examples",
    "NotPreparedError",
    "OnBadImage",
    "Opened",
    "Split",
    "load",
    "open_dataset",
    "prepared_folder",
]

OnBadImage = Literal["error", "skip"]


class Dataset(NamedTuple):
    train: Split
    test: Split
    class_names: tuple[str, ...]
    skipped: int = 0  # bad images that were left out


class Opened(NamedTuple):
    train: Examples
    test: Examples
    class_names: tuple[str, ...]
    image_shape: Shape | None  # height, width, channels; None: not all the same, as far as known


def open_dataset(
    name: str, train_split: str | None = None, test_split: str | None = None
) -> Opened:
    """Opens a dataset without reading an image.

    Args:
      name: of DATASETS, or of own data: `tfds:NAME`, `folder:PATH`, `npz:PATH`.
      train_split: a split expression, such as `train[:90%]`; None is the dataset's own split.
      test_split: likewise.

    Raises:
      NotPreparedError: its files are not here.
      DataError: no such dataset or split, or its files are not what they should be.
    """
    source = _source(name)
    train, test = _expressions(name, source, train_split, test_split)
    return Opened(
        _examples(source, train),
        _examples(source, test),
        source.class_names,
        source.image_shape,
    )


def load(
    name: str,
    train_split: str | None = None,
    test_split: str | None = None,
    *,
    image_size: int | None = None,
    on_bad_image: OnBadImage = "error",
    classes: Sequence[int] = (),
    per_class: int | None = None,
    subset: int = 0,
) -> Dataset:
    """Reads a dataset, and gives all or part of it.

    What had to be decoded from a prepared set is kept beside it, and verified when it is read.

    Args:
      name: of DATASETS, or of own data: `tfds:NAME`, `folder:PATH`, `npz:PATH`.
      train_split: a split expression, such as `train[:90%]`; None is the dataset's own split.
      test_split: likewise.
      image_size: side in pixels of the square to which images are scaled and cut.
      on_bad_image: whether an image that cannot be decoded is an error, or left out and counted.
      classes: numbers of the classes to keep, each once; they are renumbered in this order. ()
        keeps all.
      per_class: training examples to keep of every class; None keeps all.
      subset: number of the draw that `per_class` makes.

    Raises:
      NotPreparedError: its files are not here.
      DataError: no such dataset, split or class; its files are not what they should be; a class
        has fewer than `per_class` examples; or its images have different sizes and no `image_size`
        is asked for.
    """
    source = _source(name)
    if strange := [number for number in classes if number >= len(source.class_names)]:
        raise DataError(
            f"data.classes: {name} has no class {strange[0]}, its classes are 0 to "
            f"{len(source.class_names) - 1}"
        )
    splits, skipped = [], 0
    for expression in _expressions(name, source, train_split, test_split):
        asked = pieces(expression, source.splits)
        parts = [_whole(source, piece, image_size, on_bad_image) for piece in asked]
        splits.append(Split(*map(_joined, zip(*parts, strict=True))))
        skipped += sum(piece.stop - piece.start for piece in asked) - len(splits[-1].labels)
    train, test = splits
    _require_same_size(f"{name}: the test split", test.images[0], train.images)
    class_names = source.class_names
    if classes:
        train, test = of_classes(train, classes), of_classes(test, classes)
        class_names = tuple(class_names[number] for number in classes)
    if per_class is not None:
        train = few(train, per_class, subset, class_names)
    return Dataset(train, test, class_names, skipped)


def prepared_folder(examples: Examples) -> Path | None:
    """Where the prepared set lies that examples are read from; None where they come from others."""
    parts = [part for part, _, _ in examples.parts] if isinstance(examples, Pieces) else [examples]
    folders = {part.folder if isinstance(part, PreparedExamples) else None for part in parts}
    return folders.pop() if len(folders) == 1 else None


def _source(name: str) -> Source:
    if why := why_unknown(name):
        raise DataError(why)
    kind, _, rest = name.partition(":")
    if kind == "folder":
        return open_folder(Path(rest).expanduser())
    if kind == "npz":
        return open_npz(Path(rest).expanduser())
    if kind == "tfds":
        return _prepared(name, rest)
    if name == "digits":
        return digits()
    spec = DATASETS[name]
    return synthetic(name, spec) if spec.synthetic else _prepared(name, spec.tfds, spec.test_split)


def _prepared(name: str, tfds_name: str, test_split: str = "test") -> Source:
    try:
        return open_prepared(tfds_name, name, test_split)
    except NotPreparedError as error:
        embedded = ", ".join(key for key, spec in DATASETS.items() if spec.embedded)
        raise NotPreparedError(
            f"dataset {name!r} is not prepared in {data_dir()}: run `resjax data prepare {name}`; "
            f"embedded: {embedded}"
        ) from error


def _expressions(
    name: str, source: Source, train_split: str | None, test_split: str | None
) -> tuple[str, str]:
    test = test_split or source.test
    if test is None:
        raise DataError(
            f"{name} has no test split, only {', '.join(source.splits)}; set data.train_split and "
            "data.test_split, such as train[:80%] and train[80%:]"
        )
    return train_split or source.train, test


def _examples(source: Source, expression: str) -> Examples:
    parts = tuple(
        (source.splits[split], start, stop)
        for split, start, stop in pieces(expression, source.splits)
    )
    (examples, start, stop), *others = parts
    return Pieces(parts) if others or (start, stop) != (0, len(examples)) else examples


def _whole(source: Source, piece: Piece, image_size: int | None, on_bad_image: OnBadImage) -> Split:
    split, start, stop = piece
    examples = source.splits[split]
    if isinstance(examples, ArrayExamples) and not image_size:
        images, labels = examples.split
        return Split(images[start:stop], labels[start:stop])
    channels = source.image_shape[2] if source.image_shape else 3

    def decoded() -> Split:
        return _decoded(Pieces(((examples, start, stop),)), channels, image_size, on_bad_image)

    if isinstance(examples, PreparedExamples):
        key = f"{split}-{start}-{stop}-{image_size or 'original'}"
        return cached(examples.folder, key, stop - start, decoded)
    return decoded()


def _decoded(
    examples: Examples, channels: int, image_size: int | None, on_bad_image: OnBadImage
) -> Split:
    images, labels = np.empty(0, np.uint8), np.empty(len(examples), np.int32)
    count = 0
    for index in range(len(examples)):
        example = examples[index]
        try:
            pixels = _pixels(example, channels, image_size)
        except BadImageError:
            if on_bad_image == "error":
                raise
            continue
        if not count:
            images = np.empty((len(examples), *pixels.shape), np.uint8)
        _require_same_size(example.origin, pixels, images)
        images[count], labels[count] = pixels, example.label
        count += 1
    if not count:
        raise DataError(f"{examples[0].origin}: cannot be decoded, nor can any other of its split")
    return Split(images[:count], labels[:count])


def _pixels(example: Example, channels: int, image_size: int | None) -> UInt8[np.ndarray, "h w c"]:
    image, _, origin = example
    if image_size is None:
        return decode(image, channels, origin) if isinstance(image, bytes) else image
    opened = open_image(image, channels, origin) if isinstance(image, bytes) else as_image(image)
    return as_array(resize(opened, image_size))


def _require_same_size(origin: str, pixels: np.ndarray, others: np.ndarray) -> None:
    if pixels.shape != others.shape[1:]:
        sizes = ["x".join(map(str, shape)) for shape in (pixels.shape[:2], others.shape[1:3])]
        raise DataError(
            f"{origin} has {sizes[0]} pixels, others {sizes[1]}: set data.image_size to bring all "
            "to one size, or stream them with data.feed=stream"
        )


def _joined(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def digits() -> Source:
    """1,797 greyscale digits of 8x8 pixels; the last fifth, in the order of the file, is the test.

    The file is ordered by writer, so most test digits come from hands that no training digit comes
    from. scikit-learn carries the images, so there is nothing to download.
    """
    # To import scikit-learn for one file would take a second.
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(file), delimiter=",", dtype=np.int32)  # 64 pixels from 0 to 16, a label
    images = np.round(table[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = np.ascontiguousarray(table[:, -1])
    count = DATASETS["digits"].train_images
    splits = {
        "train": Split(images[:count], labels[:count]),
        "test": Split(images[count:], labels[count:]),
    }
    return of_arrays("digits", splits, tuple(map(str, range(10))))


def synthetic(name: str, spec: Spec) -> Source:
    """Noise of a dataset's shape, the same every time: what is measured on it is speed alone."""
    generator = np.random.default_rng(0)
    assert spec.image_shape  # noise has one

    def split(shape: Shape, count: int) -> Split:
        images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
        return Split(images, generator.integers(0, spec.classes, count, dtype=np.int32))

    splits = {
        "train": split(spec.image_shape, spec.train_images),
        "test": split(spec.image_shape, spec.test_images),
    }
    return of_arrays(name, splits, tuple(str(number) for number in range(spec.classes)))
