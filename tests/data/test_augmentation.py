"""Augmentation shows other views of the same images, and nothing else."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resjax.data.augmentation import flip, pad_crop
from resjax.models.convolution import quick_compile

crop = jax.jit(pad_crop, static_argnames="padding", compiler_options=quick_compile())
mirror = jax.jit(flip, compiler_options=quick_compile())

IMAGES = np.random.default_rng(0).uniform(1, 2, (400, 3, 4, 2)).astype(np.float32)


def keys(seed, count):
    return jax.random.split(jax.random.key(seed), count)


def offsets(images, cropped, padding):
    """Where the windows of the padded images lie that were cropped; each lies at one place."""
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = np.pad(images, sides)
    _, height, width, _ = images.shape
    found = []
    for image, window in zip(padded, cropped, strict=True):
        places = [
            (i, j)
            for i, j in np.ndindex(2 * padding + 1, 2 * padding + 1)
            if (image[i : i + height, j : j + width] == window).all()
        ]
        assert len(places) == 1
        found += places
    return found


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_a_crop_is_a_window_of_the_image_padded_by_zeros(padding, seed):
    cropped = crop(keys(seed, 8), IMAGES[:8], padding)
    offsets(IMAGES[:8], np.asarray(cropped), padding)


def test_every_offset_occurs_for_some_image_of_a_batch():
    found = offsets(IMAGES, np.asarray(crop(keys(0, 400), IMAGES, 2)), 2)
    assert set(found) == set(np.ndindex(5, 5))


def test_padding_0_is_the_identity():
    assert (crop(keys(0, 400), IMAGES, 0) == IMAGES).all()


def test_flip_gives_the_image_or_its_mirror_image_about_equally_often():
    flipped = np.asarray(mirror(keys(0, 400), IMAGES))
    same = (flipped == IMAGES).all((1, 2, 3))
    mirrored = (flipped == IMAGES[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert same.mean() == pytest.approx(0.5, abs=0.1)


AUGMENTATIONS = pytest.mark.parametrize(
    "augment", [mirror, lambda keys, images: crop(keys, images, 2)], ids=["flip", "crop"]
)


@AUGMENTATIONS
def test_an_augmentation_is_a_function_of_its_keys(augment):
    once, again, other = (augment(keys(seed, 400), IMAGES) for seed in (0, 0, 1))
    assert (once == again).all()
    assert (once != other).any()


@AUGMENTATIONS
def test_what_is_drawn_for_an_image_does_not_depend_on_those_beside_it(augment):
    whole = augment(keys(0, 400), IMAGES)
    for part in (slice(0, 100), slice(100, 400)):
        assert (augment(keys(0, 400)[part], IMAGES[part]) == whole[part]).all()
