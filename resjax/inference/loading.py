"""Pretrained networks, ready to use: from a weights folder, a run, or a file of foreign weights."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from resjax.errors import UserError
from resjax.models import layout
from resjax.models.layout import Variables
from resjax.models.presets import ARCHITECTURE
from resjax.models.resnet import ResNet, scans
from resjax.train.progress import Warn, print_warning
from resjax.transfer import surgery
from resjax.transfer.importing import Options, changed, import_weights
from resjax.transfer.weights import Weights, is_weights_folder, load


def weights_from(
    source: str | Path,
    which: str = "last",
    warn: Warn = print_warning,
    options: Options | None = None,
) -> Weights:
    """Reads weights, whatever holds them.

    Args:
      source: a weights folder, a run folder, or what `resjax import` takes: a file of foreign
        weights, `hub:NAME`, `https://...`.
      which: of a run's checkpoints: `last`, `best`, or a step's number.
      warn: is told of a run's damaged checkpoints, which are passed over, and of what is worth
        knowing of a file.
      options: what the user knows of the weights.

    Raises:
      UserError: there is nothing such, or it is damaged.
    """
    options = options or Options()
    folder = Path(source)
    if not is_weights_folder(folder):
        from resjax.train.run_weights import is_run_folder, weights_of_run  # takes seconds

        if is_run_folder(folder):
            return changed(weights_of_run(folder, which, warn), options)
    if which != "last":
        raise UserError(f"{source} is no run folder: it has no checkpoint {which!r} to choose")
    if is_weights_folder(folder):
        return changed(load(folder), options)
    return import_weights(str(source), options, warn)


def load_pretrained(
    path: str | Path,
    *,
    which: str = "last",
    classes: int | None = None,
    channels: int | None = None,
    backbone: bool = False,
    warn: Warn = print_warning,
    **overrides: Any,
) -> tuple[ResNet, Variables]:
    """A pretrained network and its variables.

    Args:
      path: a weights folder, a run folder, or what `resjax import` takes.
      which: of a run's checkpoints: `last`, `best`, or a step's number.
      classes: if it is not the number that the weights have, the head is a new, random one.
      channels: of the images, if not those of the weights: the first convolution is adapted.
      backbone: leave the head out; `method="features"` needs none.
      warn: is told what of a network that `overrides` makes another one was not in the weights.
      **overrides: of `resjax.build`, such as `loop="scan"` or `dtype="bfloat16"`. A network of
        another depth or other blocks takes what fits by path and shape, and the rest is drawn.

    Returns:
      The module, and its variables on the device, in the layout that the module's loop needs.

    Raises:
      UserError: there are no such weights, they are damaged, or `classes` is asked of a backbone.
      ValueError: an override that `resjax.build` does not take.
    """
    if backbone and classes is not None:
        raise UserError(f"classes={classes} and backbone=True: a backbone has no classes")
    weights = weights_from(path, which, warn)
    if differing := {name: overrides.pop(name) for name in ARCHITECTURE if name in overrides}:
        weights, found = surgery.refitted(weights, **differing)
        warn(f"{path}: {found.report()}")
    if backbone:
        weights = surgery.backbone(weights)
    if classes not in (None, weights.model["classes"]):
        weights = surgery.new_head(weights, classes)
    if channels not in (None, weights.preprocessing.channels):
        weights = surgery.with_channels(weights, channels)
    return on_device(weights, **overrides)


def on_device(weights: Weights, **overrides: Any) -> tuple[ResNet, Variables]:
    """The network of weights, and its variables on the device in the layout of its loop."""
    model = weights.network(**overrides)
    stacked = scans(model.loop, model.stages)
    arrays = jax.tree.map(jnp.asarray, weights.variables)
    return model, layout.scanned(arrays) if stacked else arrays


def require_head(weights: Weights) -> None:
    """Refuses a backbone where classes are asked for."""
    if "head" not in weights.variables["params"]:
        raise UserError("these weights are a backbone: they have no head that would tell classes")
