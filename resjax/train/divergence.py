"""Where a run diverged: the layers whose outputs and gradients were first not finite."""

from contextlib import closing
from typing import Any

import jax
import numpy as np

from resjax.models.count import layers
from resjax.models.layout import unrolled
from resjax.models.resnet import build
from resjax.train.sources import Streamed
from resjax.train.step import Program, State


def origin(program: Program, state: State, seed: int) -> str:
    """Takes the next step of a state once more, and says in words what of it is not finite.

    Args:
      program: of the run.
      state: under `train.nonfinite=stop` that in which the loss was first not finite.
      seed: of the run.
    """
    one = program.backend.one(state)
    step = int(one.step)
    if weight := _first(program, {"params": jax.device_get(one.params)}, backwards=True):
        return f"the gradient of {weight} was the first that was not, in step {step}"
    split = program.train_split
    if isinstance(program.source, Streamed):
        with closing(program.source.training(seed, step)) as batches:
            split = next(batches)
    state = program.thawed(state, program.phase_at(step))
    _, found = program.backend.compile_steps(program.probe, 1)(state, split)
    found = jax.device_get(found)
    where = [f"first in step {step + 1}"]
    if output := _first(program, {"batch_stats": found["batch_stats"]}):
        where.append(f"forward from {output}")
    if gradient := _first(program, {"params": found["params"]}, backwards=True):
        where.append(f"backward from the gradient of {gradient}")
    return ", ".join(where)


def _first(program: Program, variables: Any, backwards: bool = False) -> str | None:
    """The first layer, in the order of the network or against it, that is not finite."""
    (collection,) = unrolled(variables).values()
    bad = {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        for path, leaf in jax.tree.leaves_with_path(collection)
        if not np.isfinite(leaf).all()
    }
    model = build(program.config.model, classes=program.classes)
    order = [layer.path for layer in layers(model, program.image_shape)]
    ordered = [path for path in (reversed(order) if backwards else order) if path in bad]
    return next(iter([*ordered, *sorted(bad)]), None)
