"""Pretrained networks, ready to use: from a weights folder, a run, or a file of foreign weights."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from resjax.errors import UserError
from resjax.models import layout
from resjax.models.layout import Variables
from resjax.models.presets import ARCHITECTURE
from resjax.models.resnet import ResNet, uses_scan
from resjax.train.load_weights import load_weights
from resjax.train.progress import Warn, print_warning
from resjax.transfer import surgery
from resjax.transfer.weights import Weights


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
    weights = load_weights(path, which, warn)
    if differing := {name: overrides.pop(name) for name in ARCHITECTURE if name in overrides}:
        weights, merged = surgery.for_network(weights, **differing)
        warn(f"{path}: {merged.report()}")
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
    stacked = uses_scan(model.loop, model.stages)
    arrays = jax.tree.map(jnp.asarray, weights.variables)
    return model, layout.scanned(arrays) if stacked else arrays


def require_head(weights: Weights) -> None:
    """Refuses a backbone where classes are asked for."""
    if "head" not in weights.variables["params"]:
        raise UserError("these weights are a backbone: they have no head that would tell classes")
