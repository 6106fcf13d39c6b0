"""Exports a network with its weights as a StableHLO program, which runs without resjax.

`jax.export.deserialize(bytearray(file.read()))` loads it. A description beside it documents inputs
and outputs. The caller decodes and resizes the images.
"""

import json
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from jax import export

from resjax.disk import write_atomically
from resjax.inference.dense import is_dense, predictor, whole_image
from resjax.inference.predict import class_names, classifier
from resjax.transfer.weights import Weights
from resjax.xla.convolution import as_written

PLATFORMS = ("cpu", "cuda", "tpu")  # one file contains the program for all of them

OUTPUTS: dict[str, str | dict[str, str]] = {
    "classification": "probabilities, one per class",
    "segmentation": {"mask": "the index in class_names of each pixel's class"},
    "detection": {
        "boxes": "left, top, right and bottom in pixels of the input",
        "scores": "in falling order; 0 is no object",
        "classes": "indices of class_names",
    },
}
"""The description of a program's output for each task: of one array, or of a dict of arrays."""


def export_program(weights: Weights, path: Path, batch: int | None = None) -> Path:
    """Writes the inference function: from uint8 images to what `OUTPUTS` describes.

    Args:
      weights: with a head.
      path: of the program; `<path>.json` gets its description, class names and preprocessing.
      batch: number of images per call; None accepts any number.

    Returns:
      The path of the description.

    Raises:
      UserError: the weights have no head.
      OSError: the files cannot be written.
    """
    dense = is_dense(weights)
    preprocessing = whole_image(weights) if dense else weights.preprocessing
    (images,) = (batch,) if batch else export.symbolic_shape("batch")
    shape = (images, preprocessing.size, preprocessing.size, preprocessing.channels)
    # Unrolled, because a scan runs faster on no platform, and compile time does not matter here.
    function = jax.jit((predictor if dense else classifier)(weights, loop="unroll"))
    given = jax.ShapeDtypeStruct(shape, np.uint8)
    with as_written():  # instead of what is fastest on this machine
        exported = export.export(function, platforms=PLATFORMS)(given)
    write_atomically(path, bytes(exported.serialize()))
    description = {
        "input": {"dtype": "uint8", "shape": [batch or "batch", *shape[1:]]},
        "output": OUTPUTS[weights.task["name"]],
        "platforms": PLATFORMS,
        "preprocessing": asdict(preprocessing),
        "class_names": class_names(weights),
        "source": dict(weights.source),
    }
    return write_atomically(
        path.with_name(f"{path.name}.json"), json.dumps(description, indent=1) + "\n"
    )
