"""A trainer in float64 whose parameters follow a formula, for comparisons with PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from resjax.config import default_config, override, resolve
from resjax.models import layout
from resjax.models.resnet import uses_scan
from resjax.train.trainer import Trainer


def make_trainer(fields, draw):
    """Returns a trainer in float64 and its state at step 0; compiles nothing.

    Args:
      fields: overrides of the default config.
      draw: returns the parameter at a path of the unrolled network, from the path and the shape.
    """
    trainer = Trainer(resolve(override(default_config(), fields)))
    trainer.programs = [
        program._replace(model=program.model.clone(dtype=jnp.float64))
        for program in trainer.programs
    ]
    return trainer, _start(trainer, draw)


def _start(trainer, draw):
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
    # The state is placed as a step returns it, so that the second step needs no compilation.
    mesh = jax.tree.leaves(trainer.source.example_arrays())[0].sharding.mesh
    return jax.device_put(state._replace(params=params), NamedSharding(mesh, PartitionSpec()))
