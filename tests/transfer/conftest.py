"""A small network's weights; files that other libraries wrote, of which files/make.py made some."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resjax
from resjax.data.normalization import Statistics
from resjax.errors import UserError
from resjax.models.presets import architecture
from resjax.transfer.files import read_arrays
from resjax.transfer.weights import Preprocessing, Weights, flatten, unflatten


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

        shapes = {path: array.shape for path, array in flatten(variables).items()}
        return Weights(
            model=model,
            variables=unflatten({path: drawn(shape) for path, shape in shapes.items()}),
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


@pytest.fixture(scope="session")
def foreign() -> Path:
    return Path(__file__).parent / "files"


@pytest.fixture(scope="session")
def same():
    """Holds arrays to those of an .npz file, types and shapes included."""

    def check(arrays, path):
        with np.load(path) as expected:
            assert arrays.keys() == set(expected)
            for name, array in arrays.items():
                assert array.dtype == expected[name].dtype, name
                np.testing.assert_array_equal(array, expected[name], name)
                assert array.shape == expected[name].shape, name

    return check


@pytest.fixture(scope="session")
def refusal():
    """The line by which a file is refused, which names it."""

    def line(path):
        with pytest.raises(UserError) as refused:
            read_arrays(path)
        (line,) = str(refused.value).splitlines()
        assert line.startswith(str(path))
        return line

    return line


@pytest.fixture(scope="session")
def outcome():
    """The line by which a file is refused, or that it holds arrays; anything else is a fault."""

    def lines(path):
        try:
            return ["arrays"] if read_arrays(path).arrays else []
        except UserError as error:
            return str(error).splitlines()

    return lines
