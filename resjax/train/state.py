"""The state of a training run between two steps, and the keys that it yields."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Int, Key


class TrainState(NamedTuple):
    """Everything that changes from step to step.

    Attributes:
      step: number of steps done.
      params: all parameters of the network, including frozen ones.
      batch_stats: running statistics of BN layers.
      opt_state: state of the optimizer.
      ema: exponential moving average of parameters and running statistics, or None.
      key: PRNG key of the run, which stays the same.
      diverged: under `train.nonfinite=stop`, whether a loss was not finite; steps then change
        nothing.
    """

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    key: Key[Array, ""]
    diverged: Bool[Array, ""]

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the model, for `model.apply`."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def run_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """Returns the key in a run's state, from the key of its seed."""
    return jax.random.fold_in(key, 1)


def order_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """Returns the key of the order of the examples, from the key in a run's state."""
    return jax.random.split(key)[0]


def step_key(key: Key[Array, ""], step: Int[Array, ""]) -> Key[Array, ""]:
    """Returns the key of a step, from the key in a run's state."""
    return jax.random.fold_in(jax.random.split(key)[1], step)
