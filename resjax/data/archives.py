"""The archives of small datasets as their authors publish them: fetched, checked and read.

What is checked is the content, not its compression: archives that a distribution or a colleague
packed again are as good. Every published digest stands in one table, with who published it.
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

from resjax.data.examples import DataError, in_one_line
from resjax.download import download

Columns = Mapping[str, Any]  # of a split: an array or list for every feature, all of one length


class Content(NamedTuple):
    """A dataset as it was published: images as (n, h, w) or (n, h, w, c) of uint8."""

    splits: Mapping[str, Columns]
    names: Mapping[str, Sequence[str]]  # of classes, by feature, where the archive tells them


class File(NamedTuple):
    """A file as it was published. Digests are written algorithm:hexadecimal digits."""

    url: str
    whole: str  # digest of the file as it is
    inside: Mapping[str, str | None]  # of what it holds, unpacked; None: nobody published one
    optional: bool = False  # not fetched, and read only where it is

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name


class Form(NamedTuple):
    """One of the forms in which a dataset is published."""

    read: Callable[[Mapping[str, bytes]], Content]
    files: Sequence[File]


def read_idx(contents: Mapping[str, bytes]) -> Content:
    """MNIST's format: big-endian sizes, then bytes (yann.lecun.com/exdb/mnist)."""

    def columns(prefix: str) -> Columns:
        images = contents[f"{prefix}-images-idx3-ubyte"]
        count, height, width = np.frombuffer(images, ">i4", 3, offset=4)
        return {
            "image": np.frombuffer(images, np.uint8, offset=16).reshape(count, height, width),
            "label": np.frombuffer(
                contents[f"{prefix}-labels-idx1-ubyte"], np.uint8, count, offset=8
            ),
        }

    return Content({"train": columns("train"), "test": columns("t10k")}, {})


def read_cifar_binary(
    contents: Mapping[str, bytes],
    train: Sequence[str],
    test: str,
    labels: Mapping[str, str],
) -> Content:
    """CIFAR's binary form: records of a byte for each label and three planes of 32x32.

    Args:
      contents: of the archive.
      train: files of the training split.
      test: file of the test split.
      labels: the file with the names of each label, in the order of the labels in a record.
    """

    def columns(split: str, files: Sequence[str]) -> Columns:
        content = b"".join(contents[file] for file in files)
        records = np.frombuffer(content, np.uint8).reshape(-1, len(labels) + 3 * 32 * 32)
        return {
            "image": _planes(records[:, len(labels) :]),
            "id": [f"{split}_{index:05d}" for index in range(len(records))],
            **{label: records[:, column] for column, label in enumerate(labels)},
        }

    return Content(
        {"train": columns("train", train), "test": columns("test", [test])},
        {label: contents[file].decode().split() for label, file in labels.items()},
    )


def read_cifar_python(
    contents: Mapping[str, bytes],
    train: Sequence[str],
    test: str,
    meta: str,
    labels: Mapping[str, tuple[str, str]],
) -> Content:
    """CIFAR's pickled form, which is what torchvision fetches.

    Args:
      contents: of the archive; unpickled, so their digests must have been checked.
      train: files of the training split.
      test: file of the test split.
      meta: file with the names of the classes.
      labels: for each label its key in the batches, and in `meta`.
    """

    def columns(split: str, files: Sequence[str]) -> Columns:
        batches = [pickle.loads(contents[file], encoding="latin1") for file in files]
        images = np.concatenate([batch["data"] for batch in batches])
        return {
            "image": _planes(images),
            "id": [f"{split}_{index:05d}" for index in range(len(images))],
            **{
                label: np.concatenate([batch[key] for batch in batches])
                for label, (key, _) in labels.items()
            },
        }

    names = pickle.loads(contents[meta], encoding="latin1")
    return Content(
        {"train": columns("train", train), "test": columns("test", [test])},
        {label: names[key] for label, (_, key) in labels.items()},
    )


def _planes(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def read_svhn(contents: Mapping[str, bytes]) -> Content:
    """SVHN's cropped digits in MATLAB's format: images (h, w, c, n), and 10 for the digit 0."""
    from scipy.io import loadmat

    splits: dict[str, Columns] = {}
    for name, content in contents.items():
        split = name.removesuffix("_32x32.mat")
        arrays = loadmat(io.BytesIO(content))
        splits[split] = {
            "image": arrays["X"].transpose(3, 0, 1, 2),
            "label": arrays["y"].reshape(-1) % 10,
            "id": [f"{split}_{index:06d}" for index in range(len(arrays["y"]))],
        }
    return Content(splits, {})


MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"
CIFAR10_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))

