"""Decoded images are read from the cache; damage and a full disk only cost time."""

import numpy as np
import pytest

from resjax.data import datasets
from resjax.data.cache import FOLDER, cached_arrays
from resjax.data.datasets import load


@pytest.fixture
def shapes(write_images, noise):
    return write_images(train=noise(30), test=noise(12, seed=1))


@pytest.fixture
def decoded(monkeypatch):
    """The origins of all decoded images."""
    origins = []
    decode = datasets.decode

    def noted(data, channels, origin):
        origins.append(origin)
        return decode(data, channels, origin)

    monkeypatch.setattr(datasets, "decode", noted)
    return origins


def assert_same(first, second):
    for one, other in ((first.train, second.train), (first.test, second.test)):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)


def test_a_second_load_decodes_nothing(shapes, decoded):
    first = load("tfds:shapes")
    assert len(decoded) == 42
    assert_same(first, load("tfds:shapes"))
    assert len(decoded) == 42


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_damaged_array_is_decoded_again(shapes, decoded, fraction):
    first = load("tfds:shapes")
    (path,) = (shapes / FOLDER).glob("train*.npz")
    content = bytearray(path.read_bytes())
    content[int(fraction * len(content))] ^= 1
    path.write_bytes(content)
    assert_same(first, load("tfds:shapes"))
    assert len(decoded) == 42 + 30
    assert_same(first, load("tfds:shapes"))
    assert len(decoded) == 42 + 30


def test_a_damaged_shape_is_noticed_though_fewer_bytes_are_read(tmp_path):
    array = np.arange(30_000)
    cached_arrays(tmp_path, "numbers", lambda: {"numbers": array})
    path = tmp_path / FOLDER / "numbers.npz"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"'shape': (30000", b"'shape': (20000"))
    again = cached_arrays(tmp_path, "numbers", lambda: {"numbers": array})
    np.testing.assert_array_equal(again["numbers"], array)


def test_splits_and_sizes_are_cached_separately(shapes, decoded):
    whole = load("tfds:shapes")
    part = load("tfds:shapes", "train[:10]", "train[10:]")
    np.testing.assert_array_equal(part.train.images, whole.train.images[:10])
    np.testing.assert_array_equal(part.test.labels, whole.train.labels[10:])
    assert load("tfds:shapes", image_size=2).train.images.shape == (30, 2, 2, 3)
    assert_same(whole, load("tfds:shapes"))


def test_a_folder_that_cannot_be_written_is_no_error(shapes, decoded):
    (shapes / FOLDER).touch()  # so no user can create the folder
    assert_same(load("tfds:shapes"), load("tfds:shapes"))
    assert len(decoded) == 84


def test_images_skipped_by_one_load_are_an_error_of_another(write_images, noise):
    bad = noise(4)
    bad[2]["image"].seek(0)
    bad[2]["image"].write(b"broken")
    write_images(train=bad, test=noise(3))
    for _ in range(2):
        assert load("tfds:shapes", on_bad_image="skip").skipped == 1
    with pytest.raises(datasets.BadImageError, match=r"tfds:shapes train\[\d\]: cannot be decoded"):
        load("tfds:shapes")
