"""Preparing a set in the format of TFDS: small ones from their archives, without TensorFlow.

The stock builders read with TensorFlow's file system and encode with its PNG encoder. A subclass
that yields Pillow's images under the stock builder's name and version writes the same set, which
any TFDS reads. Every other set takes the stock builder itself, and TensorFlow.
"""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from resjax.data import DATASETS, why_unknown
from resjax.data.archives import FORMS, Content, fetch, read
from resjax.data.examples import DataError, NotPreparedError
from resjax.data.prepared import data_dir, find


def prepare(name: str, source: Path | None, announce: Callable[[str], None]) -> Path:
    """Prepares a set, all of it or nothing, unless it is prepared.

    Args:
      name: of DATASETS, or `tfds:NAME`.
      source: the folder of its archives, as they were published; None fetches them.
      announce: is told of every stage.

    Returns:
      The folder of the prepared set.

    Raises:
      DataError: no such set, or it takes no preparation; an archive is missing, damaged or cannot
        be had; or preparing takes TensorFlow, which is not here.
    """
    if why := why_unknown(name):
        raise DataError(why)
    spec = DATASETS.get(name)
    tfds_name = spec.tfds if spec else name.removeprefix("tfds:")
    if not tfds_name or name.startswith(("folder:", "npz:")):
        raise DataError(f"{name} needs no preparation")
    try:
        folder = find(tfds_name)
        announce(f"{name} is prepared already; to prepare it anew, remove its folder first")
        return folder
    except NotPreparedError:
        pass
    if tfds_name in FORMS:
        _from_archives(tfds_name, source, announce)
    else:
        _by_tensorflow(tfds_name, source)
    return find(tfds_name)


def _from_archives(name: str, source: Path | None, announce: Callable[[str], None]) -> None:
    import tensorflow_datasets as tfds

    if source is None:
        source = data_dir() / "downloads" / name
        fetch(name, source, announce)
    content = read(name, source)
    images = sum(len(columns["label"]) for columns in content.splits.values())
    announce(f"{name}: the archives are as published; writing {images:,} images")
    tfds.disable_progress_bar()  # it has three a split
    with contextlib.redirect_stdout(io.StringIO()):  # where TFDS says that it downloads
        builder = _builder(name, content)(data_dir=data_dir(), file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )


def _builder(name: str, content: Content) -> Any:
    """The stock builder, but for where its examples come from."""
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.core import registered

    stock = tfds.builder_cls(name)

    def examples(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        columns = content.splits[split]
        for index, values in enumerate(zip(*columns.values(), strict=True)):
            record = dict(zip(columns, values, strict=True))
            yield index, record | {"image": Image.fromarray(record["image"])}

    with registered.skip_registration():

        class Builder(stock):  # type: ignore[misc, valid-type]
            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                for feature, names in content.names.items():
                    self.info.features[feature].names = list(names)
                return {split: examples(split) for split in content.splits}

    Builder.name, Builder.__module__ = stock.name, stock.__module__  # what the set will tell
    return Builder


def _by_tensorflow(name: str, source: Path | None) -> None:
    if not importlib.util.find_spec("tensorflow"):
        raise DataError(f"{name} takes TensorFlow to prepare: pip install 'resjax[tensorflow]'")
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir(), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=source))
