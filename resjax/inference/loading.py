"""Loads pretrained networks, from a weights folder, a run, or a file of foreign weights."""

from collections.abc import Sequence
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
from resjax.user_code import trust


def load_pretrained(
    path: str | Path,
    *,
    which: str = "last",
    classes: int | None = None,
    channels: int | None = None,
    backbone: bool = False,
    code: Sequence[str] = (),
    warn: Warn = print_warning,
    **overrides: Any,
) -> tuple[ResNet, Variables]:
    """Loads a pretrained network.

    Args:
      path: a weights folder, a run folder, or what `resjax import` takes.
      which: checkpoint of a run: `last`, `best`, or the number of a step.
      classes: number of classes; if it differs from that of the weights, the head is random.
      channels: of the images; if it differs, the first convolution is adapted.
      backbone: whether to leave out the head, which `method="features"` does not need.
      code: modules of your own that the weights may name, such as ["my_blocks"]; others are not
        imported.
      warn: called with a report of which arrays were copied, if `overrides` change the network.
      **overrides: fields of `resjax.build`, such as `loop="scan"` or `dtype="bfloat16"`. If they
        change depth or blocks, arrays with the same path and shape are copied, the others random.

    Returns:
      The module, and its variables on the device, in the layout of the module's loop.

    Raises:
      UserError: there are no such weights, they are damaged, or `classes` is set for a backbone.
      ValueError: `resjax.build` does not accept an override.
    """
    if backbone and classes is not None:
        raise UserError(f"classes={classes} and backbone=True: a backbone has no classes")
    trust(code)
    weights = load_weights(path, which, warn)
    if architecture := {name: overrides.pop(name) for name in ARCHITECTURE if name in overrides}:
        weights, merged = surgery.for_network(weights, **architecture)
        warn(f"{path}: {merged.report()}")
    if backbone:
        weights = surgery.backbone(weights)
    if classes not in (None, weights.model["classes"]):
        weights = surgery.new_head(weights, classes)
    if channels not in (None, weights.preprocessing.channels):
        weights = surgery.with_channels(weights, channels)
    return on_device(weights, **overrides)


def on_device(weights: Weights, **overrides: Any) -> tuple[ResNet, Variables]:
    """Returns a network and its variables on the device, in the layout of its loop."""
    model = weights.network(**overrides)
    stacked = uses_scan(model.loop, model.stages)
    arrays = jax.tree.map(jnp.asarray, weights.variables)
    return model, layout.scanned(arrays) if stacked else arrays


def require_head(weights: Weights) -> None:
    """Raises UserError if the weights are a backbone."""
    if "head" not in weights.variables["params"]:
        raise UserError("these weights are a backbone: they have no head and predict no classes")
