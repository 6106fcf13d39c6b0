"""Exports weights with torchvision's names; re-imported, they are the same bit for bit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from resjax.disk import write_atomically
from resjax.errors import UserError
from resjax.transfer.naming import exports, to_torchvision
from resjax.transfer.weights import CLASSIFICATION, Weights, describe, flatten


def export_torchvision(weights: Weights, path: Path) -> None:
    """Writes a safetensors file with the names and shapes of torchvision, or timm.

    `model.load_state_dict(safetensors.torch.load_file(path))` reads it. The file's metadata hold
    what a state dict lacks, for the import: architecture, preprocessing and class names.

    Raises:
      UserError: torchvision has no such network.
      OSError: the file cannot be written.
    """
    from safetensors.numpy import save

    model = weights.model
    task = None if weights.task == CLASSIFICATION else weights.task
    if reason := _find_obstacle(model, task):
        raise UserError(f"torchvision has no such network: {reason}")
    deep, averages = model.get("stem") == "deep", model.get("shortcut") == "project_avg"
    arrays = {
        name: np.asarray(array, order="C")
        for ours, value in flatten(weights.variables).items()
        for name, array in to_torchvision(ours, value, deep=deep, averages=averages, task=task)
    }
    metadata = {"format": "pt", "resjax": json.dumps(describe(weights))}
    write_atomically(path, save(arrays, metadata=metadata))


def _find_obstacle(model: Mapping[str, Any], task: Mapping[str, Any] | None) -> str | None:
    if task and not exports(task):
        return "its head is none of FCN, DeepLabV3 and RetinaNet"
    block = model.get("block")
    if block not in ("basic", "bottleneck"):
        return f"its blocks are {block}"
    if model.get("block_options", {}).get("stride_in_1x1"):
        return "its bottlenecks stride in their first 1x1, torchvision's in the 3x3"
    if model.get("norm", "batch") != "batch" or model.get("standardize"):
        return "it has no batch norms, or standardized filters"
    if model.get("branch_scale", 1.0) != 1:
        return "its branches are scaled"
    if model.get("shortcut") not in ("project", "project_avg", "project_all", "pad", "none"):
        return f"its shortcuts are {model.get('shortcut')}"
    return None
