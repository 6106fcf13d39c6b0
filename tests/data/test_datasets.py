"""Loading datasets and subsets of them, and the errors if that is impossible."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from resjax.data import DATASETS
from resjax.data.datasets import DataError, NotPreparedError, Split, load
from resjax.data.subsets import sample_per_class


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_digits_have_1437_training_and_360_test_images(digits):
    spec = DATASETS["digits"]
    assert digits.train.images.shape == (1_437, 8, 8, 1) == (spec.train_images, *spec.image_shape)
    assert digits.test.images.shape == (360, 8, 8, 1) == (spec.test_images, *spec.image_shape)
    assert (len(digits.train.labels), len(digits.test.labels)) == (1_437, 360)


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_are_uint8_and_labels_int32_of_every_class(digits, split):
    part = getattr(digits, split)
    images, labels = part.images, part.labels
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    assert set(labels.tolist()) == set(range(DATASETS["digits"].classes))
    assert digits.class_names == tuple("0123456789")


def test_digits_are_scikit_learns_in_order_scaled_to_255(digits):
    bunch = load_digits()
    images = np.concatenate([digits.train.images, digits.test.images])[..., 0]
    assert (images.min(), images.max()) == (0, 255)
    assert np.abs(images / 255 - bunch.images / 16).max() <= 0.5 / 255
    assert (np.concatenate([digits.train.labels, digits.test.labels]) == bunch.target).all()


def test_no_test_digit_is_a_training_digit(digits):
    train = {image.tobytes() for image in digits.train.images}
    assert not any(image.tobytes() in train for image in digits.test.images)


def test_a_dataset_that_is_not_prepared_is_an_error_that_says_how_to_prepare_it(data_folder):
    with pytest.raises(NotPreparedError, match=r"'cifar10' is not prepared .*; embedded: digits"):
        load("cifar10")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar01", "no dataset 'cifar01'; did you mean 'cifar10'?"),
        ("xyz", "no dataset 'xyz'; known: digits, scenes, nuclei, cifar10, "),
        ("folders:x", "(your own data: tfds:NAME, folder:PATH, npz:PATH, masks:PATH, coco:PATH)"),
    ],
)
def test_a_misspelled_name_is_an_error_with_a_suggestion(name, message):
    with pytest.raises(DataError) as refused:
        load(name)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_split_expressions_select_parts(digits):
    data = load("digits", "train[:90%]", "train[90%:]+test[:10]")
    assert (data.train.images == digits.train.images[:1293]).all()
    assert (data.test.labels == [*digits.train.labels[1293:], *digits.test.labels[:10]]).all()


def test_images_in_memory_can_be_resized():
    data = load("digits", image_size=12)
    assert data.train.images.shape == (1_437, 12, 12, 1)


def test_selected_classes_are_relabeled_in_their_given_order(digits):
    part = load("digits", classes=(7, 3))
    assert part.class_names == ("7", "3")
    for split, whole in ((part.train, digits.train), (part.test, digits.test)):
        kept = np.isin(whole.labels, (3, 7))
        assert (split.images == whole.images[kept]).all()
        assert (np.array([7, 3])[split.labels] == whole.labels[kept]).all()
        assert split.labels.dtype == np.int32


def test_per_class_samples_training_examples_only(digits):
    part = load("digits", classes=(7, 3, 5), per_class=4)
    assert np.bincount(part.train.labels).tolist() == [4, 4, 4]
    assert (part.test.labels == load("digits", classes=(7, 3, 5)).test.labels).all()
    of_label = {
        label: {image.tobytes() for image in digits.train.images[digits.train.labels == number]}
        for label, number in enumerate((7, 3, 5))
    }
    images, labels = part.train.images, part.train.labels
    assert all(
        image.tobytes() in of_label[label] for image, label in zip(images, labels, strict=True)
    )


def test_a_sample_depends_on_its_seed():
    first, again, other = (load("digits", per_class=3, subset_seed=n).train for n in (1, 1, 2))
    assert (first.images == again.images).all()
    assert (first.images != other.images).any()


@given(
    st.permutations(4 * [0, 1, 2] + [0, 0, 2]),
    st.tuples(st.integers(1, 4), st.integers(1, 4)).map(sorted),
    st.integers(0, 9),
)
def test_a_larger_sample_contains_the_smaller_one(labels, counts, seed):
    rows = np.arange(len(labels)).reshape(-1, 1, 1, 1)  # each image is its row number
    split = Split.labeled(rows, np.array(labels))
    smaller, larger = (
        sample_per_class(split, count, seed, "abc").images.ravel() for count in counts
    )
    assert set(smaller) <= set(larger)
    assert (np.diff(larger) > 0).all()
    assert np.bincount(split.labels[larger]).tolist() == 3 * [counts[1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": (0, 10)}, "data.classes: digits has no class 10, only 0, 1, 2"),
        ({"per_class": 143}, "data.per_class=143: class '2' has 142 training examples"),
        ({"classes": (8, 9), "test_split": "test[:3]"}, "no example of the classes 8, 9"),
    ],
)
def test_an_impossible_subset_is_an_error(options, message):
    with pytest.raises(DataError) as refused:
        load("digits", **options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def gradient(height, width):
    return np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)


def test_images_of_different_sizes_need_image_size(write_folder):
    files = {"a/1.png": gradient(8, 8), "a/2.png": gradient(6, 9), "a/3.png": gradient(5, 4)}
    name = f"folder:{write_folder(files)}"
    with pytest.raises(DataError, match=r"a/2.png has 6x9 pixels, others 8x8: set data.image_size"):
        load(name)
    assert load(name, image_size=4).train.images.shape == (2, 4, 4, 3)


def test_a_test_split_of_another_size_needs_image_size(write_folder):
    name = f"folder:{write_folder({'a/1.png': gradient(8, 8), 'a/2.png': gradient(6, 9)})}"
    with pytest.raises(DataError, match="test split has 6x9 pixels, others 8x8: set data"):
        load(name)


def test_bad_images_are_an_error_or_skipped_and_counted(write_folder):
    files = {f"{name}/{number}.png": gradient(4, 4) for name in "ab" for number in range(5)}
    name = f"folder:{write_folder(files | {'a/1.png': b'no image', 'b/4.png': b''})}"
    with pytest.raises(DataError, match=r"a/1.png: cannot be decoded"):
        load(name)
    data = load(name, on_bad_image="skip", test_split="test+train[:1]")
    assert data.skipped == 2
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 0]
    with pytest.raises(DataError, match=r"none of 1 images can be decoded; the last: .*a/1.png: "):
        load(name, "train[1:2]", on_bad_image="skip")


def test_synthetic_datasets_have_their_shape_and_are_deterministic(monkeypatch):
    spec = DATASETS["synthetic_imagenet"]._replace(train_images=3, test_images=2)
    monkeypatch.setitem(DATASETS, "synthetic_imagenet", spec)
    first, second = load("synthetic_imagenet"), load("synthetic_imagenet")
    assert first.train.images.shape == (3, 224, 224, 3)
    assert first.test.images.shape == (2, 224, 224, 3)
    assert first.train.images.dtype == np.uint8
    assert len(first.class_names) == 1000
    np.testing.assert_array_equal(first.train.images, second.train.images)
    assert not np.array_equal(first.train.images[:2], first.test.images)
