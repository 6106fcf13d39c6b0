"""Crops equal torchvision's and Pillow's."""

import io
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp, kstest

from resjax.data.crops import (
    Box,
    random_box,
    resampled,
    resize_and_center_crop,
    scaled,
    ten_crop,
)
from resjax.data.placement import View, random_resized, scale_jitter

TORCHVISION = dict(np.load(Path(__file__).with_name("torchvision_results.npz")))
SIDES = st.integers(1, 3000)


def sizes(name: str) -> list[tuple[int, int]]:
    return [(width, height) for width, height in TORCHVISION[name].tolist()]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photo(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    """A smooth image, which resampling preserves."""
    coarse = generator(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, channels), np.uint8)
    small = Image.fromarray(coarse.squeeze())
    return small.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image) -> Image.Image:
    """A JPEG that is opened but not decoded."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return Image.open(file)


@given(SIDES, SIDES, st.integers(0, 2**32))
def test_a_random_box_lies_within_the_image(width: int, height: int, seed: int) -> None:
    box = random_box(generator(seed), width, height)
    assert 0 <= box.left < box.right <= width
    assert 0 <= box.top < box.bottom <= height


def box_features(params: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Area, ratio and place of boxes (top, left, height, width)."""
    top, left, height, width = np.array(params, float).T
    # The position as a fraction of its range.
    row = top / np.maximum(size[1] - height, 1)
    column = left / np.maximum(size[0] - width, 1)
    return np.stack([width * height, np.log(width / height), row, column])


def random_boxes(size: tuple[int, int], draws: int = 2000) -> np.ndarray:
    boxes = [random_box(generator(seed), *size) for seed in range(draws)]
    return np.array([(b.top, b.left, b.bottom - b.top, b.right - b.left) for b in boxes])


@pytest.mark.parametrize("size", sizes("box_sizes"))
def test_random_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    ours = box_features(random_boxes(size), size)
    theirs = box_features(TORCHVISION[f"boxes, {size}"], size)
    for one, other in zip(ours, theirs, strict=True):
        assert ks_2samp(one, other).pvalue > 1e-3


def test_random_boxes_have_areas_from_8_percent_and_ratios_from_3_to_4() -> None:
    """Crops of up to 3/4 of a square fit at any aspect ratio, so their distribution is known."""
    size = 1000, 1000
    area, ratio, row, column = box_features(random_boxes(size), size)
    fits = area < 0.75e6
    assert area.min() < 0.09e6
    assert kstest(area[fits] / 1e6, "uniform", (0.08, 0.67)).pvalue > 0.01
    third = math.log(4 / 3)
    assert kstest(ratio[fits], "uniform", (-third, 2 * third)).pvalue > 0.01
    for place in (row[fits], column[fits]):
        assert kstest(place, "uniform").pvalue > 0.01


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (400, 20)])
def test_an_image_too_elongated_for_any_crop_is_cropped_at_its_center(
    size: tuple[int, int],
) -> None:
    width, height = size
    box = random_box(generator(), width, height)
    short = min(size)
    assert min(box.right - box.left, box.bottom - box.top) == short
    assert max(box.right - box.left, box.bottom - box.top) == round(short * 4 / 3)
    assert abs(box.left - (width - box.right)) <= 1
    assert abs(box.top - (height - box.bottom)) <= 1


def test_a_crop_is_resampled_like_a_cut_image() -> None:
    image, box = photo(500, 375), Box(40, 30, 340, 330)
    cut = image.crop((40, 30, 340, 330)).resize((224, 224), Image.Resampling.BILINEAR)
    # At the edges ours uses neighbors that a cut image does not have.
    difference = np.abs(resampled(image, box, 224).astype(int) - np.asarray(cut))[2:-2, 2:-2]
    assert difference.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "cut",
    [
        View(random_resized, 224),
        View(scale_jitter, 224),
        partial(resize_and_center_crop, size=224),
        partial(ten_crop, size=224),
    ],
)
def test_a_crop_is_a_function_of_its_generator(cut, channels: int) -> None:
    image = photo(300, 400, channels)
    one, again = cut(image, generator()), cut(image, generator())
    assert one.dtype == np.uint8
    assert one.shape[-3:] == (224, 224, channels)
    assert (one == again).all()


