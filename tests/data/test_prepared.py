"""Datasets that TFDS prepared are read as TFDS reads them; others are errors."""

import io
import json
import os
import pickle
import resource
import shutil
import socket

import numpy as np
import pytest
from PIL import Image

from resjax.data.datasets import DataError, NotPreparedError, load, open_dataset
from resjax.data.decoding import decode
from resjax.data.examples import BOXES
from resjax.data.prepared import list_prepared


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("used the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def shapes(write_images, noise):
    return write_images(train=noise(30), test=noise(12, seed=1))


@pytest.mark.parametrize("split", ["train", "test", "train[:50%]", "train[70%:]+test[-3:]"])
def test_every_split_equals_that_of_tfds(shapes, split):
    import tensorflow_datasets as tfds

    ours = open_dataset("tfds:shapes", split).train
    stock = tfds.builder_from_directory(shapes).as_data_source(split)
    assert len(ours) == len(stock)
    for index, expected in enumerate(stock):
        image, targets, _ = ours[index]
        np.testing.assert_array_equal(decode(image, 3, ""), expected["image"])
        assert targets == {"label": expected["label"]}


def test_a_split_in_several_files_is_one_sequence(write_images, noise):
    folder = write_images(train=noise(30), test=noise(12), shards=4)
    assert len(list(folder.glob("*train*of-00004"))) == 4
    test_every_split_equals_that_of_tfds(folder, "train[20%:]+test")


def test_a_split_may_have_more_files_than_the_soft_limit_of_open_files(write_images, noise):
    write_images(train=noise(40), test=noise(40), shards=40)
    train = open_dataset("tfds:shapes").train
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        opened = len(os.listdir("/dev/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 10, before[1]))
        assert len([train[index] for index in range(len(train))]) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_examples_are_encoded_images_with_split_and_index_as_origin(shapes):
    opened = open_dataset("tfds:shapes")
    example = opened.test[7]
    assert example.image.startswith(b"\x89PNG")
    assert example.origin == "tfds:shapes test[7]"
    assert (opened.class_names, opened.image_shape) == (("0", "1", "2"), (4, 4, 3))


def test_a_pickled_split_is_small_and_reads_the_same(shapes):
    train = open_dataset("tfds:shapes").train
    first = train[0]
    packed = pickle.dumps(train)
    assert len(packed) < 1000
    assert pickle.loads(packed)[0] == first


def test_images_of_many_sizes_have_no_shape(write_images, noise):
    write_images(shape=(None, None, 3), train=noise(3), test=noise(3))
    assert open_dataset("tfds:shapes").image_shape is None


def test_an_unprepared_dataset_is_an_error_without_network_access(data_folder, no_network):
    message = "is not prepared in .*/tfds: run `resjax data prepare .*; embedded: digits"
    for name in ("cifar10", "tfds:caltech101", "tfds:nothing/such:1.0.0"):
        with pytest.raises(NotPreparedError, match=message):
            open_dataset(name)


def test_the_newest_version_is_read_unless_the_name_selects_another(write_images, noise, write_set):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(4, 4, 3)),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    for version, count in (("1.9.0", 3), ("1.10.0", 6), ("0.1.0", 9)):
        splits = {"train": noise(count), "test": noise(3)}
        write_set("shapes", features, splits, version)
    assert len(open_dataset("tfds:shapes").train) == 6
    assert len(open_dataset("tfds:shapes:0.1.0").train) == 9


def test_a_configuration_is_named_or_the_only_one(shapes):
    root = shapes.parent
    shutil.copytree(shapes, root / "plain" / "1.0.0")
    shutil.rmtree(shapes)
    assert len(open_dataset("tfds:shapes/plain").train) == 30
    assert len(open_dataset("tfds:shapes").train) == 30
    shutil.copytree(root / "plain", root / "rotated")
    with pytest.raises(DataError, match="several configurations; name one: shapes/plain"):
        open_dataset("tfds:shapes")
    (root / ".config").mkdir()
    (root / ".config" / "metadata.json").write_text('{"default_config_name": "rotated"}')
    assert "rotated" in str(open_dataset("tfds:shapes").train.parts[0][0].folder)


def test_a_dataset_in_tfrecord_format_is_an_error(shapes):
    info = shapes / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match="tfrecord files, which need TensorFlow; prepare it"):
        open_dataset("tfds:shapes")


def test_a_dataset_without_images_is_an_error_that_lists_its_features(write_set):
    import tensorflow_datasets as tfds

    write_set("words", {"text": tfds.features.Text()}, {"train": [{"text": "a"}]})
    with pytest.raises(DataError, match=r"words has no images with labels, .* text \(Text\)"):
        open_dataset("tfds:words")


def test_a_dataset_without_a_test_split_needs_split_expressions(write_images, noise):
    write_images(train=noise(10))
    with pytest.raises(DataError, match="has no test split, only train; set data"):
        open_dataset("tfds:shapes")
    opened = open_dataset("tfds:shapes", "train[:80%]", "train[80%:]")
    assert (len(opened.train), len(opened.test)) == (8, 2)


def test_a_label_out_of_range_is_an_error_with_its_origin(shapes):
    features = shapes / "features.json"
    features.write_text(features.read_text().replace('"numClasses": "3"', '"numClasses": "2"'))
    train = open_dataset("tfds:shapes").train
    with pytest.raises(DataError, match=r"^tfds:shapes train\[\d+\]: its label is 2, but there"):
        [train[index] for index in range(len(train))]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_named(shapes, damage):
    (path,) = shapes.glob("*train*")
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:800] if damage == "cut" else content)
    train = open_dataset("tfds:shapes").train
    with pytest.raises(DataError, match=rf"^{path}: record \d+ cannot be read: ") as refused:
        [train[index] for index in range(len(train))]
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_damaged_description_is_named(shapes, name):
    (shapes / name).write_text('{"featuresDict": ')
    with pytest.raises(DataError, match=rf"^{shapes}: cannot be read, prepare it again") as refused:
        open_dataset("tfds:shapes")
    assert "\n" not in str(refused.value)


