"""Augmentation yields other views of the same images, deterministically, with the right shares."""

import itertools
from functools import partial
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, ks_2samp, kstest

from resjax.config import Data
from resjax.data.augmentation import (
    Augmentation,
    adjust_colors,
    augment,
    box_mask,
    cutout,
    flip,
    mix,
    mixing_weights,
    pad_crop,
    pca_lighting,
    random_color_factors,
    random_erasing,
    swap_neighbors,
)
from resjax.data.examples import VOID
from resjax.data.normalization import compute_statistics, normalize
from resjax.errors import UserError
from resjax.xla.compile_options import quick_compile
from resjax.xla.target import Target, compiling_for

TORCHVISION = dict(np.load(Path(__file__).with_name("torchvision_results.npz")))

quick = partial(jax.jit, compiler_options=quick_compile())
crop_batch = quick(pad_crop, static_argnames="padding")
mirror_batch = quick(flip)

IMAGES = np.random.default_rng(0).uniform(1, 2, (400, 3, 4, 2)).astype(np.float32)

# Published with AlexNet: the axes of ImageNet's colors, in columns.
IMAGENET_COLOR_AXES = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], np.float32
) * np.array([0.2175, 0.0188, 0.0045], np.float32)


def crop(keys, images, padding):
    return crop_batch(keys, {"image": images}, padding)["image"]


def mirror(keys, images):
    return mirror_batch(keys, {"image": images})["image"]


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
def test_a_crop_is_a_window_of_the_zero_padded_image(padding, seed):
    cropped = crop(keys(seed, 8), IMAGES[:8], padding)
    offsets(IMAGES[:8], np.asarray(cropped), padding)


def test_every_offset_occurs():
    found = offsets(IMAGES, np.asarray(crop(keys(0, 400), IMAGES, 2)), 2)
    assert set(found) == set(np.ndindex(5, 5))


def numbered_scenes(count, side=6):
    """Images whose pixels are all different, masks of the same numbers, and boxes of one pixel."""
    numbers = np.arange(1, 1 + side * side, dtype=np.uint8).reshape(side, side)
    pixels = np.random.default_rng(1).integers(0, side, (count, 3, 2))
    boxes = np.concatenate([pixels, pixels + 1], -1).astype(np.float32)
    classes = 1 + side * pixels[..., 1] + pixels[..., 0]
    images = np.broadcast_to(numbers[..., None], (count, side, side, 1)).astype(np.float32)
    return {
        "image": images,
        "mask": np.broadcast_to(numbers, (count, side, side)),
        "boxes": boxes,
        "classes": classes.astype(np.int32),
    }


def test_on_a_tpu_crops_have_the_same_values():
    """The values reach over 60 powers of two, so that one that was rounded would differ."""
    random = np.random.default_rng(0)
    images = np.ldexp(random.normal(size=(20, 5, 7, 3)), random.integers(-30, 30, (20, 5, 7, 3)))
    mask = random.integers(0, 256, (20, 5, 7)).astype(np.uint8)
    batch = {"image": images.astype(np.float32), "mask": mask}
    expected = crop_batch(keys(0, 20), batch, 3)
    with compiling_for(Target([SimpleNamespace(platform="tpu")], memory=None)):
        found = pad_crop(keys(0, 20), batch, 3)
    assert found["mask"].dtype == mask.dtype
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("move", [lambda *each: crop_batch(*each, 2), mirror_batch])
def test_masks_and_boxes_move_with_their_images(move):
    before = numbered_scenes(100)
    moved = jax.device_get(move(keys(0, 100), before))
    mask, image = moved["mask"], moved["image"][..., 0]
    assert (mask == np.where(image == 0, VOID, image)).all()
    assert moved["image"].tolist() != before["image"].tolist()
    gone = 0
    for number in range(100):
        for box, name, was in zip(
            moved["boxes"][number], moved["classes"][number], before["classes"][number], strict=True
        ):
            left, top, right, bottom = box.astype(int)
            if name:
                assert (right - left, bottom - top) == (1, 1)
                assert mask[number, top, left] == name == was
            else:
                assert was not in mask[number]
                gone += 1
    assert gone == sum(n not in m for m, c in zip(mask, before["classes"], strict=True) for n in c)


