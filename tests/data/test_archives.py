"""Archives are verified by their content and read in every published format."""

import gzip
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from resjax.data.archives import RELEASES, download_archives, read_archives
from resjax.data.examples import DataError
from resjax.errors import UserError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # from the package dataset-fashion-mnist

GENERATOR = np.random.default_rng(0)
GREY = GENERATOR.integers(0, 256, (7, 28, 28), np.uint8)
COLOR = GENERATOR.integers(0, 256, (7, 32, 32, 3), np.uint8)
LABELS = np.arange(7, dtype=np.uint8) % 3


def idx(array):
    sizes = np.array([0x800 + array.ndim, *array.shape], ">i4")
    return sizes.tobytes() + array.tobytes()


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def pack(path, contents):
    """Writes contents as .tar.gz, .gz or uncompressed."""
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path, "w:gz") as archive:
            for name, content in contents.items():
                member = tarfile.TarInfo(f"some-folder/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        (content,) = contents.values()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def mnist():
    return {
        "train-images-idx3-ubyte": idx(GREY),
        "train-labels-idx1-ubyte": idx(LABELS),
        "t10k-images-idx3-ubyte": idx(GREY[::-1]),
        "t10k-labels-idx1-ubyte": idx(LABELS[::-1].copy()),
    }


def cifar10_binary():
    records = np.hstack([LABELS[:, None], planes(COLOR)])
    batches = {f"data_batch_{number}.bin": records for number in range(1, 6)}
    batches["test_batch.bin"] = records[::-1]
    names = {"batches.meta.txt": b"airplane\nautomobile\nbird\n\n"}
    return {name: batch.tobytes() for name, batch in batches.items()} | names


def cifar10_python():
    def batch(images, labels):
        return pickle.dumps({"data": planes(images), "labels": labels.tolist()}, 2)

    return {
        **{f"data_batch_{number}": batch(COLOR, LABELS) for number in range(1, 6)},
        "test_batch": batch(COLOR[::-1], LABELS[::-1]),
        "batches.meta": pickle.dumps({"label_names": ["airplane", "automobile", "bird"]}, 2),
    }


def cifar100_binary():
    records = np.hstack([LABELS[:, None] % 2, LABELS[:, None], planes(COLOR)])
    return {
        "train.bin": records.tobytes(),
        "test.bin": records[::-1].tobytes(),
        "coarse_label_names.txt": b"fish\nflowers\n",
        "fine_label_names.txt": b"apple\naquarium_fish\nbaby\n",
    }


def cifar100_python():
    def batch(images, labels):
        content = {"fine_labels": labels.tolist(), "coarse_labels": (labels % 2).tolist()}
        return pickle.dumps({"data": planes(images)} | content, 2)

    names = {
        "coarse_label_names": ["fish", "flowers"],
        "fine_label_names": ["apple", "aquarium_fish", "baby"],
    }
    return {
        "train": batch(COLOR, LABELS),
        "test": batch(COLOR[::-1], LABELS[::-1]),
        "meta": pickle.dumps(names, 2),
    }


def svhn():
    def mat(images, labels):
        file = io.BytesIO()
        tens = np.where(labels == 0, 10, labels)[:, None]
        savemat(file, {"X": images.transpose(1, 2, 3, 0), "y": tens})
        return file.getvalue()

    return {"train_32x32.mat": mat(COLOR, LABELS), "test_32x32.mat": mat(COLOR[::-1], LABELS[::-1])}


def md5(content):
    return hashlib.md5(content).hexdigest()


def file_name(url):
    return url.rpartition("/")[2]


def first_archive(name):
    """The file name and the members of a dataset's first archive."""
    url, members = next(iter(RELEASES[name][0].archives.items()))
    return file_name(url), members


CONTENTS = [
    ("mnist", 0, mnist),
    ("cifar10", 0, cifar10_binary),
    ("cifar10", 1, cifar10_python),
    ("cifar100", 0, cifar100_binary),
    ("cifar100", 1, cifar100_python),
    ("svhn_cropped", 0, svhn),
]


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Publishes other contents under a dataset's name: `publish(name, release, contents)`."""

    def write(name, release, contents):
        archives = {}
        for url, members in RELEASES[name][release].archives.items():
            inside = {member: contents[member] for member in members}
            pack(tmp_path / file_name(url), inside)
            archives[url] = {
                member: digest and f"md5:{md5(inside[member])}"
                for member, digest in members.items()
            }
        releases = list(RELEASES[name])
        releases[release] = releases[release]._replace(archives=archives)
        monkeypatch.setitem(RELEASES, name, releases)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("name", "form", "contents"), CONTENTS, ids=[f"{name}{form}" for name, form, _ in CONTENTS]
)
def test_every_release_contains_its_images_labels_and_names(publish, name, form, contents):
    splits, names = read_archives(name, publish(name, form, contents()))
    images = GREY if name == "mnist" else COLOR
    batches = 5 if name == "cifar10" else 1
    np.testing.assert_array_equal(splits["train"]["image"], np.concatenate([images] * batches))
    np.testing.assert_array_equal(splits["test"]["image"], images[::-1])
    np.testing.assert_array_equal(splits["train"]["label"], np.tile(LABELS, batches))
    np.testing.assert_array_equal(splits["test"]["label"], LABELS[::-1])
    if name == "cifar100":
        np.testing.assert_array_equal(splits["train"]["coarse_label"], LABELS % 2)
        assert names["label"] == ["apple", "aquarium_fish", "baby"]
        assert names["coarse_label"] == ["fish", "flowers"]
    if name == "cifar10":
        assert names["label"] == ["airplane", "automobile", "bird"]


