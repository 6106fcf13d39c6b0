"""Classifies images: the most probable classes and their probabilities."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from resjax.data.normalization import normalize
from resjax.errors import UserError
from resjax.inference.images import Function, each_image, find_images, require_finite
from resjax.inference.loading import on_device, require_head
from resjax.models.layout import Variables
from resjax.text import csv_cell, encodable
from resjax.transfer.weights import CLASSIFICATION, Weights


class Prediction(NamedTuple):
    """The most probable classes of an image in descending order, and their probabilities."""

    path: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


class Predictions(NamedTuple):
    found: list[Prediction]
    skipped: list[Path]  # images that cannot be decoded


def predict(
    weights: Weights,
    images: Sequence[Path],
    top: int = 5,
    **batching: Any,
) -> Predictions:
    """Classifies images, preprocessed as in the evaluation of the weights.

    Args:
      weights: with a head.
      images: files that Pillow reads, and folders of them.
      top: number of classes per image.
      **batching: keywords of `each_image`: `batch_size`, `on_bad_image`, `workers`.

    Raises:
      UserError: a file does not exist or is not an image; the weights have no head; an output is
        not finite.
    """
    files = find_images(images)
    outputs = each_image(classifier(weights), files, weights.preprocessing, **batching)
    paths = list(map(Path, files.files))
    require_finite(outputs.values, compress(files.files, outputs.decoded))
    names = class_names(weights)
    found = []
    for path, row in zip(compress(paths, outputs.decoded), outputs.values, strict=True):
        best = np.argsort(-row, kind="stable")[:top]
        found.append(Prediction(path, tuple(names[i] for i in best), tuple(map(float, row[best]))))
    return Predictions(found, list(compress(paths, ~outputs.decoded)))


def classifier(weights: Weights, **overrides: Any) -> Function:
    """Returns a compiled function from preprocessed uint8 images to the probabilities of classes.

    Args:
      weights: with a head.
      **overrides: fields of `resjax.build`.

    Raises:
      UserError: the weights have no head, or that of another task.
    """
    require_head(weights)
    if weights.task != CLASSIFICATION:
        raise UserError(f"the weights are those of {weights.task['name']}, not of a classifier")
    model, variables = on_device(weights, **overrides)

    @jax.jit
    def probabilities(
        variables: Variables, images: UInt8[Array, "n h w c"]
    ) -> Float[Array, "n classes"]:
        return jax.nn.softmax(model.apply(variables, normalize(images, weights.statistics)))

    return partial(probabilities, variables)


def class_names(weights: Weights) -> tuple[str, ...]:
    """Returns the names of the classes, or their numbers if the names are unknown."""
    return weights.class_names or tuple(map(str, range(weights.model["classes"])))


def as_csv(predictions: Sequence[Prediction]) -> str:
    """Returns one row per image and class: image, rank from 1, class, probability."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("image", "rank", "class", "probability"))
    for path, *ranked in predictions:
        each = enumerate(zip(*ranked, strict=True), 1)
        image = csv_cell(str(path))
        rows.writerows(
            (image, rank, csv_cell(name), probability) for rank, (name, probability) in each
        )
    return text.getvalue()


def as_json(predictions: Sequence[Prediction]) -> str:
    """Returns a list with one object per image: `image` and its `classes` in descending order."""
    content = [
        {
            "image": str(path),
            "classes": [
                {"class": name, "probability": probability}
                for name, probability in zip(*ranked, strict=True)
            ],
        }
        for path, *ranked in predictions
    ]
    return encodable(json.dumps(content, indent=1, ensure_ascii=False)) + "\n"


FORMATS: dict[str, Callable[[Sequence[Prediction]], str]] = {"csv": as_csv, "json": as_json}
