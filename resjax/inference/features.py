"""Embeds images with a network's stages, and stores the embeddings as files for other tools."""

import io
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8

from resjax.data.datasets import open_dataset
from resjax.data.examples import Examples
from resjax.data.normalization import normalize
from resjax.disk import write_atomically
from resjax.errors import UserError, one_line
from resjax.inference.images import Function, each_image, find_images, require_finite
from resjax.inference.loading import on_device
from resjax.models.layout import Variables
from resjax.text import encodable
from resjax.transfer.files import read_npz
from resjax.transfer.weights import Weights
from resjax.transfer.zipped import EXPANSION, Archive, bound


class Features(NamedTuple):
    """Embeddings of images, with their origins and labels."""

    values: Float32[np.ndarray, "n d"]
    origins: tuple[str, ...]  # a file's path, or "cifar10 train[17]"
    labels: Int32[np.ndarray, "n"] | None = None  # None unless the images come from a dataset
    class_names: tuple[str, ...] = ()


class Images(NamedTuple):
    """Images to embed; without class names their labels have no meaning."""

    examples: Examples
    origins: Sequence[str]
    class_names: tuple[str, ...] = ()
    description: str = ""  # of the dataset


def of_files(paths: Iterable[Path]) -> Images:
    """Returns image files, and those in folders; raises like `find_images`."""
    found = find_images(paths)
    return Images(found, found.files)


def of_dataset(name: str, split: str) -> Images:
    """Returns the images of one split of a dataset.

    Args:
      name: a value of `data.name`.
      split: "train" or "test", whatever the dataset calls them; or a TFDS expression, such as
        "train[:20%]".

    Raises:
      UserError: there is no such dataset or split.
    """
    if split in ("train", "test"):
        opened = open_dataset(name)
    else:
        opened = open_dataset(name, train_split=split, test_split=split)
    examples = opened.test if split == "test" else opened.train
    origins = [f"{name} {split}[{index}]" for index in range(len(examples))]
    return Images(examples, origins, opened.class_names, f"{name}: {opened}")


def features(
    weights: Weights,
    images: Images,
    stage: str | None = None,
    **batching: Any,
) -> Features:
    """Returns the output of a stage for each image, averaged over height and width.

    Args:
      weights: with or without a head.
      images: of any size.
      stage: for example "stage3" or "stem"; None for the last stage.
      **batching: keywords of `each_image`: `batch_size`, `on_bad_image`, `workers`.

    Raises:
      UserError: there is no such stage, or an image cannot be read.
    """
    outputs = each_image(
        embedding(weights, stage), images.examples, weights.preprocessing, **batching
    )
    origins = tuple(compress(images.origins, outputs.decoded))
    require_finite(outputs.values, origins, "features")
    labels = outputs.labels if images.class_names else None
    return Features(outputs.values, origins, labels, images.class_names)


def embedding(weights: Weights, stage: str | None = None) -> Function:
    """Returns a compiled function from preprocessed uint8 images to float32 embeddings (n, d).

    Raises:
      UserError: there is no such stage.
    """
    model, variables = on_device(weights)
    names = ["stem", *(f"stage{index + 1}" for index in range(len(model.stages)))]
    chosen = names[-1] if stage is None else stage
    if chosen not in names:
        raise UserError(f"no stage {chosen!r}; the network has {', '.join(names)}")

    @jax.jit
    def means(variables: Variables, images: UInt8[Array, "n h w c"]) -> Float[Array, "n d"]:
        normalized = normalize(images, weights.statistics)
        stages = model.apply(variables, normalized, method="features")
        return stages[chosen].astype(jnp.float32).mean((1, 2))

    return partial(means, variables)


def save_features(found: Features, path: Path) -> None:
    """Writes features as NumPy's .npz, or as .parquet with one embedding per row.

    Raises:
      UserError: the path has another suffix.
      OSError: the file cannot be written.
    """
    write_atomically(path, _format(path).write(found))


def load_features(path: Path) -> Features:
    """Reads a file of `save_features`.

    Raises:
      UserError: the file does not exist, is damaged, or has other content.
    """
    read = _format(path).read
    try:
        found = read(path)
        _require_consistent(found)
        return found
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error
    # NumPy and Arrow raise these for files that are damaged or have other content.
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = one_line(error)
        raise UserError(f"{path}: is not a file of `resjax features` ({reason})") from error


def _write_npz(found: Features) -> bytes:
    arrays: dict[str, Any] = {"features": found.values, "origins": np.array(found.origins)}
    if found.labels is not None:
        arrays |= {"labels": found.labels, "class_names": np.array(found.class_names)}
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _read_npz(path: Path) -> Features:
    with path.open("rb") as file:
        arrays = read_npz(Archive(path, file), "biufcU")
    found = Features(arrays["features"], tuple(arrays["origins"].tolist()))
    if "labels" not in arrays:
        return found
    names = tuple(arrays["class_names"].tolist())
    return found._replace(labels=arrays["labels"], class_names=names)


def _write_parquet(found: Features) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    flat = pa.array(found.values.reshape(-1))
    columns = {
        "origin": pa.array(map(encodable, found.origins)),
        "features": pa.FixedSizeListArray.from_arrays(flat, found.values.shape[1]),
    }
    if found.labels is not None:
        names = pa.array(map(encodable, found.class_names))
        columns["label"] = pa.array(found.labels)
        # A dictionary keeps the names of classes without images.
        columns["class"] = pa.DictionaryArray.from_arrays(columns["label"], names)
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def _read_parquet(path: Path) -> Features:
    from pyarrow import parquet

    with path.open("rb") as file:  # because Arrow's own errors have no errno
        _require_bounded(parquet.ParquetFile(file).metadata, path)
        table = parquet.read_table(file).combine_chunks()
    flat = table["features"].combine_chunks().flatten().to_numpy()
    values = flat.reshape(len(table), -1)
    found = Features(values, tuple(table["origin"].to_pylist()))
    if "label" not in table.column_names:
        return found
    names = tuple(table["class"].combine_chunks().dictionary.to_pylist())
    return found._replace(labels=table["label"].to_numpy(), class_names=names)


def _require_bounded(metadata: Any, path: Path) -> None:
    """Raises ValueError if a parquet file would fill more memory than `bound` allows."""
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    values = sum(
        group.column(index).num_values for group in groups for index in range(group.num_columns)
    )
    if 4 * values > bound(path):
        raise ValueError(f"{values:,} values would fill more than {EXPANSION} times its size")


def _require_consistent(found: Features) -> None:
    values, labels = found.values, found.labels
    if values.ndim != 2 or values.dtype.kind != "f" or len(found.origins) != len(values):
        raise ValueError("its features are not one row of numbers per image")
    if labels is None:
        return
    if labels.shape != values.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError("its labels are not one whole number per image")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(found.class_names):
        raise ValueError(f"it has labels beyond its {len(found.class_names):,} classes")


class Format(NamedTuple):
    write: Callable[[Features], bytes]
    read: Callable[[Path], Features]


FORMATS = {".npz": Format(_write_npz, _read_npz), ".parquet": Format(_write_parquet, _read_parquet)}


def _format(path: Path) -> Format:
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: the name must end in {' or '.join(FORMATS)}")
    return FORMATS[path.suffix]