def test_recompressed_and_unpacked_archives_are_accepted(publish):
    folder = publish("mnist", 0, mnist())
    expected = read_archives("mnist", folder)
    images = folder / "train-images-idx3-ubyte.gz"
    content = gzip.decompress(images.read_bytes())
    images.write_bytes(gzip.compress(content, 1))
    labels = folder / "t10k-labels-idx1-ubyte.gz"
    (folder / "t10k-labels-idx1-ubyte").write_bytes(gzip.decompress(labels.read_bytes()))
    labels.unlink()
    again = read_archives("mnist", folder)
    np.testing.assert_array_equal(again.splits["train"]["image"], expected.splits["train"]["image"])


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_changed_content_is_refused_with_both_digests(publish, name):
    contents = mnist() if name == "mnist" else cifar10_binary()
    folder = publish(name, 0, contents)
    file, members = first_archive(name)
    member = next(iter(members))
    before = contents[member]
    contents[member] = before[:-1] + bytes([before[-1] ^ 1])
    pack(folder / file, {inside: contents[inside] for inside in members})
    with pytest.raises(DataError) as refused:
        read_archives(name, folder)
    for said in (f"{folder / file}: {member}", *map(md5, (before, contents[member]))):
        assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn_cropped"])
def test_a_truncated_archive_is_named(publish, name):
    contents = {"mnist": mnist, "cifar10": cifar10_binary, "svhn_cropped": svhn}[name]()
    folder = publish(name, 0, contents)
    path = folder / first_archive(name)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"^{path}") as refused:
        read_archives(name, folder)
    assert "\n" not in str(refused.value)


def test_missing_archives_of_every_release_are_listed(publish):
    folder = publish("mnist", 0, mnist())
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"lacks t10k-labels-idx1-ubyte\.gz$"):
        read_archives("mnist", folder)
    with pytest.raises(DataError, match=r"lacks cifar-10-binary.tar.gz, or cifar-10-python.tar.gz"):
        read_archives("cifar10", folder)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        read_archives("cifar10", folder / "nowhere")


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(publish, monkeypatch):
    """Serves small archives in MNIST's format."""
    folder = publish("mnist", 0, mnist())
    handler = partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        form = RELEASES["mnist"][0]
        url = f"http://127.0.0.1:{server.server_port}"
        archives = {f"{url}/{file_name(old)}": new for old, new in form.archives.items()}
        monkeypatch.setitem(RELEASES, "mnist", [form._replace(archives=archives)])
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_archives_are_downloaded_once(served, tmp_path):
    said = []
    download_archives("mnist", tmp_path / "here", said.append)
    assert len(said) == 4
    assert len(read_archives("mnist", tmp_path / "here").splits["test"]["label"]) == 7
    download_archives("mnist", tmp_path / "here", said.append)
    assert len(said) == 4


def test_a_failed_download_names_the_file_and_the_alternative(served, tmp_path, publish):
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"t10k-images.*: cannot be .*; .*--from=DIR$"):
        download_archives("mnist", tmp_path / "here", lambda said: None)
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
    ]


@pytest.mark.skipif(not DEBIAN.exists(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_as_debian_packs_it_has_the_published_statistics():
    splits, _ = read_archives("fashion_mnist", DEBIAN)
    images, labels = splits["train"]["image"], splits["train"]["label"]
    assert (images.shape, splits["test"]["image"].shape) == ((60_000, 28, 28), (10_000, 28, 28))
    assert set(np.bincount(labels)) == {6_000}
    counts = np.bincount(images.ravel(), minlength=256) / images.size
    mean = counts @ np.arange(256)
    deviation = np.sqrt(counts @ (np.arange(256) - mean) ** 2)
    assert mean / 255 == pytest.approx(0.2860, abs=5e-5)
    assert deviation / 255 == pytest.approx(0.3530, abs=5e-5)
