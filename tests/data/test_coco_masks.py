"""Masks that are drawn from the segmentations of COCO's annotations."""

import json
import sys

import numpy as np
import pytest

from resjax.config import default_config, override, resolve
from resjax.data.datasets import DataError, load, open_dataset
from resjax.data.examples import VOID
from resjax.tasks import Segmentation
from resjax.train.parallel import make_backend
from resjax.train.sources import make_source


class MasksAndBoxes(Segmentation):
    targets = ("mask", "boxes", "classes")


HEIGHT, WIDTH = 30, 41
CAT, DOG = 1, 2  # classes of the categories 3 and 7


@pytest.fixture
def coco_mask():
    return pytest.importorskip("pycocotools.mask", reason="needs the extra `detection`")


@pytest.fixture
def write(write_folder):
    """Writes two images, the first of which has annotations: (category, segmentation, others)."""

    def write(*annotations, categories=((3, "cat"), (7, "dog"))):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        root = write_folder({f"images/{number}.png": pixels for number in range(2)})
        content = {
            "images": [
                {"id": 5 + i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT}
                for i in range(2)
            ],
            "categories": [{"id": number, "name": name} for number, name in categories],
            "annotations": [
                {"id": number, "image_id": 5, "category_id": category, "bbox": [1, 2, 3, 4]}
                | {"segmentation": segmentation, "iscrowd": 0}
                | others
                for number, (category, segmentation, others) in enumerate(annotations, 1)
            ],
        }
        (root / "annotations.json").write_text(json.dumps(content))
        return root

    return write


def runs(pixels):
    """Returns a mask's run lengths in the order of columns, the first one outside."""
    flat = np.concatenate([[0], pixels.T.ravel(), [0]]).astype(int)
    ends = np.flatnonzero(np.diff(flat))
    lengths = np.diff([0, *ends, pixels.size])
    return {"size": list(pixels.shape), "counts": lengths.tolist()}


def rectangle(top, left, bottom, right):
    pixels = np.zeros((HEIGHT, WIDTH), bool)
    pixels[top:bottom, left:right] = True
    return pixels


def masks(root):
    return load(f"coco:{root}", targets=("mask",)).train.targets["mask"]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools' decode
