"""The archives of small datasets as their authors publish them: downloads, verifies and reads them.

The digests are of the archives' contents, so an archive that was compressed again is accepted.
"""

import gzip
import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from resjax.data.examples import DataError
from resjax.download import download
from resjax.errors import one_line

Columns = Mapping[str, Any]  # features of a split by name: arrays or lists of one length


class Content(NamedTuple):
    """A dataset as published: images as uint8 (n, h, w) or (n, h, w, c)."""

    splits: Mapping[str, Columns]
    names: Mapping[str, Sequence[str]]  # class names by feature, if the archive contains them


Members = Mapping[str, str | None]  # "algorithm:hex digest" by name; None: none is published


class Release(NamedTuple):
    """One of the formats in which a dataset is published."""

    read: Callable[[Mapping[str, bytes]], Content]  # from the members' contents
    archives: Mapping[str, Members]  # by URL
    optional: Mapping[str, Members] = {}  # not downloaded, but read if they exist


MNIST_SPLITS = {"train": "train", "test": "t10k"}  # prefixes of the files


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

    return Content({split: columns(prefix) for split, prefix in MNIST_SPLITS.items()}, {})


def read_cifar_binary(members: Mapping[str, bytes], labels: Mapping[str, str]) -> Content:
    """Reads CIFAR's binary format: records of one byte per label and three planes of 32x32.

    Args:
      members: contents by name.
      labels: the file with the class names of each label, in the order of a record's labels.
    """

    def columns(split: str, batches: Sequence[bytes]) -> Columns:
        records = np.frombuffer(b"".join(batches), np.uint8)
        records = records.reshape(-1, len(labels) + 3 * 32 * 32)
        by_label = {label: records[:, column] for column, label in enumerate(labels)}
        return _cifar_columns(split, records[:, len(labels) :], by_label)

    return Content(
        {split: columns(split, batches) for split, batches in _cifar_batches(members).items()},
        {label: members[file].decode().split() for label, file in labels.items()},
    )


def read_cifar_python(
    members: Mapping[str, bytes], meta: str, labels: Mapping[str, tuple[str, str]]
) -> Content:
    """Reads CIFAR's pickled format, which torchvision downloads.

    Args:
      members: contents by name; they are unpickled, so their digests must have been verified.
      meta: the file with the class names.
      labels: the keys of each label in the batches and in `meta`.
    """

    def columns(split: str, contents: Sequence[bytes]) -> Columns:
        batches = [pickle.loads(content, encoding="latin1") for content in contents]
        by_label = {
            label: np.concatenate([batch[key] for batch in batches])
            for label, (key, _) in labels.items()
        }
        planes = np.concatenate([batch["data"] for batch in batches])
        return _cifar_columns(split, planes, by_label)

    names = pickle.loads(members[meta], encoding="latin1")
    return Content(
        {split: columns(split, batches) for split, batches in _cifar_batches(members).items()},
        {label: names[key] for label, (_, key) in labels.items()},
    )


def _cifar_batches(members: Mapping[str, bytes]) -> dict[str, list[bytes]]:
    prefixes = {"train": ("data_batch", "train"), "test": ("test",)}
    return {
        split: [members[name] for name in sorted(members) if name.startswith(prefix)]
        for split, prefix in prefixes.items()
    }


def _cifar_columns(split: str, planes: np.ndarray, labels: Columns) -> Columns:
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return {"image": images, "id": [f"{split}_{i:05d}" for i in range(len(images))], **labels}


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


def _files(url: str, digests: Mapping[str, str], suffix: str = "") -> Mapping[str, Members]:
    """Returns the archives below `url` that contain one file each."""
    return {f"{url}{name}{suffix}": {name: digest} for name, digest in digests.items()}


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"

