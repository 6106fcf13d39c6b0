"""The archives of small datasets as their authors publish them: downloads, verifies and reads them.

`archives.toml` lists them. Its digests are of the archives' contents, so an archive that was
compressed again is accepted.
"""

import gzip
import hashlib
import io
import pickle
import tarfile
import tomllib
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from resjax.data.examples import DataError
from resjax.data.npz import memory_bound
from resjax.download import download
from resjax.errors import one_line

Columns = Mapping[str, Any]  # features of a split by name: arrays or lists of one length


EXPANSION = 16  # the most that an archive may grow; the published ones reach 5


class Content(NamedTuple):
    """A dataset as published: images as uint8 (n, h, w) or (n, h, w, c)."""

    splits: Mapping[str, Columns]
    names: Mapping[str, Sequence[str]]  # class names by feature, if the archive contains them


Members = Mapping[str, str]  # "algorithm:hex digest" by name; "": none is published


class Release(NamedTuple):
    """One of the formats in which a dataset is published."""

    read: Callable[[Mapping[str, bytes]], Content]  # from the members' contents
    archives: Mapping[str, Members]  # by URL
    optional: Mapping[str, Members] = {}  # not downloaded, but read if they exist


def read_idx(members: Mapping[str, bytes]) -> Content:
    """Reads MNIST's format: big-endian sizes, then bytes (yann.lecun.com/exdb/mnist)."""

    def columns(prefix: str) -> Columns:
        images = members[f"{prefix}-images-idx3-ubyte"]
        labels = members[f"{prefix}-labels-idx1-ubyte"]
        shape = np.frombuffer(images, ">i4", 3, offset=4)
        return {
            "image": np.frombuffer(images, np.uint8, offset=16).reshape(shape),
            "label": np.frombuffer(labels, np.uint8, shape[0], offset=8),
        }

    return Content({"train": columns("train"), "test": columns("t10k")}, {})


def read_cifar_binary(members: Mapping[str, bytes], labels: Mapping[str, str]) -> Content:
    """Reads CIFAR's binary format: records of one byte per label and three planes of 32x32.

    Args:
      members: contents by name.
      labels: the file with the class names of each label, in the order of a record's labels.
    """

    def columns(content: bytes) -> Columns:
        records = np.frombuffer(content, np.uint8).reshape(-1, len(labels) + 3 * 32 * 32)
        return {"data": records[:, len(labels) :], **dict(zip(labels, records.T, strict=False))}

    names = {label: members[file].decode().split() for label, file in labels.items()}
    return Content(_cifar_splits(members, columns), names)


def read_cifar_python(
    members: Mapping[str, bytes], meta: str, labels: Mapping[str, tuple[str, str]]
) -> Content:
    """Reads CIFAR's pickled format, which torchvision downloads.

    Args:
      members: contents by name; they are unpickled, so their digests must have been verified.
      meta: the file with the class names.
      labels: the keys of each label in the batches and in `meta`.
    """

    def columns(content: bytes) -> Columns:
        batch = pickle.loads(content, encoding="latin1")
        return {"data": batch["data"], **{label: batch[key] for label, (key, _) in labels.items()}}

    names = pickle.loads(members[meta], encoding="latin1")
    return Content(
        _cifar_splits(members, columns), {label: names[key] for label, (_, key) in labels.items()}
    )


def _cifar_splits(
    members: Mapping[str, bytes], columns: Callable[[bytes], Columns]
) -> dict[str, Columns]:
    splits: dict[str, Columns] = {}
    for split, prefixes in (("train", ("data_batch", "train")), ("test", ("test",))):
        batches = [columns(members[name]) for name in sorted(members) if name.startswith(prefixes)]
        whole = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        images = whole.pop("data").reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        ids = [f"{split}_{index:05d}" for index in range(len(images))]
        splits[split] = {"image": images, "id": ids, **whole}
    return splits


