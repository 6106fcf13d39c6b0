"""The compiled part of training: initialise, take steps, evaluate.

A `Program` serves every run whose config differs in the seed alone: the seed comes in at run time,
so a sweep compiles once for all seeds. The dataset lies on the device; each dispatch takes many
steps in a scan and returns the mean of their metrics, so no step waits for the host.
"""

import json
import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from resjax.config import Config, from_dict, to_dict
from resjax.data import datasets
from resjax.data.augmentation import flip, pad_crop
from resjax.data.feed import batch_indices, normalize, statistics
from resjax.models.convolution import quick_compile
from resjax.models.count import Counts, count
from resjax.models.resnet import build
from resjax.train import optimizer

Metrics = dict[str, Float[Array, ""]]
ERROR_MEMORY = 0.98  # of the running training error that ends the warm-up: some fifty batches


class State(NamedTuple):
    """All that a run is, between two steps."""

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    optimizer: Any
    key: Key[Array, ""]  # of the run; every step folds its number in
    running_error: Float[Array, ""]
    warm: Bool[Array, ""]  # whether the warm-up of `optimizer.needs_warmup` is over


class Resident(NamedTuple):
    """A split on the device."""

    images: UInt8[Array, "n h w c"]
    labels: Int[Array, "n"]


class Program:
    """The compiled functions of one config, whatever its seed."""

    def __init__(self, config: Config):
        dataset = datasets.load(config.data.name)
        self.config = config
        self.train_split = Resident(*jax.device_put(dataset.train))
        self.test_split = Resident(*jax.device_put(dataset.test))
        self.statistics = statistics(dataset.train.images, config.data.normalization)
        self.model = build(config.model, classes=len(dataset.class_names))
        self.direction = optimizer.direction(config.optimizer)
        self.learning_rate = optimizer.learning_rate(config.optimizer, config.train.steps)
        self.counts: Counts = count(self.model, dataset.train.images.shape[1:])
        self._init = jax.jit(self.init_state, compiler_options=quick_compile())
        self._steps = jax.jit(self.take_steps, static_argnames="steps", donate_argnums=0)
        self._evaluate = jax.jit(self.evaluate_split)

    def init(self, seed: int) -> State:
        return self._init(jax.random.key(seed))

    def steps(self, state: State, steps: int) -> tuple[State, Metrics]:
        """Takes `steps` steps (static); gives the mean of their metrics. `state` is donated."""
        return self._steps(state, self.train_split, steps=steps)

    def evaluate(self, state: State) -> Metrics:
        """Loss and error over the whole test split."""
        return self._evaluate(state.params, state.batch_stats, self.test_split)

    def init_state(self, key: Key[Array, ""]) -> State:
        image = jnp.zeros((1, *self.train_split.images.shape[1:]))
        variables = self.model.init(jax.random.fold_in(key, 0), image)
        return State(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            optimizer=self.direction.init(variables["params"]),
            key=jax.random.fold_in(key, 1),
            running_error=jnp.ones(()),
            warm=jnp.asarray(not optimizer.needs_warmup(self.config)),
        )

    def take_steps(self, state: State, split: Resident, *, steps: int) -> tuple[State, Metrics]:
        batch_size, examples = self.config.data.batch_size, len(split.labels)
        order_key, step_key = jax.random.split(state.key)
        indices = batch_indices(order_key, state.step, steps, batch_size, examples)

        def body(state: State, chosen: Int[Array, "batch"]) -> tuple[State, Metrics]:
            batch = Resident(split.images[chosen], split.labels[chosen])
            return self.take_step(state, batch, jax.random.fold_in(step_key, state.step))

        state, metrics = lax.scan(body, state, indices)
        means = jax.tree.map(jnp.mean, metrics)
        return state, {**means, "learning_rate": metrics["learning_rate"][-1]}

    def take_step(
        self, state: State, batch: Resident, key: Key[Array, ""]
    ) -> tuple[State, Metrics]:
        """One step of SGD on one batch."""
        config = self.config
        crop_key, flip_key, dropout_key = jax.random.split(key, 3)
        images = normalize(batch.images, self.statistics)
        images = pad_crop(crop_key, images, config.data.crop_padding)
        if config.data.flip:
            images = flip(flip_key, images)

        def loss_of(params: Any) -> tuple[Array, Any]:
            logits, changed = self.model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            targets = jax.nn.one_hot(batch.labels, logits.shape[-1])
            targets = optax.smooth_labels(targets, config.train.label_smoothing)
            loss = optax.softmax_cross_entropy(logits, targets).mean()
            return loss, (changed["batch_stats"], wrong(logits, batch.labels).mean())

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (batch_stats, error)), gradients = gradient(state.params)
        along, direction = self.direction.update(gradients, state.optimizer, state.params)
        rate = self.learning_rate(state.step) * optimizer.warmup_factor(state.warm)
        running_error = ERROR_MEMORY * state.running_error + (1 - ERROR_MEMORY) * error
        new = State(
            step=state.step + 1,
            params=jax.tree.map(lambda weight, d: weight - rate * d, state.params, along),
            batch_stats=batch_stats,
            optimizer=direction,
            key=state.key,
            running_error=running_error,
            warm=optimizer.warmed_up(state.warm, running_error),
        )
        return new, {"loss": loss, "error": error, "learning_rate": rate}

    def evaluate_split(self, params: Any, batch_stats: Any, split: Resident) -> Metrics:
        """Exact: the last batch is filled up by examples of no weight."""
        examples = len(split.labels)
        batches = math.ceil(examples / self.config.data.eval_batch_size)
        size = math.ceil(examples / batches)
        positions = jnp.arange(batches * size).reshape(batches, size)

        def body(sums: Metrics, position: Int[Array, "batch"]) -> tuple[Metrics, None]:
            counted = position < examples
            chosen = jnp.minimum(position, examples - 1)
            labels = split.labels[chosen]
            images = normalize(split.images[chosen], self.statistics)
            logits = self.model.apply({"params": params, "batch_stats": batch_stats}, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            values = {"loss": losses, "error": wrong(logits, labels)}
            # Not a product: a filling example's loss may be infinite.
            totals = {name: jnp.where(counted, value, 0).sum() for name, value in values.items()}
            return jax.tree.map(jnp.add, sums, totals), None

        sums, _ = lax.scan(body, {"loss": jnp.zeros(()), "error": jnp.zeros(())}, positions)
        return jax.tree.map(lambda total: total / examples, sums)


def wrong(logits: Float[Array, "n classes"], labels: Int[Array, "n"]) -> Float[Array, "n"]:
    return (logits.argmax(-1) != labels).astype(jnp.float32)


def program(config: Config) -> Program:
    """The program of a config; that of the last few configs, seeds aside, is kept."""
    return _program(json.dumps(to_dict(replace(config, seed=0)), sort_keys=True))


@lru_cache(maxsize=2)
def _program(config: str) -> Program:
    return Program(from_dict(json.loads(config)))
