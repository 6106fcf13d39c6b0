"""Names the step and the layers in which a run's loss was first not finite."""

from typing import Any

import jax
import numpy as np

from resjax.diagnostics import Context
from resjax.models.count import layers
from resjax.models.layout import unrolled
from resjax.models.resnet import build
from resjax.train.freezing import merge
from resjax.train.state import TrainState
from resjax.train.trainer import StepRunner, Trainer


def locate_nonfinite(trainer: Trainer, state: TrainState, seed: int) -> str:
    """Diagnoses the next step of a state, and says in words what is not finite in it.

    Args:
      trainer: of the run.
      state: under `train.nonfinite=stop` the one in which the loss was first not finite.
      seed: of the run.
    """
    saved = trainer.backend.unreplicate(state)
    step = int(saved.step)
    if parameter := _first(trainer, {"params": jax.device_get(saved.params)}, backwards=True):
        return f"the gradient of {parameter} was the first that was not, in step {step}"
    phase = trainer.phase_at(step)
    state = trainer.enter_phase(state, phase)
    with StepRunner(trainer, seed, step) as runner:
        call = trainer.compile_diagnosis(state, phase, _gradients_and_statistics).call
        gradients, batch_stats = jax.device_get(call(state, runner.arrays))
    where = [f"first in step {step + 1}"]
    if output := _first(trainer, {"batch_stats": batch_stats}):
        where.append(f"forward from {output}")
    # A frozen parameter has no gradient; here it counts as one that is finite.
    gradients = merge(gradients, jax.tree.map(np.zeros_like, jax.device_get(saved.params)))
    if gradient := _first(trainer, {"params": gradients}, backwards=True):
        where.append(f"backward from the gradient of {gradient}")
    return ", ".join(where)


def _gradients_and_statistics(context: Context) -> tuple[Any, Any]:
    return context.gradients, context.batch_stats


def _first(trainer: Trainer, variables: Any, backwards: bool = False) -> str | None:
    """Returns the first layer that is not finite, in forward or backward order, or None."""
    (collection,) = unrolled(variables).values()
    bad = {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        for path, leaf in jax.tree.leaves_with_path(collection)
        if not np.isfinite(leaf).all()
    }
    model = build(trainer.config.model, head=trainer.task.head())
    order = [layer.path for layer in layers(model, trainer.image_shape)]
    ordered = [path for path in (reversed(order) if backwards else order) if path in bad]
    return next(iter([*ordered, *sorted(bad)]), None)
