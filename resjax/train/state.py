"""The state of a training run between two steps."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Int, Key


class TrainState(NamedTuple):
    """Everything that changes from step to step.

    Attributes:
      step: number of steps taken.
      params: all parameters of the network, frozen ones among them.
      batch_stats: running statistics of BN layers.
      opt_state: the optimizer's.
      ema: exponential moving average of parameters and running statistics, or None.
      key: the run's PRNG key; every step folds its number in.
      diverged: whether the loss was not finite, under `train.nonfinite=stop`. From then on steps
        change nothing.
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
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}
