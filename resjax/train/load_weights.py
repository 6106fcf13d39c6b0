"""Weights from wherever they are: a weights folder, a run, a foreign file, the hub or the web."""

from pathlib import Path

from resjax.errors import UserError
from resjax.train.progress import Warn, print_warning
from resjax.transfer import weights as weights_folder
from resjax.transfer.importing import Options, apply_options, import_weights
from resjax.transfer.weights import Weights, is_weights_folder


def load_weights(
    source: str | Path,
    which: str = "last",
    warn: Warn = print_warning,
    options: Options | None = None,
) -> Weights:
    """Reads weights, whatever holds them.

    Args:
      source: a weights folder, a run folder, or what `resjax import` takes: a file of foreign
        weights, `hub:OWNER/NAME`, `https://...`.
      which: checkpoint of a run: `last`, `best`, or the number of a step.
      warn: called for damaged checkpoints, which are skipped, and with notes on a foreign file.
      options: what the user knows of the weights.

    Returns:
      The weights; those of a run are its EMA if it keeps one.

    Raises:
      UserError: there are no weights, or they are damaged.
    """
    options, folder = options or Options(), Path(source)
    if is_run_folder(folder) and not is_weights_folder(folder):
        from resjax.train.run_weights import read_run  # imports Orbax

        return apply_options(read_run(folder, which, warn), options)
    if which != "last":
        raise UserError(f"{source} is not a run folder: it has no checkpoint {which!r}")
    if is_weights_folder(folder):
        return apply_options(weights_folder.load(folder), options)
    return import_weights(str(source), options, warn)


def is_run_folder(path: Path) -> bool:
    """Returns whether a run was trained there; Hugging Face's folders have a config.json too."""
    marks = ("checkpoints", "provenance.json")
    return (path / "config.json").is_file() and any((path / name).exists() for name in marks)
