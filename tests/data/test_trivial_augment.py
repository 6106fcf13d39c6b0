"""TrivialAugment equals Pillow's and torchvision's operations."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import chisquare
from sklearn.datasets import load_digits

from resjax.data.trivial_augment import OPERATIONS, STRENGTHS, WIDE, operate, trivial_augment
from resjax.data.trivial_augment import strengths as trivial_augment_strengths
from resjax.xla.compile_options import quick_compile

ENHANCEMENTS = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
TORCHVISION = dict(np.load(Path(__file__).with_name("torchvision_results.npz")))
WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
apply = jax.jit(
    jax.vmap(operate, in_axes=(None, None, 0)), compiler_options=quick_compile()
)  # all strengths at once


def strengths(name):
    positive = trivial_augment_strengths(WIDE[name]).astype(float)
    return np.concatenate([positive, -positive]) if WIDE[name].signed else positive


def affine(name, magnitude, height, width):
    """Coefficients of the map from a pixel to its source."""
    if name == "rotate":
        cos, sin = np.cos(np.radians(magnitude)), np.sin(np.radians(magnitude))
        x, y = width / 2, height / 2
        return (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
    moved = {
        "shear_x": (1, magnitude, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, magnitude, 1, 0),
        "translate_x": (1, 0, -int(magnitude), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -int(magnitude)),
    }
    return moved[name]


def from_border(image, name, magnitude):
    """Distance in pixels from each pixel's source to the border between two pixels."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    a, b, c, d, e, f = affine(name, magnitude, height, width)
    sources = np.array([a * x + b * y + c, d * x + e * y + f])
    return np.abs(sources - np.round(sources)).min(0)


def pillow(image, name, magnitude):
    if name in WARPS:
        coefficients = affine(name, magnitude, image.height, image.width)
        return image.transform(image.size, Image.Transform.AFFINE, coefficients)
    if name in ENHANCEMENTS:
        return ENHANCEMENTS[name](image).enhance(1 + magnitude)
    others = {
        "identity": lambda: image,
        "posterize": lambda: ImageOps.posterize(image, round(magnitude)),
        "solarize": lambda: ImageOps.solarize(image, magnitude),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }
    return others[name]()


@pytest.fixture(scope="module", params=["photo", "digit", "even"])
def image(request, photos):
    """A color photograph, a grayscale digit, and an image of one color."""
    digit = load_digits().images[1][..., None] * 15.9
    even = np.full((5, 6, 3), (10, 100, 200))
    return {"photo": photos[20], "digit": digit, "even": even}[request.param].astype(np.uint8)


def applied(image, name):
    """Pillow's results and ours, for all strengths."""
    canvas = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    expected = [np.asarray(pillow(canvas, name, strength)) for strength in strengths(name)]
    found = apply(image, OPERATIONS.index(name), strengths(name).astype(np.float32))
    return np.reshape(expected, (-1, *image.shape)).astype(int), np.asarray(found).astype(int)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in WARPS])
def test_operations_on_levels_equal_pillows_within_one_level(image, name):
    expected, found = applied(image, name)
    in_floats = name in (*ENHANCEMENTS, "autocontrast")  # whose fraction is truncated
    assert np.abs(found - expected).max() <= in_floats
    assert (found == expected).mean() > 0.95


@pytest.mark.parametrize("name", WARPS)
def test_a_warp_equals_pillows_except_on_borders_between_pixels(image, name):
    expected, found = applied(image, name)
    for strength, theirs, ours in zip(strengths(name), expected, found, strict=True):
        assert from_border(image, name, strength)[(theirs != ours).any(-1)].max(initial=0) < 1e-3


def test_operations_signs_and_strengths_are_drawn_uniformly():
    # An image that almost every operation changes in its own way.
    image = np.full((40, 40, 3), (50, 100, 150), np.uint8)
    image[:, :20] = (20, 30, 90)
    image[18:20, 18:20] = (240, 200, 250)
    count = 4000
    drawn = jax.jit(trivial_augment, compiler_options=quick_compile())
    images = np.broadcast_to(image, (count, *image.shape))
    found = np.asarray(drawn(jax.random.split(jax.random.key(0), count), images))
    by_view = {}
    for name in OPERATIONS:
        all_strengths = strengths(name).astype(np.float32)
        for view in np.asarray(apply(image, OPERATIONS.index(name), all_strengths)):
            by_view.setdefault(view.tobytes(), {}).setdefault(name, 0)
            by_view[view.tobytes()][name] += 1 / len(all_strengths)
    seen, expected = {}, {}
    for view, chances in by_view.items():
        expected[view] = count * sum(chances.values()) / len(OPERATIONS)
        seen[view] = 0
    for view in found:
        seen[view.tobytes()] += 1
    assert chisquare(list(seen.values()), [expected[view] for view in seen]).pvalue > 0.01


def test_the_space_equals_torchvisions():
    for name, magnitudes, signed in zip(
        OPERATIONS, TORCHVISION["strengths"], TORCHVISION["signed"], strict=True
    ):
        assert signed == WIDE[name].signed
        ours = strengths(name)[:STRENGTHS]
        np.testing.assert_array_equal(np.round(ours) if name == "posterize" else ours, magnitudes)


@pytest.mark.parametrize("kind", ["photo", "digit", "even"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_torchvisions_on_tensors_within_one_level(name, kind):
    image = TORCHVISION[f"image, {kind}"]
    chosen = strengths(name)[TORCHVISION["bins"]]
    chosen = np.concatenate([chosen, -chosen]) if WIDE[name].signed else chosen
    found = np.asarray(apply(image, OPERATIONS.index(name), np.float32(chosen))).astype(int)
    expected = TORCHVISION[f"{name.replace('_', '')}, {kind}"]
    for strength, theirs, ours in zip(chosen, itertools.cycle(expected), found, strict=False):
        far = (np.abs(theirs.astype(int) - ours) > 1).any(-1)
        if name in WARPS:
            far &= from_border(image, name, strength) > 1e-3
        assert not far.any()


@pytest.mark.parametrize(("strength", "pixels"), [(0, 0), (14, 14), (15, 15), (16, 17), (30, 32)])
def test_a_translation_moves_as_many_pixels_as_torchvisions(strength, pixels):
    image = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None], (2, 64, 1))
    magnitude = trivial_augment_strengths(WIDE["translate_x"])[strength : strength + 1]
    (moved,) = apply(image, OPERATIONS.index("translate_x"), magnitude)
    expected = np.zeros_like(image)
    expected[:, pixels:] = image[:, : 64 - pixels]
    np.testing.assert_array_equal(moved, expected)
