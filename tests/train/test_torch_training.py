"""The train step, as the trainer composes it, takes PyTorch's steps in float64.

The frozen numbers are those of `torch_training.py`, which writes the networks anew for PyTorch.
"""

import importlib
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from resjax.xla.compile_options import quick_compile

TORCH = json.loads(Path(__file__).with_name("torch_training.json").read_text())["cases"]


@pytest.fixture(scope="module")
def cases():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        yield importlib.import_module("training_cases")


@pytest.fixture(scope="module")
def dataset(cases, tmp_path_factory):
    images, labels = cases.data()
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return f"npz:{path}"


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def test_there_are_numbers_of_pytorch_for_every_case(cases):
    assert TORCH.keys() == cases.CASES.keys()
    assert len(TORCH) >= 12


@pytest.mark.parametrize("name", TORCH)
def test_ten_steps_are_those_of_pytorch(name, cases, dataset, float64, float64_trainer):
    fields = cases.OVERRIDES | {"data.name": dataset} | cases.CASES[name]
    trainer, state = float64_trainer.make_trainer(fields, cases.weights)
    arrays = trainer.source.example_arrays()[0]

    @partial(jax.jit, compiler_options=quick_compile())
    def take_step(state, drawn, key):
        return trainer.train_step(0, arrays)(state, drawn, key)

    losses = []
    for number in range(cases.STEPS):
        state, output = take_step(state, jnp.arange(cases.BATCH)[None], jax.random.key(number))
        losses.append(float(output.gradients.loss))
    np.testing.assert_allclose(losses, TORCH[name]["losses"], rtol=0, atol=1e-10)
    running = sum(float((leaf**2).sum()) for leaf in flatten_dict(state.batch_stats).values())
    assert running == pytest.approx(TORCH[name]["running"], rel=1e-9)
