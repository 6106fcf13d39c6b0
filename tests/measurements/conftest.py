"""Networks with random variables, and a run of a few steps."""

import jax
import numpy as np
import pytest

import resjax
from resjax.config import default_config, override, resolve
from resjax.measurements import FinishedRun
from resjax.train.loop import train

IMAGES = np.random.default_rng(1).normal(size=(4, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="session")
def network():
    """Returns a function from fields of the network to the network and random variables."""

    def make(**fields):
        architecture = {"family": "cifar", "depth": 20, "width": 4, "loop": "scan"}
        model = resjax.build(architecture | fields)
        shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
        rng = np.random.default_rng(0)

        def leaf(path, shape):
            if path[-1].key in ("var", "scale"):
                return rng.uniform(0.5, 1.5, shape.shape).astype(np.float32)
            spread = (2 / np.prod(shape.shape[-4:-1])) ** 0.5 if path[-1].key == "kernel" else 0.3
            return rng.normal(0, spread, shape.shape).astype(np.float32)

        return model, jax.tree_util.tree_map_with_path(leaf, shapes)

    return make


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """The folder of a run of two steps, with an EMA."""
    fields = {
        "model.depth": 8,
        "model.width": 4,
        "data.batch_size": 8,
        "optimizer.ema_decay": 0.9,
        "train.steps": 2,
        "train.log_every": 1,
        "train.eval_every": 2,
        "train.evaluate_train": True,
    }
    folder = tmp_path_factory.mktemp("measured") / "run"
    train(resolve(override(default_config(), fields)), folder)
    return folder


@pytest.fixture(scope="session")
def run(run_folder):
    return FinishedRun(run_folder)
