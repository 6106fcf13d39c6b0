"""Images with masks or boxes: their folders, what is refused, and views that move all together."""

import json

import numpy as np
import pytest
from PIL import Image

from resjax.config import default_config, override, resolve
from resjax.data import placement
from resjax.data.crops import resize_and_center_crop
from resjax.data.datasets import DataError, load, open_dataset
from resjax.data.decoding import as_array, as_image, resize
from resjax.data.examples import VOID
from resjax.data.placement import View
from resjax.data.stream import eval_batches
from resjax.errors import UserError
from resjax.train.parallel import make_backend
from resjax.train.sources import make_source

PLACES = ("random_resized", "scale_jitter", "large_scale_jitter", "center", "whole", "fit")


def picture(number, height=6, width=8):
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def mask(number, height=6, width=8, classes=3):
    drawn = np.random.default_rng(number).integers(0, classes, (height, width), np.uint8)
    drawn[0, 0] = VOID
    return drawn


def masked(count=5, images="images", masks="masks", **options):
    return {f"{images}/{i}.png": picture(i) for i in range(count)} | {
        f"{masks}/{i}.png": mask(i, **options) for i in range(count)
    }


@pytest.fixture
def write_coco(write_folder):
    """Writes a folder in COCO's format: `write_coco(**changes of the file of annotations)`."""

    def write(name="annotations/instances_train2017.json", folder="train2017", **changes):
        root = write_folder({f"{folder}/{i}.png": picture(i) for i in range(5)})
        content = {
            "images": [described(10 + i, f"{i}.png") for i in range(5)],
            "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
            "annotations": [
                annotation(10, 7, [1, 2, 3, 4]),
                annotation(10, 3, [0, 0, 2, 2]),
                annotation(11, 3, [5, 1, 2.5, 3]),
            ],
        } | changes
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        return root

    return write


BOX = [0, 0, 1, 1]


def described(number, name, width=8, height=6):
    return {"id": number, "file_name": name, "width": width, "height": height}


def annotation(image, category, box, **others):
    return {
        "id": 1,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "iscrowd": 0,
        **others,
    }


def test_a_mask_lies_beside_each_image_and_the_last_fifth_is_the_test_split(write_folder):
    root = write_folder(masked(10))
    data = load(f"masks:{root}")
    assert (len(data.train), len(data.test), data.class_names) == (8, 2, ("0", "1", "2"))
    np.testing.assert_array_equal(data.train.images[3], picture(3))
    np.testing.assert_array_equal(data.test.targets["mask"][1], mask(9))
    opened = open_dataset(f"masks:{root}")
    assert (opened.targets, opened.image_shape) == (("mask",), None)
    assert opened.train[0].origin == str(root / "images" / "0.png")
    assert "the last fifth" in str(opened)


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images/{}", "masks/{}"),
        ("{}/images", "{}/masks"),
        ("images/{}", "annotations/{}"),  # as ADE20K
    ],
)
def test_parts_are_in_both_folders_or_contain_both(write_folder, images, masks):
    tree = {}
    for part, count in (("training", 4), ("validation", 2)):
        tree |= masked(count, images.format(part), masks.format(part))
    data = load(f"masks:{write_folder(tree)}")
    assert (len(data.train), len(data.test)) == (4, 2)


@pytest.mark.parametrize("inner", ["images/{}", "{}/images"])
def test_two_folders_of_one_part_are_refused(write_folder, inner):
    outer = inner.replace("images", "masks")
    tree = {}
    for part in ("train", "training", "test"):
        tree |= masked(2, inner.format(part), outer.format(part))
    with pytest.raises(DataError, match="training and train are both named train; rename one"):
        load(f"masks:{write_folder(tree)}")


def test_one_image_cannot_be_split(write_folder):
    with pytest.raises(DataError, match="one image is too few for a training and a test split"):
        load(f"masks:{write_folder(masked(1))}")


