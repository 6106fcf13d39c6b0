"""Masks and boxes for images, as data and as pictures.

An image is resized to the square that the network was evaluated on, whatever its aspect ratio, and
what is predicted is scaled back to the image.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8
from PIL import Image

from resjax.data.decoding import as_array, open_image
from resjax.data.image_files import read_image
from resjax.data.normalization import normalize
from resjax.data.pictures import draw_boxes, draw_mask, palette
from resjax.disk import atomic_file, write_atomically
from resjax.errors import UserError
from resjax.inference.images import each_image, find_images
from resjax.inference.loading import on_device, require_head
from resjax.inference.predict import class_names
from resjax.models.layout import Variables
from resjax.tasks import Detection, Task
from resjax.transfer.weights import Preprocessing, Weights

PALETTE_CLASSES = 256  # of a PNG file


class Prediction(NamedTuple):
    """What a network predicts for an image."""

    path: Path
    image: UInt8[np.ndarray, "h w c"]
    targets: dict[str, np.ndarray]  # a `mask` (h, w); or `boxes`, `scores`, `classes`


class Predictions(NamedTuple):
    found: list[Prediction]
    skipped: list[Path]  # images that cannot be decoded
    class_names: tuple[str, ...]


def is_dense(weights: Weights) -> bool:
    """Returns whether the weights have the head of a segmentation or a detector."""
    return weights.task["name"] != "classification" and weights.model["classes"] > 0


def predict_dense(
    weights: Weights, images: Sequence[Path], min_score: float = 0.5, **batching: Any
) -> Predictions:
    """Predicts masks or boxes.

    Args:
      weights: of a segmentation network or a detector.
      images: files that Pillow reads, and folders of them.
      min_score: the lowest score of an object.
      **batching: keywords of `each_image`: `batch_size`, `on_bad_image`, `workers`.

    Raises:
      UserError: a file does not exist or is not an image.
    """
    predicted = predictor(weights)
    task, files = weights.made_task(), find_images(images)

    def as_one_array(images: UInt8[np.ndarray, "n h w c"]) -> Array:
        found = predicted(images)
        if "mask" in found:
            return found["mask"]
        return jnp.concatenate([jnp.atleast_3d(found[name]) for name in DETECTED], -1)

    outputs = each_image(as_one_array, files, whole_image(weights), **batching)
    paths = list(map(Path, files.files))
    found = [
        _scaled(path, values, task, weights, min_score)
        for path, values in zip(compress(paths, outputs.decoded), outputs.values, strict=True)
    ]
    skipped = list(compress(paths, ~outputs.decoded))
    return Predictions(found, skipped, class_names(weights))


def predictor(weights: Weights, **overrides: Any) -> Callable[..., dict[str, Array]]:
    """Returns a compiled function from preprocessed uint8 images to what the task predicts.

    Args:
      weights: of a segmentation network or a detector.
      **overrides: fields of `resjax.build`.

    Raises:
      UserError: the weights have no head.
    """
    require_head(weights)
    task = weights.made_task()
    model, variables = on_device(weights, **overrides)

    @jax.jit
    def predicted(variables: Variables, images: UInt8[Array, "n h w c"]) -> dict[str, Array]:
        outputs = model.apply(variables, normalize(images, weights.statistics))
        return task.predict(outputs, images.shape[1:3])

    return partial(predicted, variables)


def whole_image(weights: Weights) -> Preprocessing:
    """Returns the preprocessing of dense predictions: the whole image, resized to a square."""
    size = weights.preprocessing.size
    return replace(weights.preprocessing, shorter_side=size, squash=True)


def _scaled(
    path: Path, values: np.ndarray, task: Task, weights: Weights, min_score: float
) -> Prediction:
    """Returns the predictions for an image in its own size."""
    channels, size = weights.preprocessing.channels, weights.preprocessing.size
    image = as_array(open_image(read_image(path), channels, str(path)))
    height, width = image.shape[:2]
    if isinstance(task, Detection):
        boxes, scores, classes = values[:, :4], values[:, 4], values[:, 5].astype(int)
        chosen = scores >= max(min_score, 1e-9)
        boxes = boxes[chosen] * (np.array([width, height] * 2) / size)
        return Prediction(
            path, image, {"boxes": boxes, "scores": scores[chosen], "classes": classes[chosen]}
        )
    mask = Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST)
    return Prediction(path, image, {"mask": np.asarray(mask)})


def rows(predictions: Predictions) -> Iterator[tuple[str, str, str]]:
    """Yields the image, the class, and the share of pixels or the score and box, for a table."""
    names = predictions.class_names
    for path, _, targets in predictions.found:
        if "mask" in targets:
            counts = np.bincount(targets["mask"].ravel(), minlength=len(names))
            for label in sorted(np.flatnonzero(counts), key=lambda each: -counts[each]):
                share = counts[label] / targets["mask"].size
                yield str(path), names[label], f"{share:.2%} of the pixels"
            continue
        for box, score, label in zip(*(targets[name] for name in DETECTED), strict=True):
            corners = ", ".join(f"{side:.0f}" for side in box)
            yield str(path), names[label], f"{score:.2f} at {corners}"


DETECTED = "boxes", "scores", "classes"


def as_json(predictions: Predictions) -> str:
    """Returns a list with one object per image: its objects, or the pixels of each class."""
    names, content = predictions.class_names, []
    for path, image, targets in predictions.found:
        height, width = image.shape[:2]
        entry: dict[str, Any] = {"image": str(path), "height": height, "width": width}
        if "mask" in targets:
            counts = np.bincount(targets["mask"].ravel(), minlength=len(names))
            entry["pixels"] = {name: int(n) for name, n in zip(names, counts, strict=True) if n}
        else:
            entry["objects"] = [
                {"class": names[label], "score": float(score), "box": list(map(float, box))}
                for box, score, label in zip(*(targets[name] for name in DETECTED), strict=True)
            ]
        content.append(entry)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write_pictures(predictions: Predictions, folder: Path) -> list[Path]:
    """Writes a picture for each image, its mask as a PNG of class numbers, and predictions.json.

    Files are named by their images; of equal names, later ones get a number.

    Raises:
      UserError: there are more classes than a PNG's palette has.
      OSError: the folder cannot be written.
    """
    names, written = predictions.class_names, list[Path]()
    if len(names) > PALETTE_CLASSES:
        raise UserError(f"a PNG file holds {PALETTE_CLASSES} classes, not {len(names)}")
    folder.mkdir(parents=True, exist_ok=True)
    used: set[str] = set()
    for path, image, targets in predictions.found:
        name, number = path.stem, 1
        while name in used:
            number += 1
            name = f"{path.stem}-{number}"
        used.add(name)
        if "mask" in targets:
            mask = targets["mask"]
            indexed = Image.fromarray(mask, "P")
            indexed.putpalette(palette(PALETTE_CLASSES).tobytes())
            written.append(_save(indexed, folder / f"{name}-mask.png"))
            picture = draw_mask(image, mask, len(names))
        else:
            boxes, scores, classes = (targets[each] for each in DETECTED)
            picture = draw_boxes(image, boxes, classes, names, scores)
        written.append(_save(Image.fromarray(picture), folder / f"{name}.png"))
    written.append(write_atomically(folder / "predictions.json", as_json(predictions)))
    return written


def _save(picture: Image.Image, path: Path) -> Path:
    with atomic_file(path) as file:
        picture.save(file, "PNG")
    return path