def test_the_listing_has_the_splits_and_size_of_each_dataset(shapes):
    (listed,) = list_prepared()
    assert (listed.name, listed.folder, listed.format) == ("shapes", shapes, "array_record")
    assert listed.images == {"train": 30, "test": 12}
    assert listed.bytes == sum(file.stat().st_size for file in shapes.iterdir())


def test_the_listing_names_a_dataset_whose_description_is_damaged(shapes):
    (shapes / "dataset_info.json").write_text(json.dumps({"name": "shapes"}))
    with pytest.raises(DataError, match=f"^{shapes}: damaged"):
        list(list_prepared())


def encoded(array):
    file = io.BytesIO()
    Image.fromarray(array.squeeze()).save(file, "PNG")
    file.seek(0)
    return file


def test_boxes_of_a_detection_set_are_read_without_crowds_and_difficult_objects(write_set):
    import tensorflow_datasets as tfds

    objects = {
        "bbox": tfds.features.BBoxFeature(),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        "is_crowd": np.bool_,
        "is_difficult": np.bool_,
    }
    features = {"image": tfds.features.Image(), "objects": tfds.features.Sequence(objects)}

    def record(*found):
        boxed = [
            {
                "bbox": tfds.features.BBox(*box),
                "label": label,
                "is_crowd": crowd,
                "is_difficult": hard,
            }
            for box, label, crowd, hard in found
        ]
        return {"image": encoded(np.zeros((20, 40, 3), np.uint8)), "objects": boxed}

    half, whole = (0.0, 0.5, 0.5, 1.0), (0.0, 0.0, 1.0, 1.0)  # top, left, bottom, right
    several = record((half, 1, False, False), (whole, 0, True, False), (whole, 0, False, True))
    write_set("boxes", features, {"train": [several], "test": [record()]})
    opened = open_dataset("tfds:boxes")
    assert (opened.class_names, opened.targets) == (("background", "cat", "dog"), BOXES)
    targets = opened.train[0].targets
    assert targets["boxes"].shape == (opened.objects, 4)
    assert targets["boxes"][:2].tolist() == [[20, 0, 40, 10], [0, 0, 0, 0]]
    assert targets["classes"][:2].tolist() == [2, 0]
    assert not opened.test[0].targets["classes"].any()


@pytest.mark.parametrize("feature", ["annotation", "segmentation_mask"])
def test_masks_of_a_segmentation_set_are_read_and_their_values_counted(write_set, feature):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(),
        feature: tfds.features.Image(shape=(None, None, 1)),
    }
    masks = [np.full((4, 6, 1), value, np.uint8) for value in (0, 2, 255)]
    image = np.zeros((4, 6, 3), np.uint8)
    records = [{"image": encoded(image), feature: encoded(mask)} for mask in masks]
    folder = write_set("masks", features, {"train": records})
    splits = "train", "train[:1]"
    opened = open_dataset("tfds:masks", *splits)
    assert (opened.class_names, opened.targets) == (("0", "1", "2"), ("mask",))
    read = sorted(int(opened.train[index].targets["mask"].max()) for index in range(3))
    assert read == [0, 2, 255]
    assert len(list((folder / "resjax").iterdir())) == 1  # so they are counted once
    data = load("tfds:masks", *splits, image_size=4)
    again = load("tfds:masks", *splits, image_size=4)
    assert data.train.images.shape == (3, 4, 4, 3)
    for name, array in data.train.arrays.items():
        np.testing.assert_array_equal(array, again.train.arrays[name])