def test_classes_have_the_names_of_a_file_and_palettes_are_numbers(write_folder):
    root = write_folder(masked())
    colored = Image.fromarray(mask(0))
    colored.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    colored.save(root / "masks" / "0.png")
    (root / "classes.txt").write_text("sky\nsea\nsand\nsun\n")
    data = load(f"masks:{root}")
    assert data.class_names == ("sky", "sea", "sand", "sun")
    np.testing.assert_array_equal(data.train.targets["mask"][0], mask(0))


def _save(path, array):
    Image.fromarray(array).save(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: _save(root / "masks/1.png", mask(1, 5)), "masks/1.png: is 8x5 .* image 8x6"),
        (
            lambda root: (root / "classes.txt").write_text("a\nb\n"),
            r"masks/\d.png: has a pixel of class 2, but there are 2 classes",
        ),
        (lambda root: _save(root / "masks/2.png", picture(2)), r"masks/2.png: has colors \(RGB\)"),
        (
            lambda root: _save(root / "masks/2.png", np.full((6, 8), 300, np.uint16)),
            "masks/2.png: has pixels from 300 to 300; classes are numbered from 0 to 254",
        ),
        (
            lambda root: [_save(root / f"masks/{i}.png", mask(i) & 2) for i in range(5)],
            "no pixel is 1, but one is 2; number the classes from 0",
        ),
        (
            lambda root: [_save(root / f"masks/{i}.png", mask(i, classes=1)) for i in range(5)],
            "the pixels of all masks are 0, 255; 255 is void",
        ),
        (lambda root: (root / "masks").rename(root / "other"), "no folders images and masks"),
        (lambda root: (root / "images/1.jpg").write_bytes(b""), "1.jpg and 1.png have one name"),
    ],
)  # fmt: skip
def test_bad_masks_are_refused_in_one_line_that_names_the_file(write_folder, change, message):
    root = write_folder(masked())
    change(root)
    with pytest.raises(DataError, match=message) as refused:
        load(f"masks:{root}")
    assert "\n" not in str(refused.value)
    assert str(root) in str(refused.value)


def test_images_without_a_mask_are_skipped_and_named(write_folder):
    root = write_folder(masked() | {"images/9.png": picture(9), "masks/8.png": mask(8)})
    opened = open_dataset(f"masks:{root}")
    assert len(opened.train) + len(opened.test) == 5
    assert "an image without a mask: images/9.png" in str(opened)
    assert "a mask without an image: masks/8.png" in str(opened)


def test_categories_are_numbered_by_id_after_the_background(write_coco):
    data = load(f"coco:{write_coco()}")
    assert data.class_names == ("background", "cat", "dog")
    boxes, classes = data.train.targets["boxes"], data.train.targets["classes"]
    assert (boxes.dtype, classes.dtype) == (np.float32, np.int32)
    assert classes.tolist() == [[2, 1], [1, 0], [0, 0], [0, 0]]
    assert boxes[:2].tolist() == [[[1, 2, 4, 6], [0, 0, 2, 2]], [[5, 1, 7.5, 4], [0, 0, 0, 0]]]
    assert "3 images have no object" in str(data)


