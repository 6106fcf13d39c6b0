"""User data in folders and .npz files: layouts, default splits and errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resjax.data.datasets import DataError, load, open_dataset
from resjax.data.user_data import hold_out_fifth

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def files(*names):
    return {name: PIXELS + number for number, name in enumerate(names)}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_the_last_fifth_of_each_class_is_held_out(labels):
    labels = np.array(labels)
    train, test = hold_out_fifth(labels)
    assert sorted([*train, *test]) == list(range(len(labels)))
    for label in np.unique(labels):
        first, last = (part[labels[part] == label] for part in (train, test))
        count = len(first) + len(last)
        assert len(last) == (0 if count == 1 else max(1, count // 5))
        assert [*first, *last] == list(np.flatnonzero(labels == label))


def test_sorted_class_folders_are_the_labels(write_folder):
    root = write_folder(
        files("dog/1.png", "cat/a/1.PNG", "cat/2.png", "dog/2.png", "cat/.hidden.png", "cat/x.txt")
    )
    data = load(f"folder:{root}")
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 1]
    assert (data.train.images == [PIXELS + 2, PIXELS]).all()  # cat/2.png before cat/a/1.PNG
    assert (data.test.images == [PIXELS + 1, PIXELS + 3]).all()


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_a_folder_may_contain_a_test_part(write_folder, name):
    root = write_folder(files("train/a/1.png", "train/b/1.png", f"{name}/b/1.png"))
    data = load(f"folder:{root}")
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1], [1])
    assert (data.test.images == PIXELS + 2).all()
    opened = open_dataset(f"folder:{root}")
    assert opened.image_shape is None
    assert opened.test[0].origin == str(root / name / "b" / "1.png")
    assert opened.test[0].image == (root / name / "b" / "1.png").read_bytes()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (["a/1.png", "b/1.txt"], "images/b: contains no image"),
        (["train/a/1.png", "test/b/1.png"], "images/test/b: the training part has no such class"),
        (["train/a/1.png"], "has no test split, only train; set data.train_split and"),
        (["1.png"], "images: contains no folder"),
    ],
)
def test_another_layout_is_an_error(write_folder, tree, message):
    root = write_folder(files(*tree))
    with pytest.raises(DataError, match=message) as refused:
        open_dataset(f"folder:{root}")
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(write_folder):
    root = write_folder(files("a/1.png", "a/2.png"))
    train = open_dataset(f"folder:{root}").train
    (root / "a" / "1.png").unlink()
    with pytest.raises(DataError, match=r"a/1\.png: cannot be read: No such file"):
        train[0]


@pytest.mark.parametrize("name", ["folder:nowhere", "npz:nowhere.npz"])
def test_a_misspelled_path_is_named(name):
    with pytest.raises(DataError, match=r"^nowhere(\.npz)?: no such"):
        open_dataset(name)


IMAGES = np.random.default_rng(0).integers(0, 256, (20, 5, 6, 3), np.uint8)
LABELS = np.arange(20) % 4
PARTS = {
    "x_train": IMAGES[:12],
    "y_train": LABELS[:12],
    "x_test": IMAGES[12:],
    "y_test": LABELS[12:],
}
WHOLE = {"images": IMAGES, "labels": LABELS}


@pytest.fixture
def npz(tmp_path):
    def write(arrays):
        np.savez(tmp_path / "mine.npz", **arrays)
        return f"npz:{tmp_path / 'mine.npz'}"

    return write


def test_an_npz_file_may_contain_train_and_test_parts(npz):
    data = load(npz(PARTS))
    np.testing.assert_array_equal(data.train.images, IMAGES[:12])
    np.testing.assert_array_equal(data.test.labels, LABELS[12:])
    assert data.train.labels.dtype == np.int32
    assert data.class_names == ("0", "1", "2", "3")


def test_an_npz_file_without_parts_holds_out_a_fifth(npz):
    data = load(npz(WHOLE | {"class_names": np.array(["a", "b", "c", "d"])}))
    np.testing.assert_array_equal(data.test.images, IMAGES[16:])
    assert data.class_names == ("a", "b", "c", "d")


def test_grayscale_images_may_lack_the_channel_axis(npz):
    opened = open_dataset(npz(WHOLE | {"images": IMAGES[..., 0]}))
    assert opened.image_shape == (5, 6, 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": IMAGES}, "contains a; it needs x_train, "),
        (WHOLE | {"images": IMAGES / 255}, r"images is float64 of shape \(20, 5, 6, 3\)"),
        (WHOLE | {"images": IMAGES[..., :2]}, r"of shape \(20, 5, 6, 2\)"),
        (WHOLE | {"labels": LABELS / 1}, "labels is float64"),
        (WHOLE | {"labels": LABELS[:, None]}, r"labels is int64 of shape \(20, 1\)"),
        (WHOLE | {"labels": LABELS[:-1]}, r"must be integers of shape \(20,\)"),
        (WHOLE | {"labels": LABELS - 1}, "a label is -1; classes are numbered from 0"),
        (WHOLE | {"labels": LABELS * 2}, "no label is 1, but one is 6"),
        (WHOLE | {"class_names": np.array(["a"])}, "a label is 3, but class_names has 1"),
        (PARTS | {"x_test": IMAGES[12:, :4]}, "x_train and x_test differ in shape"),
        (PARTS | {"x_test": IMAGES[:0], "y_test": LABELS[:0]}, "x_test is empty"),
        ({"images": IMAGES, "labels": np.array([{}] * 20)}, "cannot be read as an .npz file"),
    ],
)
def test_unsuitable_arrays_are_an_error(npz, arrays, message):
    name = npz(arrays)
    with pytest.raises(DataError, match=message) as refused:
        open_dataset(name)
    assert "mine.npz: " in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "npy"])
def test_a_damaged_npz_file_is_an_error(npz, damage, tmp_path):
    name = npz(WHOLE)
    path = tmp_path / "mine.npz"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, IMAGES)
    else:
        damaged = {"cut": content[:900], "flipped": content, "text": b"images, labels"}[damage]
        path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"mine\.npz: cannot be read as an \.npz file"):
        open_dataset(name)