def test_masks_are_those_that_pycocotools_draws(write, coco_mask):
    from pycocotools.coco import COCO

    random = np.random.default_rng(0)
    blobs = [random.random((HEIGHT, WIDTH)) < share for share in (0.1, 0.7, 0.02)]
    blobs[2][: HEIGHT // 2] = False  # long runs, and differences of both signs
    polygons = random.uniform(-4, 46, (4, 10)).round(2).tolist()
    text = coco_mask.encode(np.asfortranarray(blobs[2], np.uint8))["counts"].decode()
    root = write(
        (3, polygons[:2], {}),
        (7, polygons[2:3], {}),
        (7, runs(blobs[0]), {}),
        (3, {"size": [HEIGHT, WIDTH], "counts": text}, {}),
        (3, runs(blobs[1]), {"iscrowd": 1}),
        (7, polygons[3:], {}),
    )
    theirs = COCO(root / "annotations.json")
    drawn = {number: theirs.annToMask(each) > 0 for number, each in theirs.anns.items()}
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[drawn.pop(5)] = VOID
    for number in sorted(drawn, key=lambda number: drawn[number].sum(), reverse=True):
        expected[drawn[number]] = {3: CAT, 7: DOG}[theirs.anns[number]["category_id"]]
    assert {*np.unique(expected)} == {0, CAT, DOG, VOID}
    found = masks(root)[0]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_compressed_run_lengths_are_those_of_pycocotools(write, coco_mask):
    random = np.random.default_rng(1)
    for share in (0, 0.001, 0.01, 0.3, 0.99, 1):
        pixels = random.random((HEIGHT, WIDTH)) < share
        text = coco_mask.encode(np.asfortranarray(pixels, np.uint8))["counts"].decode()
        root = write((3, {"size": [HEIGHT, WIDTH], "counts": text}, {}))
        np.testing.assert_array_equal(masks(root)[0], pixels)


def test_small_and_later_objects_lie_over_large_and_earlier_ones(write):
    root = write(
        (7, runs(rectangle(5, 5, 10, 10)), {}),  # small
        (3, runs(rectangle(0, 0, 20, 20)), {}),
        (3, runs(rectangle(20, 0, 25, 10)), {}),
        (7, runs(rectangle(20, 5, 25, 15)), {}),  # of the same size as the one before
    )
    mask = masks(root)[0]
    assert (mask[5:10, 5:10] == DOG).all()
    assert (mask[20:25, :5] == CAT).all()
    assert (mask[20:25, 5:15] == DOG).all()
    assert (mask == CAT).sum() == 400 - 25 + 25
    assert (mask[25:] == 0).all()


def test_crowds_are_void_except_under_objects_and_images_without_objects_are_background(write):
    root = write(
        (7, runs(rectangle(0, 0, 20, 20)), {}),
        (3, runs(rectangle(10, 10, 15, 30)), {"iscrowd": 1}),
    )
    data = load(f"coco:{root}", targets=("mask",))
    mask = data.train.targets["mask"][0]
    assert (mask[10:15, 20:30] == VOID).all()
    assert (mask == VOID).sum() == 50
    assert (mask[:20, :20] == DOG).all()
    assert (data.test.targets["mask"] == 0).all()
    assert "1 annotations of crowds are void" in str(data)


def test_a_task_gets_the_targets_that_it_needs(write):
    root = write((7, runs(rectangle(0, 0, 20, 20)), {}))
    changes = {"data.name": f"coco:{root}", "data.batch_size": 1, "data.image_size": 20}
    for feed in ("device", "stream"):
        for task, targets in {
            "segmentation": ("mask",),
            "detection": ("boxes", "classes"),
            f"{__name__}:MasksAndBoxes": ("mask", "boxes", "classes"),
        }.items():
            fields = {"task.name": task, "data.feed": feed, "data.workers": 0}
            config = resolve(override(default_config(), changes | fields))
            source = make_source(config, make_backend(config))
            assert source.targets == targets
            (batch,) = source.read("train")
            assert batch.keys() - {"image", "weight"} == {*targets}
            if "mask" in targets:
                assert batch["mask"].shape == (1, 20, 20)
                assert (batch["mask"] == DOG).any()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "annotation 1 has no segmentation, which a mask needs"),
        (None, "annotation 1 has no segmentation"),
        ("abc", "annotation 1: its segmentation cannot be read"),
        ({"size": [HEIGHT, WIDTH]}, "annotation 1: its segmentation cannot be read: KeyError"),
        (runs(np.ones((3, 4))), r"has the size \[3, 4\], its image \[30, 41\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [3, 4]}, "its run lengths do not cover the 41x30"),
        ({"size": [HEIGHT, WIDTH], "counts": [-1, 1231]}, "its run lengths do not cover"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**62] * 4 + [1230]}, "its run lengths do not cover"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**70]}, "cannot be read: OverflowError"),
        ({"size": [HEIGHT, WIDTH], "counts": ["a"]}, "cannot be read: ValueError"),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, "its run lengths do not cover"),
        ({"size": [HEIGHT, WIDTH], "counts": "ooooooooooooooo"}, "its run lengths do not cover"),
        ({"size": [HEIGHT, WIDTH], "counts": "\xff"}, "cannot be read: UnicodeEncodeError"),
    ],
)  # fmt: skip
def test_a_bad_segmentation_is_refused_in_one_line(write, segmentation, message):
    root = write((3, segmentation, {}))
    with pytest.raises(DataError, match=message) as refused:
        masks(root)
    assert "\n" not in str(refused.value)
    assert str(root / "annotations.json") in str(refused.value)


@pytest.mark.parametrize(
    ("polygons", "message"),
    [
        ([[1, 1, 5, 1]], "its polygon has 4 numbers, not x and y of three or more points"),
        ([[1, 1, 5, 1, 5, 5], [1, 1, 5, 1, 5]], "its polygon has 5 numbers"),
        ([1, 1, 5, 1, 5, 5], "its polygon has 1 numbers"),
        ([[1, 1, 5, 1, 5, "b"]], "its polygon cannot be read"),
        ([[1, 1, 5, 1, 5, 1e9]], "its polygon has points far outside the image"),
        ([[1, 1, 5, 1, 5, float("nan")]], "its polygon has points far outside the image"),
    ],
)
def test_a_bad_polygon_is_refused_in_one_line(write, coco_mask, polygons, message):
    root = write((3, polygons, {}))
    with pytest.raises(DataError, match=message) as refused:
        masks(root)
    assert "\n" not in str(refused.value)
    assert str(root / "annotations.json") in str(refused.value)


def test_polygons_need_pycocotools(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    root = write((3, [[1, 1, 5, 1, 5, 5]], {}))
    with pytest.raises(DataError, match=r"annotations.json: .* pip install 'resjax\[detection\]'"):
        open_dataset(f"coco:{root}", targets=("mask",))
    assert open_dataset(f"coco:{root}").targets == ("boxes", "classes")


def test_a_mask_has_room_for_254_categories(write):
    root = write(categories=[(number, f"c{number}") for number in range(255)])
    with pytest.raises(DataError, match="names 255 categories; a mask has room for 254"):
        masks(root)
    assert len(load(f"coco:{root}").class_names) == 256
