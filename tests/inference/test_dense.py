"""`resjax predict` of masks and boxes: in the image's own size, as data and as pictures."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from resjax.cli import main
from resjax.data.normalization import Statistics
from resjax.data.pictures import draw_boxes, draw_mask, palette
from resjax.inference.dense import predict_dense
from resjax.inference.program import export_program
from resjax.models.layout import unrolled
from resjax.tasks.boxes import Detections
from resjax.transfer.weights import Preprocessing, Weights, network_of, save
from resjax.xla.compile_options import quick_compile

NAMES = ("background", "cat", "dog")
TASKS = {
    "segmentation": {"decoder": "unet"},
    "detection": {"channels": 4, "stages": 1},
}


@pytest.fixture(scope="module", params=TASKS)
def weights(request):
    """Random weights of a small network of each task."""
    task = {"name": request.param, "options": TASKS[request.param]}
    model = {"family": "cifar", "depth": 8, "width": 4, "classes": 3}
    init = jax.jit(network_of(model, task).init, compiler_options=quick_compile())
    variables = unrolled(jax.device_get(init(jax.random.key(0), np.zeros((1, 16, 16, 3)))))
    statistics = Statistics(np.zeros(3, np.float32), np.ones(3, np.float32))
    return Weights(model, variables, statistics, Preprocessing(16, 16), NAMES, {}, task)


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    file = tmp_path / "image.png"
    Image.fromarray(pixels).save(file)
    return file


def test_predictions_have_the_size_of_the_image(weights, image):
    found = predict_dense(weights, [image], min_score=0.0)
    (prediction,) = found.found
    assert prediction.image.shape == (20, 30, 3)
    if weights.task["name"] == "segmentation":
        mask = prediction.targets["mask"]
        assert mask.shape == (20, 30)
        assert set(np.unique(mask)) <= {0, 1, 2}
        return
    boxes, scores = prediction.targets["boxes"], prediction.targets["scores"]
    assert (boxes[:, [0, 1]] >= 0).all()
    assert (boxes[:, 2] <= 30).all()
    assert (boxes[:, 3] <= 20).all()
    assert (scores > 0).all()


def test_boxes_are_scaled_back_and_weak_ones_left_out(image, weights, monkeypatch):
    if weights.task["name"] != "detection":
        pytest.skip("boxes")
    monkeypatch.setattr(
        "resjax.tasks.detection.Detection.detections",
        lambda *_: Detections(
            np.array([[[4.0, 8, 12, 16], [0, 0, 8, 8]]], np.float32),
            np.array([[0.9, 0.2]], np.float32),
            np.array([[2, 1]]),
        ),
    )
    (prediction,) = predict_dense(weights, [image]).found
    np.testing.assert_allclose(prediction.targets["boxes"], [[7.5, 10, 22.5, 20]])
    assert prediction.targets["classes"].tolist() == [2]


def test_the_command_writes_pictures_masks_and_json(weights, image, tmp_path, capsys):
    save(weights, tmp_path / "weights")
    command = ["predict", f"--checkpoint={tmp_path / 'weights'}", str(image), "--min-score=0"]
    out = tmp_path / "new" / "folder"
    assert main([*command, f"--out={out}"]) == 0
    (entry,) = json.loads((out / "predictions.json").read_text())
    assert (entry["image"], entry["height"], entry["width"]) == (str(image), 20, 30)
    if weights.task["name"] == "segmentation":
        mask = np.asarray(Image.open(out / "image-mask.png"))
        assert mask.shape == (20, 30)
        counts = {NAMES[label]: int((mask == label).sum()) for label in np.unique(mask)}
        assert entry["pixels"] == counts
        assert np.asarray(Image.open(out / "image.png")).shape == (20, 30, 3)
    else:
        assert all(each["class"] in NAMES for each in entry["objects"])
        assert (out / "image.png").is_file()
    capsys.readouterr()
    assert main([*command, "--format=json"]) == 0
    assert json.loads(capsys.readouterr().out) == [entry]
    assert main(command) == 0
    assert "found" in capsys.readouterr().out
    assert main([*command, f"--out={tmp_path / 'a.csv'}"]) == 2
    assert "are written to a folder (--out=DIR)" in capsys.readouterr().err


@pytest.fixture
def finding(weights):
    """The weights, with scores so high that a detector finds objects."""
    params = flatten_dict(weights.variables["params"])
    for path in params:
        if path == ("head", "classification", "last", "bias"):
            params[path] = params[path] + 5
    return replace(weights, variables=weights.variables | {"params": unflatten_dict(params)})


def exported(weights, file, batch=None):
    """Returns the program that is exported, and its description."""
    description = json.loads(export_program(weights, file, batch).read_text())
    return jax.export.deserialize(bytearray(file.read_bytes())), description


def test_a_program_finds_what_predict_finds_in_any_batch(finding, image, tmp_path):
    program, description = exported(finding, tmp_path / "program")
    squashed = np.asarray(Image.open(image).resize((16, 16), Image.Resampling.BILINEAR))
    found = program.call(np.stack([squashed, 255 - squashed, squashed]))
    assert found.keys() == description["output"].keys()
    assert description["preprocessing"]["squash"]
    (prediction,) = predict_dense(finding, [image], min_score=0).found
    for index in (0, 2):
        if "mask" in found:
            enlarged = Image.fromarray(np.asarray(found["mask"][index])).resize((30, 20), 0)
            np.testing.assert_array_equal(enlarged, prediction.targets["mask"])
            continue
        objects = found["scores"][index] > 0
        assert objects.sum() > 1
        boxes = found["boxes"][index][objects] * np.array([30, 20, 30, 20]) / 16
        np.testing.assert_allclose(boxes, prediction.targets["boxes"], atol=1e-3)
        for name in ("scores", "classes"):
            shown = found[name][index][objects]
            np.testing.assert_allclose(shown, prediction.targets[name], rtol=1e-5)


def test_the_batch_of_a_program_can_be_fixed(weights, tmp_path):
    program, description = exported(weights, tmp_path / "program", batch=2)
    assert description["input"]["shape"] == [2, 16, 16, 3]
    assert {array.shape[0] for array in program.out_avals} == {2}


def test_colors_of_classes_are_those_of_pascal_voc():
    assert palette(16)[[0, 1, 2, 15]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [192, 128, 128],
    ]


def test_masks_leave_the_background_and_boxes_of_no_class_as_they_are():
    image = np.full((8, 9, 1), 200, np.uint8)
    mask = np.zeros((8, 9), np.uint8)
    mask[2:4, 5], mask[0, 0] = 1, 255
    picture = draw_mask(image, mask, 3)
    assert picture.shape == (8, 9, 3)
    assert ((picture != 200).any(-1) == (mask == 1)).all()
    nothing = draw_boxes(image, np.zeros((2, 4)), np.zeros(2, int), NAMES)
    assert (nothing == 200).all()
    assert nothing.shape[:2] == (8 * 32, 9 * 32)
    assert (draw_boxes(image, np.array([[1, 1, 6, 6.0]]), np.array([2]), NAMES) != 200).any()
