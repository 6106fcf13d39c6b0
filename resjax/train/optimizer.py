"""Optimizers and learning-rate schedules, from Optax; SGD is that of He et al. 2015 [H15]."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from resjax.config import SCHEDULES, Config
from resjax.config import Optimizer as OptimizerConfig
from resjax.errors import UserError, one_line
from resjax.models import layout
from resjax.models.layout import path_name
from resjax.models.presets import nearest
from resjax.train.freezing import Phase, merge, split
from resjax.user_code import import_name

# [H15 section 4.2]: ResNet-110 starts at a tenth of the rate, until its training error is
# below 80 %.
WARMUP_DEPTH = 110
WARMUP_ERROR = 0.8
WARMUP_FACTOR = 0.1
WARMUP_ERROR_DECAY = 0.98  # of the moving average of the training error: some fifty batches

LARS_COEFFICIENT = 0.001  # You et al. 2017
LAMB_EPSILON = 1e-6  # You et al. 2019

OURS = ("sgd", "lars", "lamb", "adamw")

# Optimizers of Optax that update each number by itself, whatever the layout of the arrays.
ELEMENTWISE = (
    *("adabelief", "adagrad", "adam", "adamax", "lion", "nadam", "nadamw", "radam", "rmsprop"),
)

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def make_optimizer(
    config: Config, phases: Sequence[Phase], factors: Mapping[str, float]
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a config for its first `len(phases)` phases.

    `update` takes the number of the step as `step`, and loss and primary metric of the batch as
    `value` and `metric`.
    Frozen parameters are None in gradients and parameters, and have no optimizer state. Clipping
    comes first and sees all gradients together.

    Args:
      config: its `optimizer` section, and the steps of the run.
      phases: in each of which some parameters start to train.
      factors: of the learning rate of each parameter, by path; 1 where there is none.

    Raises:
      UserError: there is no such optimizer or schedule, or it does not take the options.
    """
    optimizer = config.optimizer
    clip = [optax.clip_by_global_norm(optimizer.clip_norm)] if optimizer.clip_norm else []
    scheduled = with_schedule(
        by_phase(base_optimizer(optimizer, factors), phases),
        learning_rate(optimizer, config.train.steps),
        warmup=needs_warmup(config),
    )
    return optax.chain(*clip, scheduled)


class ScheduledState(NamedTuple):
    """State of `with_schedule`: the rate of the last step, and the warm-up of [H15], if any."""

    inner: Any
    learning_rate: Float[Array, ""]
    warmup: "WarmupState | None"


class WarmupState(NamedTuple):
    """The bias-corrected moving average of the training error; whether the warm-up is over."""

    error: Float[Array, ""]
    done: Bool[Array, ""]