def test_flip_mirrors_half_of_the_images():
    flipped = np.asarray(mirror(keys(0, 400), IMAGES))
    same = (flipped == IMAGES).all((1, 2, 3))
    mirrored = (flipped == IMAGES[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert same.mean() == pytest.approx(0.5, abs=0.1)


def zeros_of(augment, count, height, width):
    """Where `count` images without a zero have zeros afterwards."""
    images = np.ones((count, height, width, 1), np.float32)
    return np.asarray(quick(augment)(keys(0, count), images))[..., 0] == 0


@pytest.mark.parametrize("side", [1, 2, 3, 4, 20])
def test_cutout_fills_a_square_around_any_pixel(side):
    height, width = 5, 7
    found = {where.tobytes() for where in zeros_of(partial(cutout, side=side), 500, height, width)}
    expected = set()
    for i, j in np.ndindex(height, width):
        square = np.zeros((height + 2 * side, width + 2 * side), bool)
        top, left = i + side - side // 2, j + side - side // 2
        square[top : top + side, left : left + side] = True
        expected.add(square[side : side + height, side : side + width].tobytes())
    assert found == expected


@pytest.fixture(scope="module")
def erased():
    """Where 4000 images of 32x48 pixels are erased, each with probability 0.4."""
    return zeros_of(partial(random_erasing, probability=0.4), 4000, 32, 48)


def rectangle(where):
    """Top, left, height and width of what is true; all of which is one rectangle."""
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    assert (where == np.isin(np.arange(32), rows)[:, None] & np.isin(np.arange(48), columns)).all()
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert (height, width) == (len(rows), len(columns))
    return rows[0], columns[0], height, width


def test_images_are_erased_with_the_given_probability(erased):
    assert erased.any((1, 2)).mean() == pytest.approx(0.4, abs=0.03)


@pytest.fixture(scope="module")
def rectangles(erased):
    return np.array([rectangle(where) for where in erased if where.any()])


def area(sides):
    return sides[:, 0] * sides[:, 1]


def ratio(sides):
    return np.log(sides[:, 0] / sides[:, 1])


def test_erased_rectangles_are_distributed_as_torchvisions(rectangles):
    expected = TORCHVISION["erased"]
    for of in (area, ratio):
        assert ks_2samp(of(rectangles[:, 2:]), of(expected[:, 2:])).pvalue > 0.01
    for place in (0, 1):
        assert ks_2samp(rectangles[:, place], expected[:, place]).pvalue > 0.01


def test_erased_rectangles_have_the_areas_and_ratios_of_the_paper(rectangles):
    """Areas from 2 to 33 %, log-uniform ratios from 0.3 to 3.3, drawn again until one fits."""
    generator, (height, width) = np.random.default_rng(1), (32, 48)
    areas = height * width * generator.uniform(0.02, 0.33, 40_000)
    ratios = np.exp(generator.uniform(np.log(0.3), np.log(3.3), 40_000))
    sides = np.stack([np.round(np.sqrt(areas * ratios)), np.round(np.sqrt(areas / ratios))], -1)
    sides = sides[(sides < (height, width)).all(-1)]
    for of in (area, ratio):
        assert ks_2samp(of(rectangles[:, 2:]), of(sides)).pvalue > 0.01
    # A rectangle of a small area always fits, so that its ratio has a closed form.
    small = rectangles[area(rectangles[:, 2:]) < 0.1 * height * width, 2:]
    bounds = np.log(0.3), np.log(3.3) - np.log(0.3)
    assert kstest(ratio(small), "uniform", bounds).statistic < 0.1  # sides are whole pixels


@pytest.mark.parametrize("name", ["photo", "digit"])
def test_color_changes_equal_torchvisions_in_every_order(name):
    image = np.float32(TORCHVISION[f"image, {name}"] / 255)
    drawn = itertools.product(permutations(range(3)), TORCHVISION["factors"])
    for (order, factors), expected in zip(drawn, TORCHVISION[f"colors, {name}"], strict=True):
        found = adjust_colors(image, np.array(factors), np.array(order))
        np.testing.assert_allclose(found, expected, atol=0.6 / 255)  # 0.2989 or 0.299 of red


def test_a_factor_of_0_gives_black_gray_or_grayscale(photos):
    image = np.float32(photos[20] / 255)
    gray = image @ np.float32([0.299, 0.587, 0.114])

    def adjusted(*factors):
        return np.asarray(adjust_colors(image, np.array(factors), np.arange(3)))

    assert (adjusted(0, 1, 1) == 0).all()
    np.testing.assert_allclose(adjusted(1, 0, 1), gray.mean(), atol=1e-4)
    np.testing.assert_allclose(adjusted(1, 1, 0), np.stack([gray] * 3, -1), atol=1e-4)
    np.testing.assert_allclose(adjusted(1, 1, 1), image, atol=1e-6)


def test_color_factors_and_orders_are_uniform():
    draw = quick(jax.vmap(partial(random_color_factors, strengths=(0.4, 0.0, 3.0))))
    factors, order = map(np.asarray, draw(keys(0, 3000)))
    for found, low, high in [(factors[:, 0], 0.6, 1.4), (factors[:, 2], 0.0, 4.0)]:
        assert kstest(found, "uniform", (low, high - low)).pvalue > 0.01
    assert (factors[:, 1] == 1).all()
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 6
    assert chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("axes", [IMAGENET_COLOR_AXES, np.full((1, 1), 0.2, np.float32)])
def test_lighting_shifts_have_the_covariance_of_the_axes(axes):
    images = np.zeros((20_000, 2, 3, len(axes)), np.float32)
    shifted = np.asarray(quick(pca_lighting)(keys(0, len(images)), images, axes, 0.5))
    assert (shifted == shifted[:, :1, :1]).all()
    covariance = np.cov(shifted[:, 0, 0], rowvar=False).reshape(axes.shape)
    np.testing.assert_allclose(covariance, 0.25 * axes @ axes.T, rtol=0.05)
    assert kstest(shifted[:, 0, 0, 0] / np.sqrt(covariance[0, 0]), "norm").pvalue > 0.01


EYE = np.eye(6, dtype=np.float32)
mix_batch = quick(mix, static_argnames=("mixup", "cutmix"))


def mixed(key, images, labels, mixup, cutmix):
    batch = mix_batch(key, {"image": images, "label": labels}, mixup, cutmix)
    return np.asarray(batch["image"]), np.asarray(batch["label"])


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([(0.2, 0.0), (0.0, 1.0), (1.0, 1.0)]), st.integers(0, 2**32 - 1))
def test_mixed_targets_have_the_shares_of_the_pixels(alphas, seed):
    # Of an image that is 1 beside one that is 0 the mean is the share that it keeps.
    images = np.float32([1, 0, 0, 1, 1, 0])[:, None, None, None] * np.ones((1, 6, 9, 1), np.float32)
    seen, targets = mixed(jax.random.key(seed), images, EYE, *alphas)
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
    share = seen[0].mean()
    np.testing.assert_allclose(targets, share * EYE + (1 - share) * swap_neighbors(EYE), atol=1e-6)
    assert seen[[0, 3, 4]].mean() == pytest.approx(share, abs=1e-6)
    assert seen[[1, 2, 5]].mean() == pytest.approx(1 - share, abs=1e-6)


def test_neighbors_are_swapped():
    assert np.asarray(swap_neighbors(np.arange(6))).tolist() == [1, 0, 3, 2, 5, 4]


def test_mixup_is_the_weighted_mean_of_neighbors(photos):
    images = np.float32(photos[:6])
    seen, targets = mixed(jax.random.key(3), images, EYE, 1.0, 0.0)
    share = targets[0, 0]
    assert 0.05 < share < 0.95
    np.testing.assert_allclose(
        seen, share * images + (1 - share) * swap_neighbors(images), rtol=1e-5
    )


def test_cutmix_targets_are_the_exact_shares_of_pixels(photos):
    images = np.float32(photos[:6])
    others, partly = np.asarray(swap_neighbors(images)), 0
    for seed in range(10):
        seen, targets = mixed(jax.random.key(seed), images, EYE, 0.0, 1.0)
        pasted = (seen == others).all((0, -1))
        assert (seen == np.where(pasted[..., None], others, images)).all()
        assert targets[0, 0] == np.float32((~pasted).sum()) / np.float32(pasted.size)
        partly += 0 < pasted.mean() < 1
    assert partly > 5


def test_every_floating_point_entry_is_mixed_and_all_others_pass_through(photos):
    images = np.float32(photos[:6])
    batch = {"image": images, "label": EYE[:, 0], "angles": EYE, "index": np.arange(6)}
    for alphas in ((1.0, 0.0), (0.0, 1.0)):
        found = mix_batch(jax.random.key(3), batch, *alphas)
        share = mixed(jax.random.key(3), images, EYE, *alphas)[1][0, 0]
        for name in ("label", "angles"):
            expected = share * batch[name] + (1 - share) * swap_neighbors(batch[name])
            np.testing.assert_allclose(found[name], expected, rtol=1e-6)
        assert (found["index"] == batch["index"]).all()


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_integer_labels_cannot_be_mixed(name, photos):
    batch = {"image": photos[:6], "label": np.arange(6)}
    arguments = keys(0, 6), jax.random.key(0), batch, compute_statistics(photos, "channel")
    assert augment(*arguments, Augmentation())["label"] is batch["label"]
    with pytest.raises(ValueError, match="task must first encode them as floating-point"):
        augment(*arguments, Augmentation(**{name: 1.0}))


def paper_share(generator, alpha, height, width):
    """What `rand_bbox` of the paper's code leaves of an image."""
    cut = np.sqrt(1 - generator.beta(alpha, alpha))
    rows, columns = int(height * cut), int(width * cut)
    i, j = generator.integers(height), generator.integers(width)
    inside = [
        np.clip(middle + extent // 2, 0, side) - np.clip(middle - extent // 2, 0, side)
        for middle, extent, side in ((i, rows, height), (j, columns, width))
    ]
    return 1 - np.prod(inside) / (height * width)


def test_shares_are_distributed_as_in_the_papers():
    shape = (64, 64)
    draw = quick(jax.vmap(mixing_weights, in_axes=(0, *[None] * 4)), static_argnums=(1, 2, 3, 4))
    averaged = np.asarray(draw(keys(0, 1000), 1, 1, 0.4, 0.0)).ravel()
    assert kstest(averaged, "beta", (0.4, 0.4)).pvalue > 0.01
    pasted = np.asarray(draw(keys(1, 1000), *shape, 0.0, 1.0)).mean((1, 2))
    generator = np.random.default_rng(0)
    expected = [paper_share(generator, 1.0, *shape) for _ in range(1000)]
    assert ks_2samp(pasted, expected).pvalue > 0.01


def test_a_pasted_box_has_the_sides_of_the_papers_code():
    # It goes half a side, rounded down, from the center both ways.
    height, width = 7, 9
    draw = quick(jax.vmap(mixing_weights, in_axes=(0, *[None] * 4)), static_argnums=(1, 2, 3, 4))
    seen = set()
    for weights in np.asarray(draw(keys(0, 2000), height, width, 0.0, 1.0)):
        rows, columns = np.flatnonzero((weights == 0).any(1)), np.flatnonzero((weights == 0).any(0))
        seen.add((len(rows), len(columns)))
        for inside, side in ((rows, height), (columns, width)):
            if len(inside) and inside[0] > 0 and inside[-1] < side - 1:
                assert len(inside) % 2 == 0
    assert (6, 8) in seen
    assert not any(rows == height or columns == width for rows, columns in seen)


def test_with_both_half_of_the_batches_use_cutmix():
    draw = quick(jax.vmap(mixing_weights, in_axes=(0, *[None] * 4)), static_argnums=(1, 2, 3, 4))
    weights = np.asarray(draw(keys(0, 1000), 8, 8, 1.0, 1.0))
    pasted = np.isin(weights, (0, 1)).all((1, 2))
    assert pasted.mean() == pytest.approx(0.5, abs=0.05)


def test_a_box_has_its_size_around_its_center():
    where = np.asarray(box_mask((2, 3), (3, 2), 6, 8))
    assert np.argwhere(where).tolist() == [[i, j] for i in (1, 2, 3) for j in (2, 3)]


EACH = {
    "crop_padding": 4,
    "flip": True,
    "color_jitter": (0.4, 0.4, 0.4),
    "pca_lighting": 0.5,
    "trivial_augment": True,
    "cutout": 8,
    "random_erasing": 0.5,
}
AUGMENTATIONS = {name: Augmentation(**{name: value}) for name, value in EACH.items()} | {
    "mixup": Augmentation(mixup=0.5),
    "cutmix": Augmentation(cutmix=0.5),
    "all": Augmentation(**EACH, mixup=1.0, cutmix=1.0),
}
augmentations = pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS)


@pytest.fixture(scope="module")
def seen(photos):
    """Returns augmented images and targets of some photographs: `seen(keys, augmentation)`."""
    found = compute_statistics(photos, "channel", colors=True)

    @partial(quick, static_argnames="augmentation")
    def compiled(keys, batch_key, batch, augmentation):
        return augment(keys, batch_key, batch, found, augmentation)

    def seen(keys, augmentation, part=slice(0, 20), batch_seed=5):
        batch = {"image": photos[part], "label": np.eye(40, dtype=np.float32)[part]}
        batch = compiled(keys, jax.random.key(batch_seed), batch, augmentation)
        return batch["image"], batch["label"]

    return seen


def equal(one, other):
    return all((a == b).all() for a, b in zip(one, other, strict=True))


@augmentations
def test_augmentation_is_a_function_of_its_keys(seen, augmentation):
    once, again = (seen(keys(0, 20), augmentation) for _ in range(2))
    assert equal(once, again)
    assert not equal(once, seen(keys(1, 20), augmentation, batch_seed=6))


@augmentations
def test_augmentation_does_not_depend_on_how_a_batch_is_divided(seen, augmentation):
    whole = seen(keys(0, 20), augmentation)
    for part in (slice(0, 10), slice(10, 20)):
        divided = seen(keys(0, 20)[part], augmentation, part)
        for found, expected in zip(divided, whole, strict=True):
            np.testing.assert_allclose(found, expected[part], atol=1e-5)


@augmentations
def test_augmentation_changes_images_but_not_their_shape(seen, augmentation):
    plain, targets = seen(keys(0, 20), Augmentation())
    images, mixed_targets = seen(keys(0, 20), augmentation)
    assert images.shape == plain.shape
    assert images.dtype == plain.dtype
    assert (np.asarray(images) != plain).any((1, 2, 3)).mean() > 0.3
    assert (np.asarray(mixed_targets) != targets).any() == augmentation.mixes


def test_crop_and_flip_use_the_two_keys_of_a_split(photos, seen):
    images, _ = seen(keys(0, 20), Augmentation(crop_padding=4, flip=True))
    crop_keys, flip_keys = jax.vmap(jax.random.split, out_axes=1)(keys(0, 20))
    alone = normalize(photos[:20], compute_statistics(photos, "channel"))
    np.testing.assert_allclose(images, mirror(flip_keys, crop(crop_keys, alone, 4)), atol=1e-5)


@pytest.mark.parametrize("other", [name for name in EACH if name not in ("crop_padding", "flip")])
def test_another_augmentation_does_not_change_the_draws(seen, other):
    augmentation = Augmentation(cutout=8)  # its zeros are seen whatever else is done
    before, _ = seen(keys(0, 20), augmentation)
    after, _ = seen(keys(0, 20), augmentation._replace(**{other: EACH[other]}))
    assert (np.asarray(after)[np.asarray(before) == 0] == 0).all()


def test_padding_cutout_and_erasing_fill_with_the_mean_image(photos):
    white = np.full((50, 8, 8, 3), 255, np.uint8)
    found = compute_statistics(np.concatenate([white, 0 * white]), "channel")
    augmentation = Augmentation(crop_padding=2, cutout=3, random_erasing=1.0)
    function = quick(lambda *given: augment(*given, found, augmentation))
    batch = function(keys(0, 50), jax.random.key(0), {"image": white})
    assert set(np.unique(batch["image"])) == {0.0, 1.0}


def test_disabled_augmentations_add_no_operations(photos):
    found = compute_statistics(photos, "channel")

    def nothing(keys, batch_key, batch):
        return augment(keys, batch_key, batch, found, Augmentation())

    def normalized(keys, batch_key, batch):
        return {**batch, "image": normalize(batch["image"], found)}

    batch = {"image": jnp.asarray(photos[:6]), "label": EYE}
    arguments = (keys(0, 6), jax.random.key(0), batch)
    traced = [jax.make_jaxpr(f)(*arguments).eqns for f in (nothing, normalized)]
    assert str(traced[0]) == str(traced[1])


@pytest.mark.parametrize(
    ("field", "most"), [("crop_padding", 5), ("cutout", 6)], ids=["crop_padding", "cutout"]
)
def test_an_augmentation_that_leaves_nothing_of_an_image_is_refused(field, most):
    Augmentation.from_config(Data(**{field: most}), (6, 9, 3))
    message = rf"data\.{field}={most + 1}: must be at most {most} for images of 6 pixels"
    with pytest.raises(UserError, match=message):
        Augmentation.from_config(Data(**{field: most + 1}), (6, 9, 3))


def test_from_config_reads_the_fields_of_data():

    config = Data(crop_padding=4, flip=True, color_jitter=(0.4, 0.3, 0.2), mixup=0.5)
    expected = Augmentation(crop_padding=4, flip=True, color_jitter=(0.4, 0.3, 0.2), mixup=0.5)
    assert Augmentation.from_config(config, (8, 8, 1)) == expected
    assert Augmentation.from_config(Data(), (8, 8, 1)) == Augmentation()
