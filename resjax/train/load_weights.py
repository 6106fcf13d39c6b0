"""Loads weights from a weights folder, a run, a foreign file, the hub or the web."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from resjax.config import from_dict
from resjax.disk import CHECKSUMS, digest
from resjax.errors import UserError
from resjax.models.layout import unrolled
from resjax.run_files import is_run_folder, primary_metric, read_json_object, require_kind
from resjax.text import user_path
from resjax.train.parallel import make_backend
from resjax.train.progress import Warn, print_warning
from resjax.train.sources import make_source
from resjax.transfer import weights as weights_folder
from resjax.transfer.importing import Options, apply_options, import_weights
from resjax.transfer.surgery import with_channels
from resjax.transfer.weights import (
    Weights,
    describe_run,
    from_description,
    is_weights_folder,
    require_usable,
    unflatten,
)

EMA = "ema/", "average/"  # prefixes of the EMA's arrays; runs of resjax 0.1 have the second


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
      UserError: there are no weights, they are damaged, or an array is not finite.
    """
    weights = _load(source, which, warn, options or Options())
    try:
        require_usable(weights)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return weights


def _load(source: str | Path, which: str, warn: Warn, options: Options) -> Weights:
    folder = user_path(source)
    if is_run_folder(folder) and not is_weights_folder(folder):
        options.require_own(source)
        return apply_options(_read_run(folder, which, warn), options)
    if which != "last":
        raise UserError(f"{source} is not a run folder: it has no checkpoint {which!r}")
    if is_weights_folder(folder):
        options.require_own(source)
        return apply_options(weights_folder.load(folder), options)
    require_kind(folder, "run")
    return import_weights(str(source), options, warn)


def _read_run(folder: Path, which: str, warn: Warn) -> Weights:
    """Returns the weights of one of a run's checkpoints: its EMA, or else its parameters.

    Args:
      folder: of the run.
      which: `last`, `best` (by the primary metric on the test set), or the number of a step.
      warn: called for damaged checkpoints, which are skipped.

    Raises:
      UserError: there is no such intact checkpoint; the run's images are not square.
    """
    from resjax.train.checkpoint_reader import CheckpointReader  # imports Orbax

    reader = CheckpointReader(folder / "checkpoints", warn)
    path = folder / "provenance.json"
    provenance = read_json_object(path) if path.exists() else {}
    restored = reader.restore_selected(which, None, primary_metric(provenance, path))
    record, arrays = restored.record, jax.device_get(restored.state)
    prefix = next((p for p in EMA if any(name.startswith(p) for name in arrays)), "")
    variables = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith((f"{prefix}params/", f"{prefix}batch_stats/"))
    }
    source = {
        "format": "resjax run",
        "file": str(folder),
        "step": restored.step,
        "sha256": digest(reader.folder / str(restored.step) / CHECKSUMS),
    }
    description = record.get("weights") or _describe_from_dataset(record["config"])
    if not description["model"]["classes"]:  # the head of another task
        heads = "params/head/", "batch_stats/head/"
        variables = {k: v for k, v in variables.items() if not k.startswith(heads)}
    try:
        return from_description(description, unrolled(unflatten(variables)), source)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def _describe_from_dataset(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Describes the weights of a run of resjax 0.1, whose checkpoints do not, from its dataset."""
    config = from_dict(recorded)
    source = make_source(config, make_backend(config))
    statistics = source.statistics
    if config.data.normalization == "weights":
        initial = load_weights(str(config.transfer.weights))
        statistics = with_channels(initial, source.info.image_shape[2]).statistics
    return describe_run(
        config,
        statistics,
        source.info.image_shape,
        source.info.class_names,
        streamed=source.streamed,
    )