def read_svhn(members: Mapping[str, bytes]) -> Content:
    """Reads SVHN's cropped digits (MATLAB): images (h, w, c, n); the digit 0 has the label 10."""
    from scipy.io import loadmat

    splits: dict[str, Columns] = {}
    for name, content in members.items():
        split = name.removesuffix("_32x32.mat")
        arrays = loadmat(io.BytesIO(content))
        splits[split] = {
            "image": arrays["X"].transpose(3, 0, 1, 2),
            "label": arrays["y"].reshape(-1) % 10,
            "id": [f"{split}_{index:06d}" for index in range(len(arrays["y"]))],
        }
    return Content(splits, {})


READERS: dict[str, Callable[..., Content]] = {
    "idx": read_idx,
    "cifar_binary": read_cifar_binary,
    "cifar_python": read_cifar_python,
    "svhn": read_svhn,
}


def _release(
    format: str,
    archives: Mapping[str, Members],
    optional: Mapping[str, Members] = {},
    **options: Any,
) -> Release:
    return Release(partial(READERS[format], **options), archives, optional)


_TABLE = tomllib.loads(resources.files("resjax.data").joinpath("archives.toml").read_text("utf-8"))
# By TFDS's name; the first release is the one that is downloaded.
RELEASES = {name: [_release(**entry) for entry in entries] for name, entries in _TABLE.items()}


def read_archives(name: str, folder: Path) -> Content:
    """Reads a dataset of `RELEASES` from the archives in `folder`, in whichever format they are.

    Raises:
      DataError: an archive is missing, damaged, or not the published one.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    missing = []
    for release in RELEASES[name]:
        lacks = [url for url in release.archives if not _find(folder, url)]
        if not lacks:
            members: dict[str, bytes] = {}
            for url, expected in {**release.archives, **release.optional}.items():
                if path := _find(folder, url):
                    members |= _verified_members(path, expected)
            return release.read(members)
        missing.append(" and ".join(map(_file_name, lacks)))
    raise DataError(f"{folder} lacks {', or '.join(missing)}")


def download_archives(name: str, folder: Path, announce: Callable[[str], None]) -> None:
    """Downloads the archives of a dataset of `RELEASES` that `folder` lacks.

    Raises:
      UserError: an archive cannot be downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for url in RELEASES[name][0].archives:
        path = folder / _file_name(url)
        if not path.exists():
            download(url, path, announce, "name its folder with --from=DIR")


def _file_name(url: str) -> str:
    return url.rpartition("/")[2]


def _find(folder: Path, url: str) -> Path | None:
    """Returns the path of a downloaded file or of its unzipped copy."""
    names = (_file_name(url), _file_name(url).removesuffix(".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _verified_members(path: Path, expected: Members) -> dict[str, bytes]:
    try:
        members = dict(_unpack(path, expected))
    except (OSError, EOFError, ValueError, MemoryError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be unpacked, it is damaged: {one_line(error)}") from error
    if lacks := expected.keys() - members.keys():
        raise DataError(f"{path} lacks {', '.join(sorted(lacks))}")
    for name, digest in expected.items():
        algorithm, _, published = digest.partition(":")
        if digest and (found := hashlib.new(algorithm, members[name]).hexdigest()) != published:
            where = path if path.name == name else f"{path}: {name}"
            raise DataError(
                f"{where} has {algorithm} {found}, the published one {published}; it is damaged "
                "or another file"
            )
    return members


def _unpack(path: Path, expected: Container[str]) -> Iterator[tuple[str, bytes]]:
    if path.name.endswith(".tar.gz"):
        with _unzipped(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                # A sparse file claims any size, and a link has no content of its own.
                if name in expected and member.isreg() and not member.issparse():
                    content = archive.extractfile(member)
                    yield name, content.read() if content else b""
    elif path.suffix == ".gz":
        with _unzipped(path) as file:
            yield path.stem, file.read()
    else:
        yield path.name, path.read_bytes()


def _unzipped(path: Path) -> io.BufferedReader:
    """Opens the content of a gzip file, but reads no more of it than the file's size justifies."""
    return io.BufferedReader(_Bounded(path))


class _Bounded(io.RawIOBase):
    def __init__(self, path: Path):
        self._path, self._left = path, memory_bound(path, EXPANSION)
        self._file = gzip.GzipFile(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise DataError(f"{self._path}: grows to more than {EXPANSION} times its size; refused")
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
