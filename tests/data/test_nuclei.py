"""The tiles of stardist's image of nuclei, and what happens without the file."""

import sys

import numpy as np
import pytest
from PIL import Image

from resjax.cli import main
from resjax.data import DATASETS, nuclei
from resjax.data.datasets import DataError, load


@pytest.fixture(scope="module")
def folder():
    if (found := nuclei.images_folder()) is None:
        pytest.skip("needs the extra `nuclei`")
    return found


@pytest.fixture(scope="module")
def data(folder):
    return load("nuclei")


def read(file):
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def put_together(split, rows):
    """Returns the part of the image that a split's tiles show, as one array."""
    tiles = split.reshape(rows, 8, 64, 64)
    return np.block([[tiles[row, column] for column in range(8)] for row in range(rows)])


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """Puts a package `stardist` that cannot be imported first; returns its folder of images."""
    monkeypatch.syspath_prepend(tmp_path)
    images = tmp_path / "stardist" / "data" / "images"
    images.mkdir(parents=True)
    (tmp_path / "stardist" / "__init__.py").write_text("raise RuntimeError")
    return images


def test_the_tiles_are_those_that_the_table_of_datasets_lists(data):
    spec = DATASETS["nuclei"]
    assert data.train.images.shape == (spec.train_images, *spec.image_shape)
    assert data.test.images.shape == (spec.test_images, *spec.image_shape)
    assert data.train.images.dtype == np.uint8
    assert data.class_names == ("background", "nucleus")
    assert "stardist" not in sys.modules


def test_training_and_test_tiles_are_separate_regions_of_the_image(data, folder):
    labels = read(folder / "mask2d.tif") > 0
    assert (put_together(data.train.targets["mask"], 6) == labels[:384]).all()
    assert (put_together(data.test.targets["mask"], 2) == labels[384:]).all()


def test_percentiles_of_the_training_pixels_are_black_and_white(data, folder):
    intensities = read(folder / "img2d.tif")
    ends = np.percentile(intensities[:384], (1, 99.8))
    expected = np.interp(intensities, ends, (0, 255))
    found = np.concatenate([put_together(data.train.images, 6), put_together(data.test.images, 2)])
    assert np.abs(found - expected).max() <= 0.5 + 1e-6
    assert (found.min(), found.max()) == (0, 255)


def test_every_box_bounds_one_labelled_nucleus_of_its_tile(data, folder):
    labels = read(folder / "mask2d.tif")
    boxes = np.concatenate([split.targets["boxes"] for split in (data.train, data.test)])
    classes = np.concatenate([split.targets["classes"] for split in (data.train, data.test)])
    for tile in range(64):
        top, left = 64 * (tile // 8), 64 * (tile % 8)
        own = labels[top : top + 64, left : left + 64]
        expected = []
        for label in sorted({*own.ravel()} - {0}):
            rows, columns = np.nonzero(own == label)
            expected.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        count = len(expected)
        assert boxes[tile, :count].tolist() == expected
        assert classes[tile].tolist() == [1] * count + [0] * (classes.shape[1] - count)


def test_without_the_extra_one_line_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "stardist", None)
    with pytest.raises(
        DataError, match=r"needs stardist.* pip install 'resjax\[nuclei\]'"
    ) as refused:
        load("nuclei")
    assert "\n" not in str(refused.value)
    assert main(["data", "list"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("nuclei"))
    assert row.endswith("needs the extra nuclei")


def test_a_missing_or_changed_file_is_refused(fake_package):
    with pytest.raises(DataError, match=r"images/img2d.tif: cannot be read"):
        load("nuclei")
    Image.new("L", (512, 512)).save(fake_package / "img2d.tif")
    with pytest.raises(DataError, match=r"images/img2d.tif: is not the file of stardist 0.9.2"):
        load("nuclei")
