"""A detector's results in COCO's formats, and their evaluation by pycocotools."""

import json

import numpy as np
import pytest

from resjax.cli import main
from resjax.config import default_config, override, resolve
from resjax.errors import UserError
from resjax.inference import coco
from resjax.inference.coco import Objects
from resjax.tasks.average_precision import average_precision, count
from resjax.tasks.boxes import Detections
from resjax.train.loop import restore_run, train


@pytest.fixture
def pycocotools():
    return pytest.importorskip("pycocotools", reason="needs the extra `detection`")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A detector that was trained for two steps on a few scenes."""
    fields = {
        "model.depth": 8,
        "model.width": 4,
        "task.name": "detection",
        "task.options": {"channels": 4, "stages": 1},
        "data.name": "scenes",
        "data.train_split": "train[:8]",
        "data.test_split": "test[:6]",
        "data.batch_size": 4,
        "data.eval_batch_size": 4,
        "train.steps": 2,
        "train.log_every": 2,
        "train.eval_every": 2,
    }
    folder = tmp_path_factory.mktemp("runs") / "detector"
    train(resolve(override(default_config(), fields)), folder)
    return folder


def test_results_are_boxes_of_known_images_and_classes(detector, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(coco, "average_precision", lambda objects: {"ap": 0.25})
    file = tmp_path / "new" / "found.json"
    assert main(["evaluate", f"--workdir={detector}", f"--coco={file}"]) == 0
    out = capsys.readouterr().out
    assert "test_ap50" in out
    assert "coco_ap" in out
    annotated = json.loads((file.parent / "found_annotations.json").read_text())
    assert [image["id"] for image in annotated["images"]] == list(range(6))
    assert [each["name"] for each in annotated["categories"]] == [*"0123456789"]
    assert len(annotated["annotations"]) >= 6
    for each in [*annotated["annotations"], *json.loads(file.read_text())]:
        left, top, width, height = each["bbox"]
        assert 0 <= left <= left + width <= 64
        assert 0 <= top <= top + height <= 64
        assert each["image_id"] in range(6)
        assert each["category_id"] in range(11)


def random_objects(seed, images=40):
    """Returns objects in COCO's formats, and the same as arrays."""
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, 40, (images, 4, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(5, 30, corners.shape)], -1)
    classes = generator.integers(0, 4, (images, 4))
    found = boxes + generator.normal(0, 1.5, boxes.shape)
    found[..., 2:] = np.maximum(found[..., 2:], found[..., :2] + 1)
    labels = np.maximum(classes, 1)
    bins = generator.permutation(999)[: 4 * images].reshape(images, 4)
    order = np.argsort(-bins, 1)
    scores = np.take_along_axis(bins, order, 1) / 1000 + 0.0005
    found = np.take_along_axis(found, order[..., None], 1)
    labels = np.take_along_axis(labels, order, 1)

    def sides(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    results = [
        {
            "image_id": i,
            "category_id": int(labels[i, j]),
            "bbox": sides(found[i, j]),
            "score": scores[i, j],
        }
        for i, j in np.ndindex(labels.shape)
    ]
    annotations = [
        {
            "id": 1 + number,
            "image_id": i,
            "category_id": int(classes[i, j]),
            "bbox": sides(boxes[i, j]),
            "area": float(np.prod(boxes[i, j, 2:] - boxes[i, j, :2])),
            "iscrowd": 0,
        }
        for number, (i, j) in enumerate(np.ndindex(classes.shape))
        if classes[i, j]
    ]
    annotated = {
        "images": [{"id": i, "height": 80, "width": 80} for i in range(images)],
        "categories": [{"id": label, "name": str(label)} for label in (1, 2, 3)],
        "annotations": annotations,
    }
    return Objects(results, annotated), boxes, classes, Detections(found, scores, labels)


@pytest.mark.usefixtures("pycocotools")
@pytest.mark.parametrize("seed", range(3))
def test_the_precision_of_training_is_that_of_pycocotools(seed):
    objects, boxes, classes, found = random_objects(seed)
    exact = coco.average_precision(objects)
    # pycocotools takes 7 of 20 objects for a recall below 0.35, which its threshold rounds up.
    own = average_precision(count(found, boxes.astype(np.float32), classes, 4))[1:]
    assert own.mean() == pytest.approx(exact["ap"], abs=1e-4)
    assert own[:, 0].mean() == pytest.approx(exact["ap50"], abs=1e-4)


@pytest.mark.usefixtures("pycocotools")
def test_without_detections_the_precision_is_zero():
    objects = random_objects(0)[0]._replace(found=[])
    assert set(coco.average_precision(objects).values()) == {0.0}


def test_a_classifier_has_no_coco_results_in_one_line(tmp_path, capsys):
    fields = {"model.depth": 8, "model.width": 4, "train.steps": 1, "train.log_every": 1}
    fields |= {"train.eval_every": 1, "data.batch_size": 4, "data.per_class": 2}
    train(resolve(override(default_config(), fields)), tmp_path / "run")
    with pytest.raises(UserError, match="for detection; the run's task is classification"):
        coco.find_objects(*restore_run(tmp_path / "run", "last", print))
    command = ["evaluate", f"--workdir={tmp_path / 'run'}", f"--coco={tmp_path / 'found.json'}"]
    assert main(command) == 2
    assert capsys.readouterr().out == ""
