"""User data in folders and .npz files: layouts, default splits and errors."""

import contextlib
import os
from pathlib import Path

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
        (["train/a/1.png", "Training/a/1.png"], "are both named train; rename one"),
        (["archive/train/a/1.png", "archive/test/a/1.png"], "did you mean folder:.*images/archive"),
        (["test/a/1.png", "val/a/1.png"], "contains test, val, but no train"),
        (["a/train/1.png", "a/test/1.png", "b/1.png"], "a contains train, but .*b does not"),
        (["train/a/1.png", "test/1.png"], "test: contains no folder; put the images of each class"),
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


# Which files of a tree are images of which class and part.

CLASSES = ("a/1.png", "a/2.png", "b/1.png", "b/2.png")


def origins(opened, root):
    """The files of both splits, relative to the folder."""
    return [
        [str(Path(part[index].origin).relative_to(root)) for index in range(len(part))]
        for part in (opened.train, opened.test)
    ]


HIDDEN = (
    "a/.ipynb_checkpoints/2-checkpoint.png",
    "a/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
    "a/._1.png",
    "__MACOSX/a/1.png",
    ".git/x.png",
)


def test_hidden_and_system_files_are_skipped_and_named(write_folder):
    root = write_folder(files(*CLASSES, *HIDDEN, "stray.png"))
    for junk in ("a/.DS_Store", "a/Thumbs.db", "desktop.ini", "a/notes.txt"):
        (root / junk).write_text("no image")
    (root / "a" / "@eaDir").mkdir(exist_ok=True)
    opened = open_dataset(f"folder:{root}")
    assert opened.class_names == ("a", "b")
    assert origins(opened, root) == [["a/1.png", "b/1.png"], ["a/2.png", "b/2.png"]]
    line = str(opened)
    assert line.startswith(
        "2 training images, 2 test images, 2 classes; the last fifth of each class is the test "
        "split; skipped "
    )
    for name in (".git", "__MACOSX", "stray.png", "a/.ipynb_checkpoints", "a/notes.txt"):
        assert name in line
    assert "Thumbs.db" not in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("TRAIN", "VALID"),
        ("train_images", "validation set"),
        ("Train-Set", "test.data"),
    ],
)
def test_the_usual_names_of_parts_are_recognized(write_folder, train, test):
    tree = files(f"{train}/a/1.png", f"{train}/b/1.png", f"{test}/b/1.png", "other/c/1.png")
    root = write_folder(tree)
    opened = open_dataset(f"folder:{root}")
    assert opened.class_names == ("a", "b")
    assert origins(opened, root) == [[f"{train}/a/1.png", f"{train}/b/1.png"], [f"{test}/b/1.png"]]
    assert f"parts: {train}, {test}" in str(opened)
    assert "beside the parts: other" in str(opened)
    assert len(open_dataset(f"folder:{root}", "train[:1]", test).train) == 1


def test_parts_may_lie_within_the_classes(write_folder):
    root = write_folder(files("a/train/1.png", "a/Test/1.png", "b/train/1.png", "b/Test/2.png"))
    opened = open_dataset(f"folder:{root}")
    assert opened.class_names == ("a", "b")
    assert origins(opened, root) == [
        ["a/train/1.png", "b/train/1.png"],
        ["a/Test/1.png", "b/Test/2.png"],
    ]


def test_a_test_part_is_preferred_to_validation_which_remains_a_split(write_folder):
    root = write_folder(files("train/a/1.png", "val/a/1.png", "test/a/1.png"))
    opened = open_dataset(f"folder:{root}")
    assert origins(opened, root)[1] == ["test/a/1.png"]
    for name in ("val", "validation"):
        chosen = open_dataset(f"folder:{root}", test_split=name)
        assert origins(chosen, root)[1] == ["val/a/1.png"]


def test_a_class_may_have_the_name_of_a_part(write_folder):
    root = write_folder(files("train/1.png", "train/2.png", "bus/1.png", "bus/2.png"))
    assert open_dataset(f"folder:{root}").class_names == ("bus", "train")


def test_links_are_followed_and_loops_end(write_folder, tmp_path):
    root = write_folder(files(*CLASSES))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "3.png").write_bytes((root / "a" / "1.png").read_bytes())
    (root / "a" / "more").symlink_to(elsewhere)
    (root / "a" / "again").symlink_to(elsewhere)
    for number, above in enumerate((root, root / "a", tmp_path)):
        (root / "a" / f"loop{number}").symlink_to(above)
    (root / "c").symlink_to(elsewhere)
    opened = open_dataset(f"folder:{root}")
    assert opened.class_names == ("a", "b", "c")
    train, test = origins(opened, root)
    assert sorted(train + test) == ["a/1.png", "a/2.png", "a/again/3.png", *CLASSES[2:], "c/3.png"]
    assert "a link to a folder that is read already: a/loop0, a/loop1, a/loop2" in str(opened)


def test_a_pipe_is_no_image_and_a_broken_link_an_unreadable_one(write_folder):
    root = write_folder(files("a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png"))
    os.mkfifo(root / "a" / "0.png")
    (root / "a" / "2.png").unlink()
    (root / "a" / "2.png").symlink_to("nowhere")
    name = f"folder:{root}"
    assert "neither a file nor a folder: a/0.png" in str(open_dataset(name))
    with pytest.raises(DataError, match=r"a/2\.png: cannot be read: No such file"):
        load(name)
    assert load(name, on_bad_image="skip").skipped == 1


# Some of the classes.


def test_numbers_are_names_of_classes_where_classes_are_named_by_numbers(write_folder):
    root = write_folder({f"{name}/{n}.png": PIXELS + name for name in range(12) for n in (1, 2)})
    data = load(f"folder:{root}", classes=(2, 3))
    assert data.class_names == ("2", "3")
    assert sorted(set(data.train.images[:, 0, 0, 0])) == [2, 3]
    assert "data.classes are '2', '3'" in str(data)


def test_numbers_are_indices_where_classes_have_other_names(write_folder):
    root = write_folder(files(*(f"{name}/{n}.png" for name in ("ant", "bee", "cat") for n in "12")))
    for classes in ((2, 0), ("cat", "ant"), ("cat", 0)):
        data = load(f"folder:{root}", classes=classes)
        assert data.class_names == ("cat", "ant")
        assert data.train.labels.tolist() == [1, 0]
    for classes, message in (
        ((0, 3), r"has no class 3, only ant, bee, cat \(or 0 to 2\)"),
        (("dog", "ant"), "has no class dog"),
        (("ant", 0), "0 names the class 'ant' twice"),
    ):
        with pytest.raises(DataError, match=message):
            load(f"folder:{root}", classes=classes)


def test_class_names_are_printable(write_folder):
    root = write_folder(files("a/1.png", "a/2.png", "b\x1b[31m/1.png", "b\x1b[31m/2.png"))
    with contextlib.suppress(OSError):  # a file system that takes UTF-8 names only
        (root / "a").rename(root / os.fsdecode(b"a\xff"))
    names = open_dataset(f"folder:{root}").class_names
    assert names[1] == r"b\x1b[31m"
    assert names[0] in ("a", r"a\udcff")
    assert load(f"folder:{root}").train.labels.tolist() == [0, 1]