@given(SIDES, SIDES, st.integers(0, 2**32))
def test_scaling_sets_the_shorter_side_and_keeps_the_ratio(
    width: int, height: int, seed: int
) -> None:
    side = int(generator(seed).integers(256, 481))
    assert min(scaled((width, height), side)) == side
    assert math.isclose(
        max(scaled((width, height), side)),
        max(width, height) * side / min(width, height),
        abs_tol=1,
    )


def test_scale_jitter_equals_a_crop_of_the_resized_image() -> None:
    image = photo(500, 375)
    for seed in range(20):
        draws = generator(seed)
        width, height = scaled(image.size, int(draws.integers(256, 481)))
        left, top = int(draws.integers(width - 223)), int(draws.integers(height - 223))
        whole = image.resize((width, height), Image.Resampling.BILINEAR)
        expected = np.asarray(whole)[top : top + 224, left : left + 224].astype(int)
        cut = View(scale_jitter, 224)(image, generator(seed))
        assert np.abs(cut - expected)[3:-3, 3:-3].max() <= 2


def test_every_scale_and_position_occurs() -> None:
    """The values of a gradient show where a crop was and how large."""
    columns = np.linspace(0, 255, 480, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(columns, (480, 480)).copy())
    cuts = [View(scale_jitter, 224)(image, generator(seed))[0, :, 0] for seed in range(300)]
    left = np.array([cut[0] for cut in cuts], int)
    span = np.array([int(cut[-1]) - cut[0] for cut in cuts])
    # 224 pixels of 480 to 256, from the left edge to the right one.
    assert abs(span.min() - 255 * 224 / 480) < 4
    assert abs(span.max() - 255 * 224 / 256) < 4
    assert left.min() < 4
    assert (left + span).max() > 251


@pytest.mark.parametrize("size", sizes("sizes"))
def test_center_and_ten_crops_lie_where_torchvisions_do(size: tuple[int, int]) -> None:
    (width, height, _), *corners = TORCHVISION[f"crops, {size}"].tolist()
    image = photo(*size)
    whole = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    center, *ten = (
        whole[top : top + 224, left : right + 1]
        if left < right
        else whole[top : top + 224, right : left + 1][:, ::-1]
        for left, top, right in corners
    )
    assert (resize_and_center_crop(image, generator(), size=224) == center).all()
    assert (ten_crop(image, generator(), size=224) == np.stack(ten)).all()


def test_ten_crops_are_five_of_the_image_and_five_of_its_mirror_image() -> None:
    image = photo(500, 375)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    ten, of_mirrored = (ten_crop(each, generator(), size=64) for each in (image, mirrored))
    assert ten.shape == (10, 64, 64, 3)
    assert (ten == np.roll(of_mirrored, 5, axis=0)).all()
    assert (ten[4] == resize_and_center_crop(image, generator(), size=64)).all()


def test_a_large_jpeg_is_decoded_at_a_reduced_size() -> None:
    image = photo(1600, 1200)
    reduced, whole = jpeg(image), jpeg(image)
    whole.load()
    box = Box(100, 50, 1500, 1100)
    difference = np.abs(resampled(reduced, box, 224).astype(int) - resampled(whole, box, 224))
    assert reduced.size == (800, 600)
    assert difference.mean() < 1.5
    assert difference.max() < 16


def test_a_jpeg_is_reduced_as_far_as_the_gap_allows() -> None:
    for seed in range(50):
        image = jpeg(Image.new("L", (2000, 1500)))
        box = random_box(generator(seed), 2000, 1500)
        resampled(image, box, 112)
        shrunk = 2000 / image.width
        sides = box.right - box.left, box.bottom - box.top
        assert shrunk == 1 or min(sides) / shrunk >= 2 * 112
        assert shrunk == 8 or min(sides) / (2 * shrunk) < 2 * 112 * 1.01