def test_crowds_and_empty_boxes_are_left_out_and_others_cut_at_the_border(write_coco):
    annotations = [
        annotation(10, 7, [1, 1, 5, 3], iscrowd=1),
        annotation(10, 7, [1, 1, 0, 3]),
        annotation(10, 7, [4, 4, -2, -2]),  # turned round
        annotation(10, 7, [9, 1, 3, 3]),  # outside
        annotation(10, 3, [-1, 2, 20, 3]),
    ]
    data = load(f"coco:{write_coco(annotations=annotations)}")
    assert data.train.targets["classes"][0].tolist() == [1]
    assert data.train.targets["boxes"][0].tolist() == [[0, 2, 8, 5]]
    for note in ("1 annotations of crowds", "3 boxes without area", "1 boxes are cut"):
        assert note in str(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": [described(10, "x.png")], "annotations": []},
            "names 1 images that .*train2017.* lacks: x.png",
        ),
        ({"annotations": [annotation(99, 3, BOX)]}, "annotation 1 names image 99, which"),
        ({"annotations": [annotation(10, 4, BOX)]}, "annotation 1 names category 4, which"),
        ({"annotations": [annotation(10, 3, BOX[:3])]}, r"annotation 1 has the box \[0, 0, 1\],"),
        ({"annotations": [annotation(10, 3, BOX * 2)]}, "annotation 1 has the box .*, not four"),
        ({"annotations": [annotation(10, 3, ["a"] * 4)]}, "annotation 1 has the box .*, not four"),
        ({"annotations": [annotation(10, 3, None)]}, "annotation 1 has the box None, not four"),
        ({"annotations": [annotation(10, 2**70, BOX)]}, "annotation 1 names category 1180591620"),
        ({"annotations": [annotation(10, "x", BOX)]}, "cannot be read as annotations of COCO"),
        ({"annotations": [annotation(99, 3, BOX, iscrowd=1)]}, "annotation 1 names image 99"),
        ({"images": [described(10, "")], "annotations": []}, "one of its images has no file_name"),
        ({"images": [described(10, "0.png")] * 2}, "two of its images have one id"),
        ({"images": [described(10, "0.png", 10**12)]}, "cannot be read as annotations of COCO"),
        (
            {"categories": [{"id": 3, "name": "cat"}] * 2, "annotations": []},
            "two of its categories have one id",
        ),
        ({"annotations": [{"id": 1}]}, "annotation 1 names image None, which is not in its"),
        ({"annotations": [{"id": 1, "image_id": 10}]}, "annotation 1 names category None"),
        ({"annotations": [annotation(10, 3, [0, 0, 1, np.inf])]}, "annotation 1 has the box"),
        ({"categories": []}, "names no categories"),
        ({"images": 3}, "cannot be read as annotations of COCO"),
        (
            {"images": [described(i, f"{i}.png", 6, 8) for i in range(5)], "annotations": []},
            "0.png: is 8x6 pixels, but its annotations are for an image of 6x8",
        ),
    ],
)  # fmt: skip
def test_bad_annotations_are_refused_in_one_line_that_names_the_file(write_coco, changes, message):
    root = write_coco(**changes)
    with pytest.raises(DataError, match=message) as refused:
        load(f"coco:{root}")
    assert "\n" not in str(refused.value)
    assert str(root) in str(refused.value)


@pytest.mark.parametrize(
    ("files", "folders"),
    [
        (("annotations/instances_{}2017.json",) * 2, ("{}2017",) * 2),
        (("annotations/{}.json",) * 2, ("images/{}",) * 2),
        (("annotations/{}.json",) * 2, ("images",) * 2),
        (("{}/_annotations.coco.json",) * 2, ("{}",) * 2),  # as Roboflow exports it
    ],
)
def test_training_and_validation_may_have_files_of_annotations(write_coco, files, folders):
    for part, file, folder in zip(("train", "val"), files, folders, strict=True):
        root = write_coco(file.format(part), folder.format(part))
    (root / "captions_train2017.json").write_text("{}")
    opened = open_dataset(f"coco:{root}")
    assert (len(opened.train), len(opened.test), opened.objects) == (5, 5, 2)


