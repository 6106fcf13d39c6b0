"""A small network's weights, and files of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resjax
from resjax.data.feed import Statistics
from resjax.models.presets import architecture
from resjax.transfer.weights import Preprocessing, Weights, flat, nested


@pytest.fixture(scope="session")
def make_weights():
    """A function from fields of `resjax.build` to weights that are random everywhere."""

    def make(channels=3, **fields):
        model = {"family": "imagenet", "depth": 10, "block": "basic", "width": 8, **fields}
        classes = model.pop("classes", 5)
        model = {**architecture(**model), "classes": classes}
        network = resjax.build(model, loop="unroll")
        image = jnp.zeros((1, 32, 32, channels))
        variables = jax.eval_shape(network.init, jax.random.key(0), image)
        generator = np.random.default_rng(0)

        def drawn(shape):
            if len(shape) > 1:
                return generator.normal(0, 0.2, shape).astype(np.float32)
            return generator.uniform(0.1, 1.0, shape).astype(np.float32)

        shapes = flat(variables, leaf=lambda array: array.shape)
        return Weights(
            model=model,
            variables=nested({path: drawn(shape) for path, shape in shapes.items()}),
            statistics=Statistics(
                np.linspace(0.4, 0.5, channels, dtype=np.float32),
                np.linspace(0.2, 0.3, channels, dtype=np.float32),
            ),
            preprocessing=Preprocessing(32, 36, channels),
            class_names=tuple(f"class {index}" for index in range(classes)),
        )

    return make


@pytest.fixture(scope="session")
def weights(make_weights):
    return make_weights()
