"""A network as a program for elsewhere: StableHLO with its weights inside, which needs no resjax.

`jax.export.deserialize(bytearray(file.read()))` gives it back; a description beside it says what it
takes and what its outputs mean. Images are decoded and brought to their size by who calls it.
"""

import json
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from jax import export

from resjax.disk import write_atomically
from resjax.inference.predict import classifier, names_of_classes
from resjax.transfer.weights import Weights
from resjax.xla.convolution import as_written

PLATFORMS = ("cpu", "cuda", "tpu")  # all are in the one file


def export_program(weights: Weights, path: Path, batch: int | None = None) -> Path:
    """Writes the inference function: images as bytes in, probabilities of the classes out.

    Args:
      weights: with a head.
      path: of the file; `<path>.json` is written beside it, with class names and preprocessing.
      batch: images a call; None takes any number, 1 or more.

    Returns:
      The path of the description.

    Raises:
      UserError: the weights have no head.
      OSError: the files cannot be written.
    """
    shown = weights.preprocessing
    (images,) = (batch,) if batch else export.symbolic_shape("batch")
    shape = (images, shown.size, shown.size, shown.channels)
    # Unrolled: on no platform does a scan run faster, and nobody waits for the compiler here.
    function = jax.jit(classifier(weights, loop="unroll"))
    given = jax.ShapeDtypeStruct(shape, np.uint8)
    with as_written():  # and not as this machine runs it fastest
        exported = export.export(function, platforms=PLATFORMS)(given)
    write_atomically(path, bytes(exported.serialize()))
    description = {
        "input": {"dtype": "uint8", "shape": [batch or "batch", *shape[1:]]},
        "output": "probabilities, one a class",
        "platforms": PLATFORMS,
        "preprocessing": asdict(shown),
        "class_names": names_of_classes(weights),
        "source": dict(weights.source),
    }
    return write_atomically(
        path.with_name(f"{path.name}.json"), json.dumps(description, indent=1) + "\n"
    )