@pytest.mark.parametrize("name", PLACES)
def test_image_mask_and_boxes_move_together(name):
    """The image shows the mask's classes as gray levels, and boxes bound the classes."""
    height, width, side = 40, 60, 32
    classes = np.zeros((height, width), np.uint8)
    boxes = np.array([[6, 8, 26, 20], [30, 18, 54, 34], [0, 0, 0, 0]], np.float32)
    for number, (left, top, right, bottom) in enumerate(boxes[:2].astype(int), 1):
        classes[top:bottom, left:right] = number
    targets = {"mask": classes, "boxes": boxes, "classes": np.array([1, 2, 0], np.int32)}
    image = Image.fromarray(classes * 100)
    view = View(getattr(placement, name), side)
    for seed in range(10):
        pixels, moved = view.targeted(image, targets, np.random.default_rng(seed))
        assert pixels.shape == (side, side, 1)
        shown = moved["mask"]
        inside = shown != VOID
        near = np.abs(pixels[..., 0].astype(int) - shown * 100) <= 50
        assert near[inside].mean() > 0.75  # all but edges between 0 and 200
        assert (pixels[..., 0][~inside] == 115).all()
        for number in (1, 2):
            rows, columns = np.nonzero(shown == number)
            (box,) = moved["boxes"][moved["classes"] == number] if len(rows) > 8 else [None]
            if box is not None:
                tight = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                assert np.abs(box - tight).max() <= 1
        assert moved["classes"][2] == 0
        assert moved["boxes"].dtype == np.float32


@pytest.mark.parametrize(
    ("name", "crop"),
    [
        ("center", resize_and_center_crop),
        ("fit", lambda image, _, size: as_array(resize(image, size))),
    ],
)
def test_a_view_shows_the_same_pixels_as_the_crop_for_classification(name, crop):
    image = as_image(picture(0, 90, 133))
    view = View(getattr(placement, name), 32)
    for seed in range(3):
        expected = crop(image, np.random.default_rng(seed), size=32)
        np.testing.assert_array_equal(view(image, np.random.default_rng(seed)), expected)


def test_a_whole_image_is_padded_with_void(write_folder):
    root = write_folder(masked())
    data = load(f"masks:{root}", image_size=4, whole_images=True)
    assert data.train.images.shape == (4, 4, 4, 3)
    assert (data.train.targets["mask"][:, 3] == VOID).all()  # 3 of 4 rows are the image
    assert (data.train.images[:, 3] == placement.PADDING).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_has_the_masks_and_boxes_of_resident_data(write_folder, write_coco, workers):
    write_folder(masked())
    root = write_coco()
    for name in (f"coco:{root}", f"masks:{root}"):
        view, train = View(placement.fit, 4), open_dataset(name).train
        with eval_batches(train, batch_size=4, crop=view, workers=workers) as batches:
            (batch,) = batches
        resident = load(name, image_size=4).train.arrays
        assert batch.arrays.keys() == resident.keys()
        for key, array in batch.arrays.items():
            assert array.dtype == resident[key].dtype
            np.testing.assert_array_equal(array, resident[key])


def test_subsets_by_label_are_refused(write_coco):
    with pytest.raises(DataError, match=r"data.per_class choose .* have boxes and"):
        load(f"coco:{write_coco()}", classes=["cat"])


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_stream_compiles_for_the_arrays_that_it_yields(
    write_folder, write_coco, accumulation_steps
):
    write_folder(masked())
    root = write_coco()
    for kind in ("coco", "masks"):
        changes = {
            "data.name": f"{kind}:{root}",
            "data.batch_size": 4,
            "data.image_size": 4,
            "data.feed": "stream",
            "data.workers": 0,
            "data.train_crop": "large_scale_jitter",
            "data.eval_crop": "whole",
            "train.accumulation_steps": accumulation_steps,
        }
        config = resolve(override(default_config(), changes))
        source = make_source(config, make_backend(config))
        batches = source.training(0, 0), source.evaluation()
        for expected, yielded in zip(source.example_arrays(), batches, strict=True):
            arrays = next(yielded)
            assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
                name: (array.shape, array.dtype) for name, array in expected.items()
            }
            yielded.close()


def test_a_square_larger_than_the_smallest_jittered_image_is_refused(write_coco):
    changes = {"data.feed": "stream", "data.train_crop": "scale_jitter", "data.image_size": 257}
    changes |= {"data.name": f"coco:{write_coco()}", "data.batch_size": 4}
    config = resolve(override(default_config(), changes))
    with pytest.raises(UserError, match="image_size=257 does not fit"):
        make_source(config, make_backend(config))