# By TFDS's name; the first form is the one that is fetched. Digests of whole files are TFDS's
# (SHA-256) and torchvision's (MD5).
FORMS: dict[str, Sequence[Form]] = {
    # Of the unzipped files: widely published, by CMake and CI scripts that fetch them.
    "mnist": [
        Form(
            read_idx,
            [
                File(
                    f"{MNIST_URL}train-images-idx3-ubyte.gz",
                    "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                    {"train-images-idx3-ubyte": "md5:6bbc9ace898e44ae57da46a324031adb"},
                ),
                File(
                    f"{MNIST_URL}train-labels-idx1-ubyte.gz",
                    "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                    {"train-labels-idx1-ubyte": "md5:a25bea736e30d166cdddb491f175f624"},
                ),
                File(
                    f"{MNIST_URL}t10k-images-idx3-ubyte.gz",
                    "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                    {"t10k-images-idx3-ubyte": "md5:2646ac647ad5339dbf082846283269ea"},
                ),
                File(
                    f"{MNIST_URL}t10k-labels-idx1-ubyte.gz",
                    "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                    {"t10k-labels-idx1-ubyte": "md5:27ae3e4e09519cfbb04c329615203637"},
                ),
            ],
        )
    ],
    # Of the unzipped files: published likewise, and equal to those of Debian's package
    # dataset-fashion-mnist, whose archives were packed again.
    "fashion_mnist": [
        Form(
            read_idx,
            [
                File(
                    f"{FASHION_MNIST_URL}train-images-idx3-ubyte.gz",
                    "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                    {"train-images-idx3-ubyte": "md5:f4a8712d7a061bf5bd6d2ca38dc4d50a"},
                ),
                File(
                    f"{FASHION_MNIST_URL}train-labels-idx1-ubyte.gz",
                    "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                    {"train-labels-idx1-ubyte": "md5:9018921c3c673c538a1fc5bad174d6f9"},
                ),
                File(
                    f"{FASHION_MNIST_URL}t10k-images-idx3-ubyte.gz",
                    "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                    {"t10k-images-idx3-ubyte": "md5:8181f5470baa50b63fa0f6fddb340f0a"},
                ),
                File(
                    f"{FASHION_MNIST_URL}t10k-labels-idx1-ubyte.gz",
                    "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                    {"t10k-labels-idx1-ubyte": "md5:15d484375f8d13e6eb1aabb0c3f46965"},
                ),
            ],
        )
    ],
    # Inside the binary form: MXNet's (gluon.data.vision). Inside the pickled one: torchvision's.
    "cifar10": [
        Form(
            partial(
                read_cifar_binary,
                train=[f"{name}.bin" for name in CIFAR10_TRAIN],
                test="test_batch.bin",
                labels={"label": "batches.meta.txt"},
            ),
            [
                File(
                    f"{CIFAR_URL}cifar-10-binary.tar.gz",
                    "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                    {
                        "data_batch_1.bin": "sha1:aadd24acce27caa71bf4b10992e9e7b2d74c2540",
                        "data_batch_2.bin": "sha1:c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
                        "data_batch_3.bin": "sha1:1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
                        "data_batch_4.bin": "sha1:aab85764eb3584312d3c7f65fd2fd016e36a258e",
                        "data_batch_5.bin": "sha1:26e2849e66a845b7f1e4614ae70f4889ae604628",
                        "test_batch.bin": "sha1:67eb016db431130d61cd03c7ad570b013799c88c",
                        "batches.meta.txt": None,
                    },
                )
            ],
        ),
        Form(
            partial(
                read_cifar_python,
                train=CIFAR10_TRAIN,
                test="test_batch",
                meta="batches.meta",
                labels={"label": ("labels", "label_names")},
            ),
            [
                File(
                    f"{CIFAR_URL}cifar-10-python.tar.gz",
                    "md5:c58f30108f718f92721af3b95e74349a",
                    {
                        "data_batch_1": "md5:c99cafc152244af753f735de768cd75f",
                        "data_batch_2": "md5:d4bba439e000b95fd0a9bffe97cbabec",
                        "data_batch_3": "md5:54ebc095f3ab1f0389bbae665268c751",
                        "data_batch_4": "md5:634d18415352ddfa80567beed471001a",
                        "data_batch_5": "md5:482c414d41f54cd18b22e5b47cb7c3cb",
                        "test_batch": "md5:40351d587109b95175f43aff81a1287e",
                        "batches.meta": "md5:5ff9c542aee3614f3951f8cda6e48888",
                    },
                )
            ],
        ),
    ],
    "cifar100": [
        Form(
            partial(
                read_cifar_binary,
                train=["train.bin"],
                test="test.bin",
                labels={
                    "coarse_label": "coarse_label_names.txt",
                    "label": "fine_label_names.txt",
                },
            ),
            [
                File(
                    f"{CIFAR_URL}cifar-100-binary.tar.gz",
                    "sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                    {
                        "train.bin": "sha1:e207cd2e05b73b1393c74c7f5e7bea451d63e08e",
                        "test.bin": "sha1:8fb6623e830365ff53cf14adec797474f5478006",
                        "coarse_label_names.txt": None,
                        "fine_label_names.txt": None,
                    },
                )
            ],
        ),
        Form(
            partial(
                read_cifar_python,
                train=["train"],
                test="test",
                meta="meta",
                labels={
                    "coarse_label": ("coarse_labels", "coarse_label_names"),
                    "label": ("fine_labels", "fine_label_names"),
                },
            ),
            [
                File(
                    f"{CIFAR_URL}cifar-100-python.tar.gz",
                    "md5:eb9058c3a382ffc7106e4002c42a8d85",
                    {
                        "train": "md5:16019d7e3df5f24257cddd939b257f8d",
                        "test": "md5:f0ef6b0ae62326f3e7ffdfab6717acfc",
                        "meta": "md5:7973b15100ade9c7d40fb424638fde48",
                    },
                )
            ],
        ),
    ],
    # Of the .mat files: torchvision's.
    "svhn_cropped": [
        Form(
            read_svhn,
            [
                File(
                    f"{SVHN_URL}train_32x32.mat",
                    "sha256:435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
                    {"train_32x32.mat": "md5:e26dedcc434d2e4c54c9b2d4a06d8373"},
                ),
                File(
                    f"{SVHN_URL}test_32x32.mat",
                    "sha256:cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
                    {"test_32x32.mat": "md5:eb5a983be6a315427106f1b164d9cef3"},
                ),
                File(  # 1.3 GB, half a million easier digits
                    f"{SVHN_URL}extra_32x32.mat",
                    "sha256:a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3",
                    {"extra_32x32.mat": "md5:a93ce644f1a588dc4d68dda5feec44a7"},
                    optional=True,
                ),
            ],
        )
    ],
}