# By TFDS's name; the first release is the one that is downloaded.
RELEASES: dict[str, Sequence[Release]] = {
    # Digests: widely published, by CMake and CI scripts that download the files.
    "mnist": [
        Release(
            read_idx,
            _files(
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
                {
                    "train-images-idx3-ubyte": "md5:6bbc9ace898e44ae57da46a324031adb",
                    "train-labels-idx1-ubyte": "md5:a25bea736e30d166cdddb491f175f624",
                    "t10k-images-idx3-ubyte": "md5:2646ac647ad5339dbf082846283269ea",
                    "t10k-labels-idx1-ubyte": "md5:27ae3e4e09519cfbb04c329615203637",
                },
                suffix=".gz",
            ),
        )
    ],
    # Digests: published as MNIST's are; equal to those of Debian's package dataset-fashion-mnist.
    "fashion_mnist": [
        Release(
            read_idx,
            _files(
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                {
                    "train-images-idx3-ubyte": "md5:f4a8712d7a061bf5bd6d2ca38dc4d50a",
                    "train-labels-idx1-ubyte": "md5:9018921c3c673c538a1fc5bad174d6f9",
                    "t10k-images-idx3-ubyte": "md5:8181f5470baa50b63fa0f6fddb340f0a",
                    "t10k-labels-idx1-ubyte": "md5:15d484375f8d13e6eb1aabb0c3f46965",
                },
                suffix=".gz",
            ),
        )
    ],
    # Digests: MXNet's (gluon.data.vision) of the binary format, torchvision's of the pickled one.
    "cifar10": [
        Release(
            partial(read_cifar_binary, labels={"label": "batches.meta.txt"}),
            {
                f"{CIFAR_URL}cifar-10-binary.tar.gz": {
                    "data_batch_1.bin": "sha1:aadd24acce27caa71bf4b10992e9e7b2d74c2540",
                    "data_batch_2.bin": "sha1:c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
                    "data_batch_3.bin": "sha1:1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
                    "data_batch_4.bin": "sha1:aab85764eb3584312d3c7f65fd2fd016e36a258e",
                    "data_batch_5.bin": "sha1:26e2849e66a845b7f1e4614ae70f4889ae604628",
                    "test_batch.bin": "sha1:67eb016db431130d61cd03c7ad570b013799c88c",
                    "batches.meta.txt": None,
                }
            },
        ),
        Release(
            partial(
                read_cifar_python, meta="batches.meta", labels={"label": ("labels", "label_names")}
            ),
            {
                f"{CIFAR_URL}cifar-10-python.tar.gz": {
                    "data_batch_1": "md5:c99cafc152244af753f735de768cd75f",
                    "data_batch_2": "md5:d4bba439e000b95fd0a9bffe97cbabec",
                    "data_batch_3": "md5:54ebc095f3ab1f0389bbae665268c751",
                    "data_batch_4": "md5:634d18415352ddfa80567beed471001a",
                    "data_batch_5": "md5:482c414d41f54cd18b22e5b47cb7c3cb",
                    "test_batch": "md5:40351d587109b95175f43aff81a1287e",
                    "batches.meta": "md5:5ff9c542aee3614f3951f8cda6e48888",
                }
            },
        ),
    ],
    "cifar100": [
        Release(
            partial(
                read_cifar_binary,
                labels={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
            ),
            {
                f"{CIFAR_URL}cifar-100-binary.tar.gz": {
                    "train.bin": "sha1:e207cd2e05b73b1393c74c7f5e7bea451d63e08e",
                    "test.bin": "sha1:8fb6623e830365ff53cf14adec797474f5478006",
                    "coarse_label_names.txt": None,
                    "fine_label_names.txt": None,
                }
            },
        ),
        Release(
            partial(
                read_cifar_python,
                meta="meta",
                labels={
                    "coarse_label": ("coarse_labels", "coarse_label_names"),
                    "label": ("fine_labels", "fine_label_names"),
                },
            ),
            {
                f"{CIFAR_URL}cifar-100-python.tar.gz": {
                    "train": "md5:16019d7e3df5f24257cddd939b257f8d",
                    "test": "md5:f0ef6b0ae62326f3e7ffdfab6717acfc",
                    "meta": "md5:7973b15100ade9c7d40fb424638fde48",
                }
            },
        ),
    ],
    # Digests: torchvision's.
    "svhn_cropped": [
        Release(
            read_svhn,
            _files(
                SVHN_URL,
                {
                    "train_32x32.mat": "md5:e26dedcc434d2e4c54c9b2d4a06d8373",
                    "test_32x32.mat": "md5:eb5a983be6a315427106f1b164d9cef3",
                },
            ),
            # 1.3 GB, half a million easier digits.
            optional=_files(SVHN_URL, {"extra_32x32.mat": "md5:a93ce644f1a588dc4d68dda5feec44a7"}),
        )
    ],
}


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
        members = {name: data for name, data in _unpack(path) if name in expected}
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be unpacked, it is damaged: {one_line(error)}") from error
    if lacks := expected.keys() - members.keys():
        raise DataError(f"{path} lacks {', '.join(sorted(lacks))}")
    for name, digest in expected.items():
        algorithm, _, published = (digest or "").partition(":")
        if digest and (found := hashlib.new(algorithm, members[name]).hexdigest()) != published:
            where = path if path.name == name else f"{path}: {name}"
            raise DataError(
                f"{where} has {algorithm} {found}, the published one {published}; it is damaged "
                "or another file"
            )
    return members


def _unpack(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            for member in archive:
                if file := archive.extractfile(member):
                    yield PurePosixPath(member.name).name, file.read()
    elif path.suffix == ".gz":
        yield path.stem, gzip.decompress(path.read_bytes())
    else:
        yield path.name, path.read_bytes()
