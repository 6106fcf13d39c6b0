"""Optimisers, from Optax, and the learning rate's course; SGD is that of He et al. 2015 [H15]."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from resjax.config import Config
from resjax.config import Optimizer as OptimizerConfig
from resjax.models.layout import path_name

# [H15 section 4.2]: ResNet-110 starts at a tenth of the rate, until its training error is
# below 80 %.
WARMUP_DEPTH = 110
WARMUP_ERROR = 0.8
WARMUP_FACTOR = 0.1


def transformation(
    config: OptimizerConfig, factors: Mapping[str, float] | None = None
) -> optax.GradientTransformationExtraArgs:
    """From gradients to what is added to the weights; `update` takes the learning `rate`.

    What is frozen is None in gradients and weights, and nothing is kept of it.

    - sgd: the decay is the gradient of an L2 penalty, so it passes through the momentum. [H15]
      decays every weight, BN's too.
    - lars (You et al. 2017, arXiv 1708.03888), lamb (You et al. 2019, arXiv 1904.00962): every
      kernel's update is scaled by the kernel's norm over the update's.
    - adamw (Loshchilov & Hutter 2017, arXiv 1711.05101): the decay passes the moments by.

    Args:
      config: of the optimiser.
      factors: on the rate of each parameter, by path; 1 where there is none.
    """
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=kernels if config.weight_decay_on == "kernels" else None
    )
    momentum = optax.trace(config.momentum, config.nesterov)
    moments = optax.scale_by_adam(config.momentum, config.beta2, nesterov=config.nesterov)
    rate = scale_by_rate(factors or {})
    steps = {
        "sgd": (decay, momentum, rate),
        "lars": (decay, trust_ratio(LARS_COEFFICIENT), rate, momentum),
        "lamb": (moments, decay, trust_ratio(), rate),
        "adamw": (moments, decay, rate),
    }[config.name]
    return optax.chain(*steps)


def clipped(config: OptimizerConfig, gradients: Any) -> Any:
    """The gradients, of no larger global norm than `clip_norm`; of all that trains together."""
    if not config.clip_norm:
        return gradients
    clip = optax.clip_by_global_norm(config.clip_norm)
    return clip.update(gradients, optax.EmptyState())[0]


LARS_COEFFICIENT = 0.001  # You et al. 2017


def trust_ratio(coefficient: float = 1.0) -> optax.GradientTransformation:
    return optax.masked(optax.scale_by_trust_ratio(trust_coefficient=coefficient), kernels)


def scale_by_rate(factors: Mapping[str, float]) -> optax.GradientTransformationExtraArgs:
    """Against the gradient, by the `rate` that `update` is given and each parameter's factor.

    The rate is none of Optax's schedules, because the warm-up of [H15] depends on the training
    error.
    """

    def update(updates: Any, state: Any, params: Any = None, *, rate: Any, **_: Any) -> Any:
        def scaled(path: Any, update: Array) -> Array:
            factor = factors.get(path_name(path), 1.0)
            return -(rate if factor == 1 else factor * rate) * update

        return jax.tree.map_with_path(scaled, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def kernels(params: Any) -> Any:
    """True for what multiplies, False for biases and for BN's scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def learning_rate(
    config: OptimizerConfig, steps: int
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """The rate at a step, of a run of `steps`: linear warm-up, then the schedule."""
    if config.schedule == "onecycle":
        return optax.cosine_onecycle_schedule(steps, config.learning_rate)
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
