"""A run's network as weights, which all that uses networks takes, wherever they come from."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from resjax.config import Model
from resjax.data.crops import usual_shorter_side
from resjax.errors import UserError
from resjax.models.layout import unrolled
from resjax.train.loop import restored_run
from resjax.train.progress import Warn, print_warning
from resjax.train.sources import Streamed
from resjax.train.step import Program
from resjax.transfer.weights import Preprocessing, Weights

# They change how a network is trained or compiled, and not what it says of images.
OF_TRAINING = frozenset(("name", "loop", "remat", "stochastic_depth", "zero_init_residual"))


def is_run_folder(path: Path) -> bool:
    """Whether a run was trained there; a folder of Hugging Face's has a config.json too."""
    has = ("checkpoints", "provenance.json")
    return (path / "config.json").is_file() and any((path / name).exists() for name in has)


def weights_of_run(workdir: Path, which: str = "last", warn: Warn = print_warning) -> Weights:
    """The weights of one of a run's checkpoints; the averaged ones, where the run has them.

    Images then come to the network as in the run's evaluation; of `data.eval_crop=ten`, which
    averages over crops, only the middle one counts.

    Args:
      workdir: the run folder.
      which: `last`, `best`, or a step's number, as for `resjax evaluate`.
      warn: is told of damaged checkpoints, which are passed over.

    Raises:
      UserError: there is no such run, or no such checkpoint that verifies; its dataset is not here;
        its images are not square.
    """
    program, restored = restored_run(workdir, which, warn)
    state = restored.state
    variables = state.average or {"params": state.params, "batch_stats": state.batch_stats}
    return Weights(
        model={**_architecture(program.config.model), "classes": program.classes},
        variables=jax.device_get(unrolled(dict(variables))),
        statistics=program.statistics._replace(color_axes=None),
        preprocessing=_preprocessing(program, workdir),
        class_names=tuple(program.source.class_names),
        source={"format": "resjax run", "file": str(workdir), "step": restored.step},
    )


def _architecture(model: Model) -> dict[str, Any]:
    return {name: value for name, value in asdict(model).items() if name not in OF_TRAINING}


def _preprocessing(program: Program, workdir: Path) -> Preprocessing:
    height, width, channels = program.image_shape
    if height != width:
        raise UserError(
            f"{workdir}: trained on images of {height}x{width} pixels; weights take square ones, "
            "such as a run with data.image_size has"
        )
    cut = isinstance(program.source, Streamed) and program.config.data.image_size
    return Preprocessing(height, usual_shorter_side(height) if cut else height, channels)
