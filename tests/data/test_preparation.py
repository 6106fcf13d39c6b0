"""A dataset prepared without TensorFlow equals TFDS's own, and is complete or absent."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from resjax.data import preparation
from resjax.data.archives import Content
from resjax.data.datasets import DataError, load
from resjax.data.preparation import prepare

GENERATOR = np.random.default_rng(0)


def columns(count, shape, classes, **features):
    return {
        "image": GENERATOR.integers(0, 256, (count, *shape), np.uint8),
        "label": np.arange(count) % classes,
        **{name: make(count) for name, make in features.items()},
    }


def ids(count):
    return [f"train_{index:05d}" for index in range(count)]


CONTENTS = {
    "mnist": Content(
        {"train": columns(20, (28, 28), 10), "test": columns(10, (28, 28), 10)},
        {},
    ),
    "cifar100": Content(
        {
            split: columns(100, (32, 32, 3), 100, id=ids, coarse_label=lambda n: [1] * n)
            for split in ("train", "test")
        },
        {
            "label": [f"fine{number}" for number in range(100)],
            "coarse_label": [f"coarse{number}" for number in range(20)],
        },
    ),
    "svhn": Content(
        {split: columns(10, (32, 32, 3), 10, id=ids) for split in ("train", "test", "extra")}, {}
    ),
}


@pytest.fixture
def archives(monkeypatch):
    """Replaces the archives of every folder by the contents above."""
    contents = CONTENTS | {"svhn_cropped": CONTENTS["svhn"]}
    monkeypatch.setattr(preparation, "read_archives", lambda name, folder: contents[name])


@pytest.mark.parametrize("name", CONTENTS)
def test_tfds_reads_the_prepared_dataset_with_all_features(name, archives, data_folder, tmp_path):
    import tensorflow_datasets as tfds

    said = []
    folder = prepare(name, tmp_path, said.append)
    content = CONTENTS[name]
    stock_name = "svhn_cropped" if name == "svhn" else name
    builder = tfds.builder_cls(stock_name)(data_dir=data_folder, file_format="array_record")
    assert str(builder.data_path) == str(folder)
    assert set(builder.info.splits) == set(content.splits)
    for split, expected in content.splits.items():
        found = list(builder.as_data_source(split))
        images = np.stack([record["image"] for record in found])
        wanted = expected["image"].reshape(images.shape)
        order = np.lexsort(images.reshape(len(images), -1).T)  # TFDS shuffles, always the same way
        ours = np.lexsort(wanted.reshape(len(wanted), -1).T)
        np.testing.assert_array_equal(images[order], wanted[ours])
        for feature in expected.keys() - {"image", "id"}:
            values = np.array([record[feature] for record in found])
            np.testing.assert_array_equal(values[order], np.array(expected[feature])[ours])
    for feature, names in content.names.items():
        assert builder.info.features[feature].names == names
    assert len(said) == 1
    assert load(name).train.images.shape == (
        len(content.splits["train"]["label"]),
        *builder.info.features["image"].shape,
    )


def test_a_prepared_dataset_is_left_unchanged(archives, data_folder, tmp_path):
    folder = prepare("mnist", tmp_path, lambda said: None)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    said = []
    assert prepare("mnist", tmp_path, said.append) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert "already prepared" in said[0]


def test_of_two_processes_that_prepare_a_dataset_at_once_both_succeed(
    archives, data_folder, tmp_path, monkeypatch
):
    read, folders = preparation.read_archives, []

    def read_beside_another(*args):
        monkeypatch.setattr(preparation, "read_archives", read)
        content = read(*args)
        encode = Image.fromarray

        def encode_beside_another(array):
            monkeypatch.setattr("PIL.Image.fromarray", encode)
            folders.append(prepare("mnist", tmp_path, lambda said: None))
            return encode(array)

        monkeypatch.setattr("PIL.Image.fromarray", encode_beside_another)
        return content

    monkeypatch.setattr(preparation, "read_archives", read_beside_another)
    folders.append(prepare("mnist", tmp_path, lambda said: None))
    assert folders[0] == folders[1]
    assert len(load("mnist").train.labels) == 20


def test_an_interrupted_preparation_leaves_no_dataset(archives, data_folder, tmp_path, monkeypatch):
    def interrupt(array):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("PIL.Image.fromarray", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare("mnist", tmp_path, lambda said: None)
    assert not list(data_folder.glob("mnist/*/dataset_info.json"))
    prepare("mnist", tmp_path, lambda said: None)
    assert len(load("mnist").train.labels) == 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar01", "did you mean 'cifar10'?"),
        ("digits", "digits needs no preparation"),
        ("folder:x", "folder:x needs no preparation"),
        ("masks:x", "masks:x needs no preparation"),
        ("coco:x", "coco:x needs no preparation"),
        ("cifar10", "lacks cifar-10-binary.tar.gz"),
    ],
)
def test_a_dataset_that_cannot_be_prepared_is_an_error(name, message, data_folder, tmp_path):
    with pytest.raises(DataError) as refused:
        prepare(name, tmp_path, lambda said: None)
    assert message in str(refused.value)
    assert not data_folder.exists()


def test_with_tensorflow_tfds_prepares_as_array_record(monkeypatch, data_folder, tmp_path):
    import tensorflow_datasets as tfds

    received = {}

    class Builder:
        def __init__(self, name, **options):
            received.update(options, name=name)

        def download_and_prepare(self, download_config):
            received["manual_dir"] = download_config.manual_dir
            folder = data_folder / "caltech101" / "1.0.0"
            folder.mkdir(parents=True)
            (folder / "dataset_info.json").touch()

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorflow")
    monkeypatch.setattr(tfds, "builder", Builder)
    folder = prepare("tfds:caltech101", tmp_path, lambda said: None)
    assert folder == data_folder / "caltech101" / "1.0.0"
    assert received == {
        "name": "caltech101",
        "data_dir": data_folder,
        "file_format": "array_record",
        "manual_dir": tmp_path,
    }


@pytest.mark.skipif(importlib.util.find_spec("tensorflow"), reason="TensorFlow is installed")
def test_without_tensorflow_other_datasets_are_an_error(data_folder):
    with pytest.raises(DataError, match=r"needs TensorFlow: pip install 'resjax\[tensorflow\]'"):
        prepare("tfds:caltech101", None, lambda said: None)
