"""Variables without compiling an initializer."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def draw():
    """Returns `draw(model, images)`: variables without special values such as 1."""

    def variables(model, images, seed=0):
        rng = np.random.default_rng(seed)

        def leaf(path, shape):
            kind = path[-1].key
            if kind == "var":
                return rng.uniform(0.5, 1.5, shape.shape).astype(np.float32)
            spread = (2 / np.prod(shape.shape[:-1])) ** 0.5 if kind == "kernel" else 0.3
            start = 1.0 if kind == "scale" else 0.0
            return rng.normal(start, spread, shape.shape).astype(np.float32)

        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        return jax.tree_util.tree_map_with_path(leaf, shapes)

    return variables
