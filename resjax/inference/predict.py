"""What a network says of images: the likeliest classes and their probabilities."""

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

from resjax.data.datasets import OnBadImage
from resjax.data.normalization import normalize
from resjax.errors import UserError
from resjax.inference.images import Function, each_image, find_images
from resjax.inference.loading import on_device, require_head
from resjax.models.layout import Variables
from resjax.transfer.weights import Weights


class Prediction(NamedTuple):
    """The likeliest classes of an image, the likeliest first, and their probabilities."""

    path: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


class Predictions(NamedTuple):
    found: list[Prediction]
    left_out: list[Path]  # what cannot be decoded


def predict(
    weights: Weights,
    images: Sequence[Path],
    top: int = 5,
    *,
    batch_size: int = 64,
    on_bad_image: OnBadImage = "error",
    workers: int = 0,
) -> Predictions:
    """Classifies images, prepared as the weights' evaluation prepares them.

    Args:
      weights: with a head.
      images: files that Pillow reads, and folders of such, in which they are sorted.
      top: classes an image.
      batch_size: images that go through the network together, at most.
      on_bad_image: whether an image that cannot be decoded is an error, or left out.
      workers: processes that decode; 0 is a thread.

    Raises:
      UserError: a file is not there or is no image; the weights have no head; what they put out is
        not finite.
    """
    files = find_images(images)
    outputs = each_image(
        classifier(weights),
        files,
        weights.preprocessing,
        batch_size=batch_size,
        on_bad_image=on_bad_image,
        workers=workers,
    )
    if not np.isfinite(outputs.values).all():
        raise UserError("the network puts out what is no number; its weights are of no use")
    paths = list(map(Path, files.files))
    names = names_of_classes(weights)
    found = []
    for path, row in zip(compress(paths, outputs.good), outputs.values, strict=True):
        best = np.argsort(-row, kind="stable")[:top]
        found.append(Prediction(path, tuple(names[i] for i in best), tuple(map(float, row[best]))))
    return Predictions(found, list(compress(paths, ~outputs.good)))


def classifier(weights: Weights, **overrides: Any) -> Function:
    """A compiled function from images as bytes, prepared, to the probabilities of the classes.

    Args:
      weights: with a head.
      **overrides: of `resjax.build`.

    Raises:
      UserError: the weights have no head.
    """
    require_head(weights)
    model, variables = on_device(weights, **overrides)

    @jax.jit
    def probabilities(
        variables: Variables, images: UInt8[Array, "n h w c"]
    ) -> Float[Array, "n classes"]:
        return jax.nn.softmax(model.apply(variables, normalize(images, weights.statistics)))

    return partial(probabilities, variables)


def names_of_classes(weights: Weights) -> tuple[str, ...]:
    """Their names; their numbers, where nobody knows these."""
    return weights.class_names or tuple(map(str, range(weights.model["classes"])))


def as_csv(predictions: Sequence[Prediction]) -> str:
    """A row for every image and class: image, rank from 1 up, class, probability."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("image", "rank", "class", "probability"))
    for path, *ranked in predictions:
        each = enumerate(zip(*ranked, strict=True), 1)
        rows.writerows((path, rank, name, probability) for rank, (name, probability) in each)
    return text.getvalue()


def as_json(predictions: Sequence[Prediction]) -> str:
    """A list with an object for every image: `image` and its `classes`, the likeliest first."""
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
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[Prediction]], str]] = {"csv": as_csv, "json": as_json}