def with_schedule(
    inner: optax.GradientTransformationExtraArgs, schedule: Schedule, *, warmup: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Passes the learning rate of the step to `inner` as `rate`.

    The steps are the run's, not those since a parameter began to train, and the warm-up of [H15]
    depends on the training error; Optax's own schedules know neither.

    Args:
      inner: takes `rate`.
      schedule: learning rate by step.
      warmup: train at a tenth of the rate, until the training error was below 80 % once.
    """

    def init(params: Any) -> ScheduledState:
        state = WarmupState(jnp.ones(()), jnp.asarray(False)) if warmup else None
        return ScheduledState(inner.init(params), jnp.zeros(()), state)

    def update(
        updates: Any, state: ScheduledState, params: Any = None, *, step: Any, **extra: Any
    ) -> tuple[Any, ScheduledState]:
        rate = jnp.asarray(schedule(step), float)
        warm = state.warmup
        if warm is not None:
            rate = rate * jnp.where(warm.done, 1.0, WARMUP_FACTOR)
            # Corrected for its start, as in Adam, so that it is a mean of the errors so far.
            weight = (1 - WARMUP_ERROR_DECAY) / (1 - WARMUP_ERROR_DECAY ** (step + 1.0))
            error = warm.error + weight * (extra["metric"] - warm.error)
            warm = WarmupState(error, warm.done | (error < WARMUP_ERROR))
        updates, changed = inner.update(updates, state.inner, params, rate=rate, **extra)
        return updates, ScheduledState(changed, rate, warm)

    return optax.GradientTransformationExtraArgs(init, update)


def by_phase(
    inner: optax.GradientTransformationExtraArgs, phases: Sequence[Phase]
) -> optax.GradientTransformationExtraArgs:
    """Gives the parameters of each phase an optimizer state of their own.

    The state has one entry for each phase that has begun, so that a new phase leaves the state of
    the parameters that train already as it is.
    """

    def own(tree: Any, phase: Phase) -> Any:
        return split(tree, phase.thaws.__contains__)[0]

    def init(params: Any) -> tuple[Any, ...]:
        return tuple(inner.init(own(params, phase)) for phase in phases)

    def update(updates: Any, state: tuple[Any, ...], params: Any = None, **extra: Any) -> Any:
        results = [
            inner.update(own(updates, phase), before, own(params, phase), **extra)
            for phase, before in zip(phases, state, strict=True)
        ]
        moved, states = zip(*results, strict=True)
        return merge(*moved), states

    return optax.GradientTransformationExtraArgs(init, update)


def base_optimizer(
    config: OptimizerConfig, factors: Mapping[str, float]
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer whose `update` takes the learning rate of the step as `rate`.

    - sgd: weight decay is the gradient of an L2 penalty, so it passes through the momentum. [H15]
      decays every parameter, those of BN too.
    - lars (You et al. 2017, arXiv 1708.03888): the update of every kernel w with gradient g is
      scaled by 0.001 |w| / (|g| + weight_decay |w|). Biases and scales train as in sgd.
    - lamb (You et al. 2019, arXiv 1904.00962): the update u of every kernel, weight decay included,
      is scaled by |w| / |u|. With nesterov, it is the paper's N-LAMB at constant momentum.
    - adamw (Loshchilov & Hutter 2017, arXiv 1711.05101): weight decay bypasses the moments. With
      nesterov, it is NAdamW as in timm and in MLCommons' baselines. PyTorch's NAdam also raises the
      momentum step by step.
    - any other: the function of that name in Optax, called as `function(learning_rate, **options)`,
      with `weight_decay` and, for weight_decay_on=kernels, a `mask`, if it has such parameters. A
      function of the user's also receives `momentum` and `nesterov`, if it has them.
    """
    if config.name not in OURS:
        factory = _factory(config)
        if config.name in ELEMENTWISE:
            return _from_factory(factory, factors)
        return unroll(_from_factory(factory, {}), factors)
    if config.options:
        raise UserError(
            f"optimizer.options: {config.name} has none; set the fields of the optimizer section"
        )
    decays_all = config.weight_decay_on == "all"
    decay = optax.add_decayed_weights(config.weight_decay, mask=None if decays_all else kernels)
    momentum = optax.trace(config.momentum, config.nesterov)
    betas = config.momentum, config.beta2
    moments = scale_by_nadam(*betas) if config.nesterov else optax.scale_by_adam(*betas)
    lamb_moments = optax.scale_by_adam(*betas, LAMB_EPSILON, nesterov=config.nesterov)
    # The trust ratio of LARS adds the decay of kernels.
    others = optax.add_decayed_weights(config.weight_decay if decays_all else 0.0, mask=not_kernels)
    rate = scale_by_rate(factors)
    steps = {
        "sgd": (decay, momentum, rate),
        "lars": (trust_ratio(LARS_COEFFICIENT, config.weight_decay), others, rate, momentum),
        "lamb": (lamb_moments, decay, trust_ratio(), rate),
        "adamw": (moments, decay, rate),
    }[config.name]
    return optax.chain(*steps)


Factory = Callable[[Any], optax.GradientTransformation]


def _factory(config: OptimizerConfig) -> Factory:
    """Returns a function from a learning rate to an optimizer.

    Raises:
      UserError: there is no such function, or it does not take the config's options.
    """
    function = None
    if ":" in config.name:
        try:
            function = import_name(config.name)
        except ImportError as error:
            raise UserError(f"optimizer.name={config.name}: {error}") from error
        if not callable(function):
            raise UserError(f"optimizer.name={config.name}: is not a function")
    elif _is_optimizer(getattr(optax, config.name, None)):
        function = getattr(optax, config.name)
    if function is None:
        known = [*OURS, *(name for name in vars(optax) if _is_optimizer(getattr(optax, name)))]
        raise UserError(
            f"optimizer.name={config.name}: Optax has no such optimizer"
            f"{nearest(config.name, sorted({*known}))} (or package.module:function of your own)"
        )
    parameters = inspect.signature(function).parameters
    # Optax's optimizers have momenta of their own, which our default should not replace.
    passed = ("weight_decay", "momentum", "nesterov") if ":" in config.name else ("weight_decay",)
    bound = function.keywords if isinstance(function, functools.partial) else {}  # as in nadam
    fields: dict[str, Any] = {
        name: getattr(config, name) for name in passed if name in parameters and name not in bound
    }
    if config.weight_decay and "weight_decay" not in {*parameters, *config.options}:
        raise UserError(
            f"optimizer.weight_decay={config.weight_decay:g}: {config.name} has no weight decay; "
            "set optimizer.weight_decay=0"
        )
    if config.weight_decay_on == "kernels" and "mask" in parameters:
        fields["mask"] = kernels
    factory = functools.partial(function, **(fields | dict(config.options)))
    try:
        tx = optax.with_extra_args_support(factory(config.learning_rate))
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.options: {config.name}: {error}") from error
    if ":" not in config.name:
        params = {"kernel": jnp.zeros((2, 2))}
        try:  # lbfgs, for one, evaluates the loss again
            jax.eval_shape(lambda: tx.update(params, tx.init(params), params, value=0.0))
        except TypeError as error:
            raise UserError(
                f"optimizer.name={config.name}: needs more than gradients: {error}"
            ) from error
    return factory


def _is_optimizer(function: Any) -> bool:
    """Returns whether a function of Optax makes an optimizer: its first parameter is the rate."""
    if not (inspect.isfunction(function) or isinstance(function, functools.partial)):
        return False
    return next(iter(inspect.signature(function).parameters), None) == "learning_rate"


def _from_factory(
    factory: Factory, factors: Mapping[str, float]
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that calls the factory in each step with the rate of that step."""

    def update(
        updates: Any, state: Any, params: Any = None, *, rate: Any, **extra: Any
    ) -> tuple[Any, Any]:
        if optax.tree.get_all_with_path(state, "learning_rate"):  # as of optax.inject_hyperparams
            state = optax.tree.set(state, learning_rate=rate)
        transformation = optax.with_extra_args_support(factory(rate))
        updates, state = transformation.update(updates, state, params, **extra)

        def scaled(path: Any, update: Array) -> Array:
            return factors.get(path_name(path), 1.0) * update

        return jax.tree.map_with_path(scaled, updates), state

    return optax.GradientTransformationExtraArgs(factory(0.0).init, update)


def unroll(
    inner: optax.GradientTransformationExtraArgs, factors: Mapping[str, float]
) -> optax.GradientTransformationExtraArgs:
    """Shows `inner` the unrolled network, so that both layouts train alike.

    An optimizer with norms or axes of arrays, such as adafactor, would otherwise take those of all
    blocks in a scanned array together.
    """

    def unrolled(tree: Any) -> Any:
        return layout.unrolled({"params": tree})["params"]

    def init(params: Any) -> Any:
        return inner.init(unrolled(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        moved, state = inner.update(unrolled(updates), state, unrolled(params), **extra)
        by_path = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(moved)}
        paths = layout.unrolled_paths(updates)

        def restacked(path: Any, leaf: Array) -> Array:
            name = path_name(path)
            blocks = [by_path[each] for each in paths[name]]
            return factors.get(name, 1.0) * jnp.stack(blocks).reshape(leaf.shape)

        return jax.tree.map_with_path(restacked, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def trust_ratio(coefficient: float = 1.0, decay: float = 0.0) -> optax.GradientTransformation:
    """Maps the update u of every kernel w to `ratio` (u + decay w).

    The ratio is coefficient |w| / (|u| + decay |w|), and 1 where this is 0 or undefined. In a
    scanned network, every block of a stacked array has its own.
    """

    def scaled(path: Any, update: Array, kernel: Array) -> Array:
        first = 1 if "/blocks/" in path_name(path) else 0

        def norm(array: Array) -> Array:
            return jnp.sqrt((array**2).sum(tuple(range(first, array.ndim)), keepdims=True))

        size = norm(kernel)
        ratio = coefficient * size / (norm(update) + decay * size)
        return jnp.where(jnp.isfinite(ratio) & (ratio > 0), ratio, 1.0) * (update + decay * kernel)

    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map_with_path(scaled, updates, params)

    return optax.masked(optax.stateless(update), kernels)


def scale_by_nadam(beta1: float, beta2: float) -> optax.GradientTransformation:
    """Rescales updates by Adam with Nesterov momentum, as timm's NAdamW does.

    The formula is that of Choi et al. 2019, arXiv 1910.05446, table 1. Optax's `nesterov` uses the
    bias correction of Dozat 2016 instead.
    """
    adam = optax.scale_by_adam(beta1, beta2)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = adam.update(updates, state, params)
        bias1, bias2 = (1 - beta**state.count for beta in (beta1, beta2))

        def scaled(gradient: Array, mean: Array, square: Array) -> Array:
            ahead = beta1 * mean + (1 - beta1) * gradient
            return ahead / bias1 / (jnp.sqrt(square / bias2) + 1e-8)

        return jax.tree.map(scaled, updates, state.mu, state.nu), state

    return optax.GradientTransformation(adam.init, update)


def scale_by_rate(factors: Mapping[str, float]) -> optax.GradientTransformationExtraArgs:
    """Scales updates by minus the `rate` that `update` takes, and each parameter's factor."""

    def update(updates: Any, state: Any, params: Any = None, *, rate: Any, **_: Any) -> Any:
        def scaled(path: Any, update: Array) -> Array:
            factor = factors.get(path_name(path), 1.0)
            return -(rate if factor == 1 else factor * rate) * update

        return jax.tree.map_with_path(scaled, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def kernels(params: Any) -> Any:
    """Returns a mask that is True for kernels, and False for biases and the scales of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def not_kernels(params: Any) -> Any:
    return jax.tree.map(lambda kernel: not kernel, kernels(params))


def learning_rate(config: OptimizerConfig, steps: int) -> Schedule:
    """Returns the learning rate by step of a run of `steps`: linear warm-up, then the schedule.

    Raises:
      UserError: the user's schedule cannot be imported or called.
    """
    if config.schedule_options and config.schedule in SCHEDULES:
        raise UserError(f"optimizer.schedule_options: {config.schedule} has none")
    if config.schedule == "onecycle":
        return one_cycle(config.learning_rate, steps)
    if ":" in config.schedule:
        schedule = _own_schedule(config, steps)
    elif config.schedule == "cosine":
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


def one_cycle(peak: float, steps: int) -> Schedule:
    """Returns PyTorch's OneCycleLR: a cosine from peak / 25 to the peak, one to peak / 250,000.

    The last step has the lowest rate; with Optax's schedule, the step after it would.
    """
    top, last = 0.3 * steps - 1, steps - 1

    def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
        def cosine(start: float, end: float, share: Array) -> Array:
            return end + (start - end) * (1 + jnp.cos(jnp.pi * share)) / 2

        rising = cosine(peak / 25, peak, step / top)
        falling = cosine(peak, peak / 25e4, (step - top) / (last - top))
        return jnp.where(step <= top, rising, falling)

    return schedule


def _own_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    where = f"optimizer.schedule={config.schedule}"
    try:
        function = import_name(config.schedule)
        remaining = steps - config.warmup_steps
        schedule = function(config.learning_rate, remaining, **config.schedule_options)
        rate = float(schedule(0))
    except ImportError as error:
        raise UserError(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {one_line(error)}") from error
    if not math.isfinite(rate):
        raise UserError(f"{where}: its first rate is {rate}")
    return schedule


def needs_warmup(config: Config) -> bool:
    """Returns whether training starts at a tenth of the rate, until it has begun to learn [H15]."""
    depth = config.model.depth
    return config.optimizer.schedule == "he2015" and depth is not None and depth >= WARMUP_DEPTH
