"""What a run's network says of images: the likeliest classes, from a checkpoint that verifies."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from resjax.config import UserError
from resjax.data.crops import resize_and_center_crop
from resjax.data.decoding import as_array, open_image, resize
from resjax.data.examples import BadImageError
from resjax.data.feed import normalize
from resjax.train.feeding import Streamed
from resjax.train.loop import restored_run
from resjax.train.progress import Warn, warn_user
from resjax.train.step import Program


class Prediction(NamedTuple):
    """The likeliest classes of an image, the likeliest first, and their probabilities."""

    path: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    workdir: Path,
    images: Sequence[Path],
    which: str = "last",
    top: int = 5,
    warn: Warn = warn_user,
) -> list[Prediction]:
    """Classifies images as the run's evaluation would; by its averaged weights, where it has them.

    Args:
      workdir: the run folder.
      images: files that Pillow reads; brought to the size on which the network was trained.
      which: of the checkpoints, as for `evaluate`.
      top: classes an image.
      warn: is told of damaged checkpoints, which are passed over.

    Raises:
      UserError: there is no such run, checkpoint or file, or a file is no image.
    """
    program, restored = restored_run(workdir, which, warn)
    pixels = np.stack([_pixels(path, program) for path in images])
    state = restored.state
    variables = state.average or {"params": state.params, "batch_stats": state.batch_stats}

    @jax.jit
    def probabilities(images: UInt8[Array, "n h w c"]) -> Float[Array, "n classes"]:
        logits = program.model.apply(variables, normalize(images, program.statistics))
        return jax.nn.softmax(logits)

    names = program.source.class_names
    found = []
    for path, row in zip(images, np.asarray(probabilities(jnp.asarray(pixels))), strict=True):
        best = np.argsort(-row, kind="stable")[:top]
        found.append(Prediction(path, tuple(names[i] for i in best), tuple(map(float, row[best]))))
    return found


def _pixels(path: Path, program: Program) -> UInt8[np.ndarray, "h w c"]:
    height, width, channels = program.image_shape
    try:
        image = open_image(path.read_bytes(), channels, str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except BadImageError as error:
        raise UserError(str(error)) from error
    if isinstance(program.source, Streamed) and program.config.data.image_size:
        return resize_and_center_crop(image, np.random.default_rng(0), size=height)
    if (image.height, image.width) == (height, width):
        return as_array(image)
    return as_array(resize(image, height))
