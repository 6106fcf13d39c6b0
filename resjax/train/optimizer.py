"""SGD and the learning rate's course, as He et al. 2015 [H15] have them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from resjax.config import Config
from resjax.config import Optimizer as OptimizerConfig

# [H15 section 4.2]: ResNet-110 starts at a tenth of the rate, until its training error is
# below 80 %.
WARMUP_DEPTH = 110
WARMUP_ERROR = 0.8
WARMUP_FACTOR = 0.1


def direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """What the step goes along, the learning rate left out: decayed gradient through momentum.

    The decay is the gradient of an L2 penalty, so it passes through the momentum. [H15] decays
    every weight, BN's too.
    """
    return optax.chain(
        optax.add_decayed_weights(
            config.weight_decay, mask=kernels if config.weight_decay_on == "kernels" else None
        ),
        optax.trace(config.momentum, config.nesterov),
    )


def kernels(params: Any) -> Any:
    """True for what multiplies, False for biases and for BN's scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def learning_rate(
    config: OptimizerConfig, steps: int
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """The rate at a step, of a run of `steps`: linear warm-up, then the schedule."""
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(
            config.learning_rate, max(steps - config.warmup_steps, 1)
        )
    else:
        boundaries = () if config.schedule == "constant" else config.boundaries
        rates = [config.learning_rate * config.decay_factor**k for k in range(len(boundaries) + 1)]
        schedule = optax.join_schedules(
            [optax.constant_schedule(rate) for rate in rates],
            [round(share * steps) - config.warmup_steps for share in boundaries],
        )
    if not config.warmup_steps:
        return schedule
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, schedule], [config.warmup_steps])


def needs_warmup(config: Config) -> bool:
    """Whether training starts at a tenth of the rate, until it has begun to learn [H15]."""
    depth = config.model.depth
    return config.optimizer.schedule == "he2015" and depth is not None and depth >= WARMUP_DEPTH


def warmed_up(warm: Bool[Array, ""], error: Float[Array, ""]) -> Bool[Array, ""]:
    """Once the training error was below 80 %, the warm-up is over for good."""
    return warm | (error < WARMUP_ERROR)


def warmup_factor(warm: Bool[Array, ""]) -> Float[Array, ""]:
    return jnp.where(warm, 1.0, WARMUP_FACTOR)
