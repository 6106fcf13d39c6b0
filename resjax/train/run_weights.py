"""A run's network as weights, which all that uses networks takes, wherever they come from."""

from pathlib import Path

import jax

from resjax.errors import UserError
from resjax.models.layout import unrolled
from resjax.train.loop import restored_run
from resjax.train.progress import Warn, print_warning
from resjax.train.sources import Streamed
from resjax.transfer.weights import Weights, describe_run, from_description


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
    state, source = restored.state, program.source
    variables = state.average or {"params": state.params, "batch_stats": state.batch_stats}
    description = describe_run(
        program.config,
        program.statistics,
        program.image_shape,
        source.class_names,
        streamed=isinstance(source, Streamed),
    )
    origin = {"format": "resjax run", "file": str(workdir), "step": restored.step}
    try:
        return from_description(description, jax.device_get(unrolled(dict(variables))), origin)
    except UserError as error:
        raise UserError(f"{workdir}: {error}") from error
