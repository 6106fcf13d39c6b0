"""Detections of a run's test images in COCO's formats, and their exact average precision.

The metrics of training count scores in bins; here pycocotools, the extra `detection`, sorts them.
"""

import json
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from resjax.data.normalization import normalize
from resjax.disk import write_atomically
from resjax.errors import UserError
from resjax.tasks import Detection
from resjax.train.checkpoint_reader import Restored
from resjax.train.trainer import Trainer

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""The first six numbers of COCO's evaluation."""


class Objects(NamedTuple):
    """Objects found and annotated in the images of a split, in COCO's formats."""

    found: list[dict[str, Any]]  # image_id, category_id, bbox (left, top, width, height), score
    annotated: dict[str, Any]  # images, categories, annotations


def find_objects(trainer: Trainer, restored: Restored, split: str = "test") -> Objects:
    """Detects the objects in a split's images; an image's id is its number in the split, from 0.

    Raises:
      UserError: the run has another task than detection.
    """
    task = trainer.task
    if not isinstance(task, Detection):
        name = trainer.config.task.name
        raise UserError(f"COCO's formats are for detection; the run's task is {name}")
    variables = restored.state.ema or restored.state.variables

    @jax.jit
    def detect(images: Any) -> Any:
        outputs = trainer.model.apply(variables, normalize(images, trainer.statistics))
        return task.detections(outputs, images.shape[1:3])

    found: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    number = 0
    for batch in trainer.source.read(split):
        detections = jax.device_get(detect(batch["image"]))
        for index in np.flatnonzero(batch["weight"]):
            boxes, scores, classes = (part[index] for part in detections)
            found += [
                {"image_id": number, "category_id": int(label), "bbox": _sides(box), "score": score}
                for box, score, label in zip(boxes, scores.tolist(), classes, strict=True)
                if score > 0
            ]
            for box, label in zip(batch["boxes"][index], batch["classes"][index], strict=True):
                if label:
                    sides = _sides(box)
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": number,
                            "category_id": int(label),
                            "bbox": sides,
                            "area": sides[2] * sides[3],
                            "iscrowd": 0,
                        }
                    )
            number += 1
    height, width = trainer.image_shape[:2]
    names = task.dataset.class_names
    annotated = {
        "images": [{"id": image, "height": height, "width": width} for image in range(number)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names) if i],
        "annotations": annotations,
    }
    return Objects(found, annotated)


def write_results(objects: Objects, file: Path) -> Path:
    """Writes the detections as COCO's results, and the annotations beside them; returns their path.

    Raises:
      OSError: the files cannot be written.
    """
    write_atomically(file, json.dumps(objects.found) + "\n")
    annotations = file.with_name(f"{file.stem}_annotations.json")
    write_atomically(annotations, json.dumps(objects.annotated) + "\n")
    return annotations


def average_precision(objects: Objects) -> Mapping[str, float]:
    """Returns COCO's average precisions by name, computed by pycocotools.

    Raises:
      UserError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UserError(
            "COCO's evaluation needs pycocotools: pip install 'resjax[detection]'"
        ) from error
    if not objects.found:
        return dict.fromkeys(METRICS, 0.0)
    with redirect_stdout(StringIO()):  # it prints its progress
        truth = COCO()
        truth.dataset = objects.annotated
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(objects.found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, map(float, evaluation.stats[: len(METRICS)]), strict=True))


def _sides(box: Any) -> list[float]:
    left, top, right, bottom = map(float, box)
    return [left, top, right - left, bottom - top]
