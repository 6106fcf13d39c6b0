"""Weights of segmentation networks and detectors in torchvision's format."""

import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from resjax.data.normalization import Statistics
from resjax.errors import UserError
from resjax.models.presets import architecture
from resjax.transfer.exporting import export_torchvision
from resjax.transfer.importing import Options, import_weights
from resjax.transfer.weights import Preprocessing, Weights, flatten, network_shapes, unflatten

TASKS = {
    "fcn": {"name": "segmentation", "options": {"decoder": "fcn", "auxiliary_weight": 0.4}},
    "retinanet": {"name": "detection", "options": {"channels": 8, "stages": 3}},
}


def make(task, **fields):
    """Returns random weights of a small network with the head of a task."""
    network = {"family": "imagenet", "depth": 14, "block": "bottleneck", "width": 8, **fields}
    model = {**architecture(**network), "classes": 3}
    generator = np.random.default_rng(0)
    arrays = {
        path: generator.uniform(0.1, 1, shape).astype(np.float32)
        for path, shape in network_shapes(model, 3, task).items()
    }
    statistics = Statistics(np.zeros(3, np.float32), np.ones(3, np.float32))
    names = "nothing", "cat", "dog"
    return Weights(model, unflatten(arrays), statistics, Preprocessing(64, 64), names, {}, task)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, flatten(found), flatten(expected))


@pytest.mark.parametrize("name", TASKS)
def test_an_export_is_imported_as_a_whole_or_without_its_head(tmp_path, name):
    made = make(TASKS[name])
    path = tmp_path / "net.safetensors"
    export_torchvision(made, path)
    whole = import_weights(str(path))
    assert (whole.task, whole.model) == (made.task, made.model)
    assert_equal(whole.variables, made.variables)
    headless = import_weights(str(path), Options(without_head=True))
    assert headless.model == {**made.model, "classes": 0}
    assert_equal(
        headless.variables,
        {
            collection: {module: arrays for module, arrays in each.items() if module != "head"}
            for collection, each in made.variables.items()
        },
    )


def older_name(name):
    """Returns the name of an array of RetinaNet in version 1 of torchvision's modules."""
    name = re.sub(r"(inner|layer)_blocks\.(\d)\.0\.", r"\1_blocks.\2.", name)
    return re.sub(r"(_head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", name)


def test_names_of_older_retinanets_are_known(tmp_path):
    made = make(TASKS["retinanet"])
    new, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    export_torchvision(made, new)
    arrays = {older_name(name): array for name, array in load_file(new).items()}
    assert "head.regression_head.conv.6.bias" in arrays
    assert "backbone.fpn.inner_blocks.2.weight" in arrays
    save_file({n: a for n, a in arrays.items() if "num_batches" not in n}, old)
    assert_equal(import_weights(str(old)).variables, made.variables)


def test_an_incomplete_retinanet_is_refused_in_one_line(tmp_path):
    path = tmp_path / "net.safetensors"
    export_torchvision(make(TASKS["retinanet"]), path)
    save_file({n: a for n, a in load_file(path).items() if "extra_blocks" not in n}, path)
    with pytest.raises(UserError, match=r"has no head/fpn/coarse1/kernel") as refused:
        import_weights(str(path))
    assert "\n" not in str(refused.value)


def test_a_unet_is_not_exported(tmp_path):
    unet = {"name": "segmentation", "options": {"decoder": "unet"}}
    with pytest.raises(UserError, match="its head is none of FCN, DeepLabV3 and RetinaNet"):
        export_torchvision(make(unet), tmp_path / "net.safetensors")
