"""Pixels as those see them who trained the weights; torchvision's transforms are the measure."""

import numpy as np
import pytest
from PIL import Image

from resjax.data.crops import resize_and_center_crop
from resjax.transfer.pixels import preprocess
from resjax.transfer.weights import Preprocessing


@pytest.fixture
def photo(photos):
    """Of 90 x 70 pixels."""
    return Image.fromarray(np.concatenate(np.split(photos[:12], 3), 1).reshape(-1, 128, 3)).resize(
        (90, 70)
    )


def test_the_usual_cut_is_that_of_a_streams_evaluation(photo):
    pixels = preprocess(photo, preprocessing=Preprocessing(28, 32))
    np.testing.assert_array_equal(pixels, resize_and_center_crop(photo, None, size=28))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_interpolation_and_squashing_are_pillows(photo, interpolation):
    asked = Preprocessing(24, 30, interpolation=interpolation, squash=True)
    expected = photo.resize((30, 30), Image.Resampling[interpolation.upper()]).crop((3, 3, 27, 27))
    np.testing.assert_array_equal(preprocess(photo, preprocessing=asked), expected)


def test_an_image_of_the_right_size_stays_as_it_is(photos):
    pixels = preprocess(Image.fromarray(photos[0]), preprocessing=Preprocessing(32, 32))
    np.testing.assert_array_equal(pixels, photos[0])


def test_a_square_as_wide_as_the_shorter_side_is_cut_in_the_middle(photo):
    pixels = preprocess(photo, preprocessing=Preprocessing(35, 35, interpolation="bicubic"))
    expected = photo.resize((35, 35), Image.Resampling.BICUBIC, box=(10, 0, 80, 70))
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(("channels", "mode"), [(1, "RGB"), (3, "L"), (3, "RGB"), (1, "L")])
def test_grey_and_colour_become_what_the_weights_take(photo, channels, mode):
    asked = Preprocessing(28, 32, channels)
    pixels = preprocess(photo.convert(mode), preprocessing=asked)
    assert pixels.shape == (28, 28, channels)
