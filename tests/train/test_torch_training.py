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
from jax.sharding import NamedSharding, PartitionSpec

from resjax.config import default_config, override, resolve
from resjax.models import layout
from resjax.models.resnet import uses_scan
from resjax.train.trainer import Trainer
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


def in_float64(trainer):
    """The trainer, whose networks now compute in float64."""
    trainer.programs = [
        program._replace(model=program.model.clone(dtype=jnp.float64))
        for program in trainer.programs
    ]
    return trainer


def start(trainer, draw):
    """The state at step 0 in float64, with parameters by formula; compiles nothing."""

    def first(path, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        dtype = jnp.float64 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        return np.full(leaf.shape, layout.path_name(path).endswith("/var"), dtype)

    shapes = jax.eval_shape(trainer._init_state, jax.random.key(0))
    state = jax.tree.map_with_path(first, shapes)
    unrolled = layout.unrolled({"params": state.params})["params"]
    params = jax.tree.map_with_path(
        lambda path, leaf: jnp.asarray(draw(layout.path_name(path), leaf.shape)), unrolled
    )
    if uses_scan(trainer.model.loop, trainer.model.stages):
        params = layout.scanned({"params": params})["params"]
    # Placed as a step returns it, or the second step is compiled anew.
    mesh = jax.tree.leaves(trainer.source.example_arrays())[0].sharding.mesh
    return jax.device_put(state._replace(params=params), NamedSharding(mesh, PartitionSpec()))


@pytest.mark.parametrize("name", TORCH)
def test_ten_steps_are_those_of_pytorch(name, cases, dataset, float64):
    fields = cases.OVERRIDES | {"data.name": dataset} | cases.CASES[name]
    trainer = in_float64(Trainer(resolve(override(default_config(), fields))))
    arrays = trainer.source.example_arrays()[0]

    @partial(jax.jit, compiler_options=quick_compile())
    def take_step(state, drawn, key):
        return trainer.train_step(0, arrays)(state, drawn, key)

    state, losses = start(trainer, cases.weights), []
    for number in range(cases.STEPS):
        state, output = take_step(state, jnp.arange(cases.BATCH)[None], jax.random.key(number))
        losses.append(float(output.gradients.loss))
    np.testing.assert_allclose(losses, TORCH[name]["losses"], rtol=0, atol=1e-10)
    running = sum(float((leaf**2).sum()) for leaf in flatten_dict(state.batch_stats).values())
    assert running == pytest.approx(TORCH[name]["running"], rel=1e-9)
