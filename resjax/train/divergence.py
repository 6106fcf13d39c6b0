"""Names the step and the layers in which a run was first not finite."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resjax.diagnostics import Context, per_layer
from resjax.models.count import layers
from resjax.models.layout import first_nonfinite
from resjax.models.resnet import build
from resjax.train.state import TrainState
from resjax.train.trainer import StepRunner, Trainer


def locate_nonfinite(trainer: Trainer, state: TrainState, seed: int) -> str:
    """Diagnoses the next step of a state, and says in words what is not finite in it.

    Args:
      trainer: of the run.
      state: under `train.nonfinite=stop` the one in which the loss was first not finite.
      seed: of the run.
    """
    step = int(trainer.backend.unreplicate(state.step))
    if step == 0 and first_nonfinite(trainer.backend.unreplicate(state).variables):
        return "training has not changed it yet, so look at transfer.weights and at initializers"
    phase = trainer.phase_at(step)
    state = trainer.enter_phase(state, phase)
    with StepRunner(trainer, seed, step) as runner:
        call = trainer.compile_diagnosis(state, phase, _finite).call
        found = jax.device_get(call(state, runner.arrays))
    model = build(trainer.config.model, head=trainer.task.head())
    forward = [layer.path for layer in layers(model, trainer.image_shape)]
    if layer := _first(found["params"], reversed(forward)):
        return f"the gradient of {layer} was the first that was not, in step {step}"
    if np.isfinite(found["loss"]):
        return f"step {step + 1} would be finite in training mode"
    where = [f"first in step {step + 1}"]
    if layer := _first(found["batch_stats"], forward):
        where.append(f"forward from {layer}")
    if layer := _first(found["gradients"], reversed(forward)):
        where.append(f"backward from the gradient of {layer}")
    return ", ".join(where)


def _finite(context: Context) -> dict[str, Any]:
    """Returns whether each array of the context's trees is finite, and the loss."""
    arrays = {
        name: context.per_array(lambda array: jnp.isfinite(array).all(), getattr(context, name))
        for name in ("params", "batch_stats", "gradients")
    }
    return {**arrays, "loss": context.loss}


def _first(finite: Mapping[str, Any], order: Iterable[str]) -> str | None:
    """Returns the first layer, in this order, with an array that is not finite."""
    bad = {path.rpartition("/")[0] for path, value in per_layer(finite).items() if not value}
    return next(iter([*(path for path in order if path in bad), *sorted(bad)]), None)
