"""The embedded dataset, and the refusal of those that are not here."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from resjax.data import DATASETS
from resjax.data.datasets import NotPreparedError, load


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_digits_are_1437_to_train_and_360_to_test(digits):
    spec = DATASETS["digits"]
    assert digits.train.images.shape == (1_437, 8, 8, 1) == (spec.train_images, *spec.image_shape)
    assert digits.test.images.shape == (360, 8, 8, 1) == (spec.test_images, *spec.image_shape)
    assert (len(digits.train.labels), len(digits.test.labels)) == (1_437, 360)


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_are_bytes_and_labels_whole_numbers_of_every_class(digits, split):
    images, labels = getattr(digits, split)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    assert set(labels.tolist()) == set(range(DATASETS["digits"].classes))
    assert digits.class_names == tuple("0123456789")


def test_digits_are_scikit_learns_in_their_order_from_0_to_255(digits):
    bunch = load_digits()
    images = np.concatenate([digits.train.images, digits.test.images])[..., 0]
    assert (images.min(), images.max()) == (0, 255)
    assert np.abs(images / 255 - bunch.images / 16).max() <= 0.5 / 255
    assert (np.concatenate([digits.train.labels, digits.test.labels]) == bunch.target).all()


def test_the_split_is_fixed(digits):
    again = load("digits")
    assert (again.test.images == digits.test.images).all()
    assert (again.train.images == digits.train.images).all()


def test_no_test_digit_is_a_training_digit(digits):
    train = {image.tobytes() for image in digits.train.images}
    assert not any(image.tobytes() in train for image in digits.test.images)


def test_a_known_dataset_that_is_not_here_is_refused_in_one_line():
    with pytest.raises(NotPreparedError, match=r"'cifar10' is not prepared .*; embedded: digits"):
        load("cifar10")


def test_noise_has_its_datasets_shape_and_is_the_same_every_time(monkeypatch):
    spec = DATASETS["synthetic_imagenet"]._replace(train_images=3, test_images=2)
    monkeypatch.setitem(DATASETS, "synthetic_imagenet", spec)
    first, second = load("synthetic_imagenet"), load("synthetic_imagenet")
    assert first.train.images.shape == (3, 224, 224, 3)
    assert first.test.images.shape == (2, 224, 224, 3)
    assert first.train.images.dtype == np.uint8
    assert len(first.class_names) == 1000
    np.testing.assert_array_equal(first.train.images, second.train.images)
    assert not np.array_equal(first.train.images[:2], first.test.images)
