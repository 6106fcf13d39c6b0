"""The sheet shows examples, augmented versions of them, and their classes."""

import numpy as np
import pytest
from PIL import Image

from resjax.cli import main
from resjax.config import default_config, override, resolve
from resjax.data.augmentation import Augmentation
from resjax.data.datasets import Split
from resjax.data.normalization import compute_statistics
from resjax.data.sheet import DRAWS, EXAMPLES, Sample, choose, sheet
from resjax.errors import UserError
from resjax.train.training_sample import training_sample

NAMES = tuple("abcde")


def split_of(channels, count=12):
    images = np.random.default_rng(0).integers(0, 256, (count, 6, 8, channels), np.uint8)
    return Split.labeled(images, np.arange(count, dtype=np.int32) % len(NAMES))


def drawn(split, augmentation, seed=0, normalization="channel"):
    statistics = compute_statistics(split.images, normalization, colors=True)
    chosen = choose(len(split.labels), seed)
    originals = split[chosen]
    sample = Sample(originals, np.stack([originals.images] * DRAWS), NAMES, statistics)
    return sheet(sample, augmentation, seed)


def cells(figure):
    """Titles and images, by row."""
    found = [
        (axes.get_title(), np.reshape(axes.images[0].get_array(), (6, 8, -1)))
        for axes in figure.axes
    ]
    assert len(found) == EXAMPLES * (1 + DRAWS)
    return [found[row * (1 + DRAWS) : (row + 1) * (1 + DRAWS)] for row in range(EXAMPLES)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("normalization", ["channel", "pixel_mean"])
def test_a_row_is_an_example_with_its_class_and_augmented_versions(channels, normalization):
    split = split_of(channels)
    mean = compute_statistics(split.images, normalization).mean
    rows = cells(drawn(split, Augmentation(flip=True), normalization=normalization))
    for (title, original), *draws in rows:
        (example,) = np.flatnonzero((split.images / 255 == original).all((1, 2, 3)))
        assert title == NAMES[split.labels[example]]
        mirror = np.clip((original - mean)[:, ::-1] + mean, 0, 1)  # the mean image stays
        mirrored = [np.allclose(draw, mirror, atol=1e-5) for _, draw in draws]
        same = [np.allclose(draw, original, atol=1e-5) for _, draw in draws]
        assert all(a != b for a, b in zip(mirrored, same, strict=True))
        assert {title for title, _ in draws} == {""}
    assert len({original.tobytes() for (_, original), *_ in rows}) == EXAMPLES


def test_the_title_of_a_mixed_image_lists_both_classes_and_their_shares():
    rows = cells(drawn(split_of(3), Augmentation(mixup=1.0)))
    for pair in range(0, EXAMPLES, 2):
        (name, one), (other_name, other) = rows[pair][0], rows[pair + 1][0]
        for title, mixed in rows[pair][1:]:
            share = ((mixed - other) * (one - other)).sum() / ((one - other) ** 2).sum()
            told = {name: f"{share:.0%}", other_name: f"{1 - share:.0%}"}
            assert set(title.split("\n")) == {f"{told[each]} {each}" for each in told}


def test_a_sheet_is_a_function_of_its_seed():
    augmentation = Augmentation(flip=True, cutout=3)
    once, again, other = (
        [image for row in cells(drawn(split_of(3), augmentation, seed)) for _, image in row]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)


def test_a_dataset_smaller_than_the_sheet_repeats_images():
    cells(drawn(split_of(1, count=3), Augmentation(cutmix=1.0)))


def test_data_show_writes_the_sheet_of_a_config(tmp_path, capsys):
    out = tmp_path / "new" / "sheet.png"
    assert main(["data", "show", "digits", f"--out={out}", "--config.data.mixup=1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "digits: 1,437 training images, 360 test images, 10 classes",
        f"sheet: {out}",
    ]
    with Image.open(out) as image:
        assert np.asarray(image.convert("L")).std() > 20


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("digit", "--out=a.png"), "data.name: no dataset 'digit'; did you mean 'digits'?"),
        (("digits", "--out=a.docx"), "a.docx: the name must end in .png or .pdf or .svg"),
        (("digits", "--out=/dev/null/a.png"), "--out=/dev/null: cannot write to this folder"),
        (("cifar10", "--out=a.png"), "'cifar10' is not prepared"),
        (("digits", "--out=a.png", "--config.data.cutou=1"), "did you mean data.cutout?"),
        (("digits",), "the following arguments are required: --out"),
    ],
)
def test_a_mistake_is_refused_in_one_line(typed, message, capsys):
    assert main(["data", "show", *typed]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("resjax: error: ")
    assert err.count("\n") == 1
    assert message in err


# The fields of the data that a sheet honors.


def photo(side):
    """Red above blue: where an image is cropped shows in its colors."""
    image = np.zeros((side, side, 3), np.uint8)
    image[: side // 2, :, 0] = image[side // 2 :, :, 2] = 255
    return image


@pytest.fixture
def sampled(write_folder):
    """The sample of a folder with images of several sizes, for overrides."""
    files = {
        f"train/{c}/{n}.png": photo(20 + 4 * n) for c in ("cat", "dog", "owl") for n in range(4)
    }
    files |= {"test/dog/1.png": photo(24), "train/cat/bad.png": b"no image"}
    root = write_folder(files)

    def sampled(**overrides):
        fields = {"data.name": f"folder:{root}", "data.image_size": 16}
        fields |= {f"data.{name}": value for name, value in overrides.items()}
        return training_sample(resolve(override(default_config(), fields)))

    return sampled


def test_images_of_several_sizes_are_shown_in_the_size_of_training(sampled):
    sample, description = sampled(on_bad_image="skip")
    assert sample.crops.shape == (DRAWS, EXAMPLES, 16, 16, 3)
    assert sample.class_names == ("cat", "dog", "owl")
    assert "12 training images, 1 test images, 3 classes" in description
    assert (sample.crops == sample.originals.images).all()
    for overrides, message in (
        ({}, "bad.png: cannot be decoded"),
        ({"image_size": None, "on_bad_image": "skip"}, "set data.image_size"),
    ):
        with pytest.raises(UserError, match=message):
            sampled(**overrides)


def test_only_the_chosen_classes_and_examples_are_shown(sampled):
    sample, _ = sampled(on_bad_image="skip", classes=("owl", "dog"), per_class=1)
    assert sample.class_names == ("owl", "dog")
    assert sorted(sample.originals.labels) == [0] * 4 + [1] * 4
    assert len({image.tobytes() for image in sample.originals.images}) <= 2
    sample, _ = sampled(on_bad_image="skip", train_split="train[:1]+train[-1:]")
    assert set(sample.originals.labels) == {0, 2}


def test_every_draw_of_a_stream_has_its_own_crop(sampled):
    sample, _ = sampled(on_bad_image="skip", train_crop="random_resized")
    assert sample.crops.shape == (DRAWS, EXAMPLES, 16, 16, 3)
    assert len({draw[0].tobytes() for draw in sample.crops}) > DRAWS // 2
    with pytest.raises(UserError, match=r"needs data\.feed=stream"):
        sampled(train_crop="random_resized", feed="device")


def test_the_normalization_is_that_of_the_config(sampled):
    sample, _ = sampled(on_bad_image="skip", normalization="pixel_mean")
    assert sample.statistics.mean.shape == (16, 16, 3)
    with pytest.raises(UserError, match=r"needs transfer\.weights"):
        sampled(normalization="weights")


@pytest.mark.parametrize("targets", ["mask", "boxes"])
def test_masks_and_boxes_are_drawn_where_the_augmentation_moved_them(targets):
    images = np.full((EXAMPLES, 8, 8, 3), 128, np.uint8)
    if targets == "mask":
        mask = np.zeros((EXAMPLES, 8, 8), np.uint8)
        mask[:, 2:6, :3] = 1
        dense = {"mask": mask}
    else:
        boxes = np.tile(np.array([0, 2, 3, 6], np.float32), (EXAMPLES, 1, 1))
        dense = {"boxes": boxes, "classes": np.ones((EXAMPLES, 1), np.int32)}
    moved = {name: np.stack([array] * DRAWS) for name, array in dense.items()}
    statistics = compute_statistics(images, "channel")._replace(std=np.ones(3, np.float32))
    sample = Sample(
        Split(images, dense), np.stack([images] * DRAWS), ("background", "x"), statistics, moved
    )
    figure = sheet(sample, Augmentation(flip=True), 0)
    pictures = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    colored = [np.ptp(picture, -1) > 0.2 for picture in pictures]
    left = [half[:, : half.shape[1] // 2].sum() > half.sum() / 2 for half in colored]
    assert all(each.any() for each in colored)
    originals, others = left[:: 1 + DRAWS], [each for i, each in enumerate(left) if i % (1 + DRAWS)]
    assert all(originals)
    assert 0 < np.mean(others) < 1
