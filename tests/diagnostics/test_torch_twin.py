"""Diagnostics agree with hooks of PyTorch in the same network, and with finite differences.

The expected numbers are written by `torch_twin.py`, which defines networks and measures anew.
"""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from resjax.diagnostics import DIAGNOSTICS, per_layer
from resjax.models import layout
from resjax.train.trainer import Dispatch

TORCH = json.loads(Path(__file__).with_name("torch_twin.json").read_text())["cases"]


@pytest.fixture(scope="module")
def cases():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        yield importlib.import_module("twin_cases")


@pytest.fixture(scope="module")
def dataset(cases, tmp_path_factory):
    images, labels = cases.data()
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return f"npz:{path}"


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def make_trainer(cases, dataset, float64_trainer):
    """Returns a function from overrides to a trainer in float64 and its state at step 0."""

    def make(fields):
        overrides = {**cases.OVERRIDES, "data.name": dataset, **fields}
        return float64_trainer.make_trainer(overrides, cases.weights)

    return make


def diagnose(trainer, state, steps=0):
    """Returns what the diagnostics measure after some steps, by name and layer."""
    arrays, _ = trainer.source.example_arrays()
    for _ in range(steps):
        state, _ = trainer.compile_dispatch(state, Dispatch(0, 1)).call(state, arrays)
    found = trainer.compile_diagnosis(state, 0).call(state, arrays)
    return {name: per_layer(values) for name, values in jax.device_get(found).items()}


def test_pytorch_has_measured_every_case_and_every_diagnostic(cases):
    assert TORCH.keys() == cases.CASES.keys()
    for measured in TORCH.values():
        assert measured.keys() == DIAGNOSTICS.keys()
        assert len(set(measured["dead_relu_share"].values())) > 1


def runs():
    """Yields each case, scanned and unrolled; all but one of each layout are slow."""
    for name in TORCH:
        for loop in ("scan", "unroll"):
            quick = (name, loop) in (("plain", "scan"), ("preactivation", "unroll"))
            yield pytest.param(name, loop, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "loop"), list(runs()))
def test_diagnostics_are_those_of_hooks_in_pytorch(cases, make_trainer, name, loop):
    fields, steps = cases.CASES[name]
    found = diagnose(*make_trainer({**fields, "model.loop": loop}), steps)
    assert found.keys() == TORCH[name].keys()
    for diagnostic, expected in TORCH[name].items():
        assert found[diagnostic].keys() == expected.keys(), diagnostic
        for layer, value in expected.items():
            measured = found[diagnostic][layer]
            assert measured == pytest.approx(value, rel=1e-4, abs=1e-6), (diagnostic, layer)


def test_norms_of_gradients_are_the_slopes_of_the_loss_along_them(cases, make_trainer):
    trainer, state = make_trainer({"model.loop": "unroll"})
    found = diagnose(trainer, state)
    images, labels = cases.data()
    images = images / 255 - images.mean(0) / 255
    model = trainer.programs[0].model

    def loss(shifts, params):
        def shift(call, arguments, keywords, context):
            output = call(*arguments, **keywords)
            path = "/".join(context.module.path)
            return output + shifts.get(path, 0) if context.method_name == "__call__" else output

        with nn.intercept_methods(shift):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    channels = {"1": 4, "2": 8, "3": 16}  # by stage, whose images have 64 / channels pixels a side
    shifts = {
        path: jnp.zeros((cases.BATCH, *[64 // channels[path[5]]] * 2, channels[path[5]]))
        for path in found["activation_gradient_norm"]
    }
    at = shifts, state.params
    gradients = jax.jit(jax.grad(loss, (0, 1)))(*at)
    loss, step = jax.jit(loss), 1e-6

    def slope(chosen):
        """Returns the slope of the loss along the gradient of the arrays at the chosen paths."""
        directions = jax.tree.map_with_path(
            lambda path, gradient: gradient * chosen(layout.path_name(path)), gradients
        )
        size = optax.tree.norm(directions)
        there, back = (
            loss(*jax.tree.map(lambda x, d, h=h: x + h * d / size, at, directions))
            for h in (step, -step)
        )
        return (there - back) / (2 * step)

    for path, norm in found["activation_gradient_norm"].items():
        assert slope(lambda name, path=path: name == f"0/{path}") == pytest.approx(norm, rel=1e-4)
    for path, norm in list(found["gradient_norm"].items())[::5]:
        assert slope(lambda name, path=path: name == f"1/{path}") == pytest.approx(norm, rel=1e-4)
