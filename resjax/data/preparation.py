"""Prepares datasets in the format of TFDS; small ones from their archives, without TensorFlow.

TFDS's builders read and encode with TensorFlow. A subclass that yields Pillow images under the same
name and version writes the same dataset, which TFDS can read. Datasets whose archives are unknown
here are prepared by TFDS's own builder, which needs TensorFlow.
"""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from resjax.data import DATASETS, invalid_name
from resjax.data.archives import RELEASES, Content, download_archives, read_archives
from resjax.data.examples import DataError, NotPreparedError
from resjax.data.prepared import data_dir, find_prepared


def prepare(name: str, source: Path | None, announce: Callable[[str], None]) -> Path:
    """Prepares a dataset completely or not at all; a prepared one stays as it is.

    Args:
      name: a key of DATASETS, or `tfds:NAME`.
      source: the folder of the published archives; None downloads them.
      announce: called with one line at each stage.

    Returns:
      The folder of the prepared dataset.

    Raises:
      UserError: the dataset does not exist or needs no preparation; an archive is missing, damaged
        or cannot be downloaded; or the dataset needs TensorFlow, which is not installed.
    """
    if why := invalid_name(name):
        raise DataError(why)
    info = DATASETS.get(name)
    kind, _, rest = name.partition(":")
    tfds_name = info.tfds if info else rest if kind == "tfds" else ""
    if not tfds_name:
        raise DataError(f"{name} needs no preparation")
    try:
        folder = find_prepared(tfds_name)
        announce(f"{name} is already prepared; remove its folder to prepare it again")
        return folder
    except NotPreparedError:
        pass
    try:
        if tfds_name in RELEASES:
            _from_archives(tfds_name, source, announce)
        else:
            _with_tensorflow(tfds_name, source)
    except OSError:  # as when another process has prepared it meanwhile
        with contextlib.suppress(NotPreparedError):
            return find_prepared(tfds_name)
        raise
    return find_prepared(tfds_name)


def _from_archives(name: str, source: Path | None, announce: Callable[[str], None]) -> None:
    import tensorflow_datasets as tfds

    if source is None:
        source = data_dir() / "downloads" / name
        download_archives(name, source, announce)
    content = read_archives(name, source)
    images = sum(len(columns["label"]) for columns in content.splits.values())
    announce(f"{name}: the archives are intact; writing {images:,} images")
    tfds.disable_progress_bar()  # three bars per split
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS says that it downloads
        builder = _builder(name, content)(data_dir=data_dir(), file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )


def _builder(name: str, content: Content) -> Any:
    """Returns a subclass of TFDS's builder that takes its examples from `content`."""
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

    Builder.name, Builder.__module__ = stock.name, stock.__module__  # recorded in the dataset
    return Builder


def _with_tensorflow(name: str, source: Path | None) -> None:
    if not importlib.util.find_spec("tensorflow"):
        raise DataError(f"preparing {name} needs TensorFlow: pip install 'resjax[tensorflow]'")
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir(), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=source))