def read(name: str, folder: Path) -> Content:
    """Reads a dataset of FORMS from its archives in `folder`, in whatever form lies there.

    Raises:
      DataError: a file is missing, damaged, or not what was published; says which.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    missing = []
    for form in FORMS[name]:
        found = [(file, _find(folder, file)) for file in form.files]
        lacks = [file.name for file, path in found if not (path or file.optional)]
        if not lacks:
            contents: dict[str, bytes] = {}
            for file, path in found:
                if path:
                    contents |= _checked(path, file)
            return form.read(contents)
        missing.append(" and ".join(lacks))
    raise DataError(f"{folder} lacks {', or '.join(missing)}")


def fetch(name: str, folder: Path, announce: Callable[[str], None]) -> None:
    """Downloads the archives of a dataset of FORMS into `folder`, but for those that are there.

    Raises:
      UserError: a file cannot be downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in FORMS[name][0].files:
        path = folder / file.name
        if file.optional or path.exists():
            continue
        download(file.url, path, announce, "name its folder with --from=DIR")


def _find(folder: Path, file: File) -> Path | None:
    """The file, or an unzipped copy of it."""
    names = (file.name, file.name.removesuffix(".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _checked(path: Path, file: File) -> dict[str, bytes]:
    """What a file holds, after a look at its digests."""
    try:
        contents = {name: content for name, content in _unpack(path) if name in file.inside}
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(
            f"{path}: cannot be unpacked, it is damaged: {in_one_line(error)}"
        ) from error
    if lacks := file.inside.keys() - contents.keys():
        raise DataError(f"{path} lacks {', '.join(sorted(lacks))}")
    with path.open("rb") as opened:
        algorithm, _, expected = file.whole.partition(":")
        if hashlib.file_digest(opened, algorithm).hexdigest() == expected:
            return contents
    for name, published in file.inside.items():
        if published is None:
            continue
        algorithm, _, expected = published.partition(":")
        found = hashlib.new(algorithm, contents[name]).hexdigest()
        if found != expected:
            where = path if path.name == name else f"{path}: {name}"
            raise DataError(
                f"{where} has {algorithm} {found}, the published one {expected}; it is damaged "
                "or another file"
            )
    return contents


def _unpack(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            for member in archive:
                if opened := archive.extractfile(member):
                    yield PurePosixPath(member.name).name, opened.read()
    elif path.suffix == ".gz":
        yield path.stem, gzip.decompress(path.read_bytes())
    else:
        yield path.name, path.read_bytes()
