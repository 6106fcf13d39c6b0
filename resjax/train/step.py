"""The compiled part of training: initialise, take steps, evaluate.

A `Program` serves every run whose config differs in the seed alone: the seed comes in at run time,
so a sweep compiles once for all seeds. The dataset lies on the device; each dispatch takes many
steps in a scan and returns the mean of their metrics, so no step waits for the host.
"""

import json
import math
import os
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from resjax.config import Config, from_dict, to_dict
from resjax.data import datasets
from resjax.data.augmentation import Augmentation, augment
from resjax.data.feed import batch_indices, normalize, statistics
from resjax.models.count import Counts, count
from resjax.models.resnet import build
from resjax.train import optimizer, parallel

Metrics = dict[str, Float[Array, ""]]
ERROR_MEMORY = 0.98  # of the running training error that ends the warm-up: some fifty batches


class State(NamedTuple):
    """All that a run is, between two steps."""

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    optimizer: Any
    average: Any  # moving average of parameters and BN statistics, or None
    key: Key[Array, ""]  # of the run; every step folds its number in
    running_error: Float[Array, ""]
    warm: Bool[Array, ""]  # whether the warm-up of `optimizer.needs_warmup` is over


class Compiled(NamedTuple):
    """A compiled function, and what compiling it took and said."""

    call: Any
    seconds: float
    peak_bytes: int | None  # of one device; None where the compiler does not say


class Program:
    """The compiled functions of one config, whatever its seed."""

    def __init__(self, config: Config):
        self.backend = parallel.backend(config)
        data = config.data
        dataset = datasets.load(
            data.name,
            data.train_split,
            data.test_split,
            image_size=data.image_size,
            on_bad_image=data.on_bad_image,
        )
        self.config = config
        self.train_split: datasets.Split = self.backend.everywhere(dataset.train)
        self.test_split: datasets.Split = self.backend.everywhere(dataset.test)
        self.examples = {"train": len(dataset.train.labels), "test": len(dataset.test.labels)}
        self.image_shape = dataset.train.images.shape[1:]
        self.statistics = statistics(
            dataset.train.images, config.data.normalization, colors=config.data.pca_lighting > 0
        )
        self.augmentation = Augmentation.asked(config.data)
        self.classes = classes = len(dataset.class_names)
        self.model = build(config.model, classes=classes, norm_options=self.backend.norm_options())
        self.transformation = optimizer.transformation(config.optimizer)
        self.learning_rate = optimizer.learning_rate(config.optimizer, config.train.steps)
        self.counts: Counts = count(build(config.model, classes=classes), self.image_shape)
        self._init = self.backend.compile_init(self.init_state)
        self.forget()

    def forget(self) -> None:
        """Drops the compiled steps and evaluation."""
        self._steps: dict[int, Compiled] = {}
        self._evaluation: Compiled | None = None

    def init(self, seed: int) -> State:
        return self._init(jax.random.key(seed))

    def steps(self, state: State, steps: int) -> tuple[State, Metrics]:
        """Takes `steps` steps; gives the mean of their metrics. `state` is donated."""
        return self.compiled(state, steps).call(state, self.train_split)

    def compiled(self, state: State, steps: int) -> Compiled:
        """A dispatch of `steps` steps; the first call for a number of steps compiles it."""
        if steps not in self._steps:
            function = self.backend.compile_steps(self.take_steps, steps)
            self._steps[steps] = compiled(function, state, self.train_split)
        return self._steps[steps]

    def evaluate(self, state: State) -> Metrics:
        """Loss and error over the whole test split; those of the averaged weights beside."""
        return self.compiled_evaluation(state).call(state, self.test_split)

    def compiled_evaluation(self, state: State) -> Compiled:
        """The evaluation; the first call compiles it."""
        if self._evaluation is None:
            function = self.backend.compile_evaluate(self.evaluate_split)
            self._evaluation = compiled(function, state, self.test_split)
        return self._evaluation

    def init_state(self, key: Key[Array, ""]) -> State:
        image = jnp.zeros((1, *self.image_shape))
        variables = self.model.init(jax.random.fold_in(key, 0), image)
        averages = self.config.optimizer.ema_decay > 0
        return State(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            optimizer=self.transformation.init(variables["params"]),
            # A copy: a buffer is donated once.
            average=jax.tree.map(jnp.copy, dict(variables)) if averages else None,
            key=jax.random.fold_in(key, 1),
            running_error=jnp.ones(()),
            warm=jnp.asarray(not optimizer.needs_warmup(self.config)),
        )

    def take_steps(
        self, state: State, split: datasets.Split, *, steps: int
    ) -> tuple[State, Metrics]:
        batch_size = self.config.data.batch_size
        order_key, step_key = jax.random.split(state.key)
        indices = batch_indices(order_key, state.step, steps, batch_size, self.examples["train"])

        def body(state: State, chosen: Int[Array, "batch"]) -> tuple[State, Metrics]:
            key = jax.random.fold_in(step_key, state.step)
            return self.take_step(state, split, chosen, key)

        state, metrics = lax.scan(body, state, indices)
        means = jax.tree.map(jnp.mean, metrics)
        return state, {**means, "learning_rate": metrics["learning_rate"][-1]}

    def take_step(
        self, state: State, split: datasets.Split, chosen: Int[Array, "batch"], key: Key[Array, ""]
    ) -> tuple[State, Metrics]:
        """One step of the optimiser on the chosen examples."""
        gradients, batch_stats, metrics = self.gradients(state, split, chosen, key)
        rate = self.learning_rate(state.step) * optimizer.warmup_factor(state.warm)
        updates, kept = self.transformation.update(
            gradients, state.optimizer, state.params, rate=rate
        )
        params = optax.apply_updates(state.params, updates)
        running_error = ERROR_MEMORY * state.running_error + (1 - ERROR_MEMORY) * metrics["error"]
        new = State(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            optimizer=kept,
            average=self.averaged(state.average, {"params": params, "batch_stats": batch_stats}),
            key=state.key,
            running_error=running_error,
            warm=optimizer.warmed_up(state.warm, running_error),
        )
        return new, {**metrics, "learning_rate": rate}

    def averaged(self, average: Any, new: Any) -> Any:
        """The moving average of the weights, a step on."""
        if average is None:
            return None
        return optax.incremental_update(new, average, 1 - self.config.optimizer.ema_decay)

    def gradients(
        self, state: State, split: datasets.Split, chosen: Int[Array, "batch"], key: Key[Array, ""]
    ) -> tuple[Any, Any, Metrics]:
        """Of the mean loss over the batch, in as many equal parts as the config accumulates.

        Returns:
          Gradients, new BN statistics, mean metrics.
        """
        image_key, dropout_key, batch_key = jax.random.split(key, 3)
        parts = self.config.train.accumulate
        image_keys = jax.random.split(image_key, chosen.shape)
        dropout_keys = jax.random.split(dropout_key, parts)

        def body(batch_stats: Any, part: Any) -> tuple[Any, Any]:
            gradients, batch_stats, metrics = self.part_gradients(
                state.params, batch_stats, split, batch_key, *part
            )
            return batch_stats, (gradients, metrics)

        if parts == 1:  # a scan of one would put the convolutions into a loop for nothing
            part = (chosen, image_keys, dropout_keys[0])
            return self.part_gradients(state.params, state.batch_stats, split, batch_key, *part)
        divided = (chosen.reshape(parts, -1), image_keys.reshape(parts, -1), dropout_keys)
        batch_stats, results = lax.scan(body, state.batch_stats, divided)
        gradients, metrics = jax.tree.map(lambda stacked: stacked.mean(0), results)
        return gradients, batch_stats, metrics

    def part_gradients(
        self,
        params: Any,
        batch_stats: Any,
        split: datasets.Split,
        batch_key: Key[Array, ""],
        chosen: Int[Array, "batch"],
        image_keys: Key[Array, "batch"],
        dropout_key: Key[Array, ""],
    ) -> tuple[Any, Any, Metrics]:
        """Of the mean loss over the chosen examples, all devices together."""
        chosen, image_keys = self.backend.share((chosen, image_keys))
        images, targets = augment(
            image_keys,
            batch_key,
            split.images[chosen],
            jax.nn.one_hot(split.labels[chosen], self.classes),
            self.statistics,
            self.augmentation,
        )

        def loss_of(params: Any) -> tuple[Array, Any]:
            logits, changed = self.model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": self.backend.own_key(dropout_key)},
            )
            smooth = optax.smooth_labels(targets, self.config.train.label_smoothing)
            loss = optax.softmax_cross_entropy(logits, smooth).mean()
            return loss, (changed["batch_stats"], missed(logits, targets).mean())

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (changed, error)), gradients = gradient(params)
        return self.backend.mean((gradients, changed, {"loss": loss, "error": error}))

    def evaluate_split(self, state: State, split: datasets.Split) -> Metrics:
        raw = {"params": state.params, "batch_stats": state.batch_stats}
        metrics = self.evaluate_variables(raw, split)
        if state.average is not None:
            averaged = self.evaluate_variables(state.average, split)
            metrics |= {f"ema_{name}": value for name, value in averaged.items()}
        return metrics

    def evaluate_variables(self, variables: Any, split: datasets.Split) -> Metrics:
        """Exact: the last batch is filled up by examples of no weight."""
        examples = self.examples["test"]
        batches = math.ceil(examples / self.config.data.eval_batch_size)
        each = math.ceil(examples / batches / self.backend.devices)
        size = each * self.backend.devices
        positions = jnp.arange(batches * size).reshape(batches, size)

        def body(sums: Metrics, position: Int[Array, "batch"]) -> tuple[Metrics, None]:
            position = self.backend.share(position)
            counted = position < examples
            chosen = jnp.minimum(position, examples - 1)
            labels = split.labels[chosen]
            images = normalize(split.images[chosen], self.statistics)
            logits = self.model.apply(variables, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            values = {"loss": losses, "error": wrong(logits, labels)}
            # Not a product: a filling example's loss may be infinite.
            totals = {name: jnp.where(counted, value, 0).sum() for name, value in values.items()}
            return jax.tree.map(jnp.add, sums, totals), None

        sums, _ = lax.scan(body, {"loss": jnp.zeros(()), "error": jnp.zeros(())}, positions)
        return jax.tree.map(lambda total: total / examples, self.backend.sum(sums))


def wrong(logits: Float[Array, "n classes"], labels: Int[Array, "n"]) -> Float[Array, "n"]:
    return (logits.argmax(-1) != labels).astype(jnp.float32)


def missed(logits: Float[Array, "n classes"], targets: Float[Array, "n classes"]) -> Array:
    """The targets' share outside the likeliest class: of mixed images, the parts that are wrong."""
    return 1 - jnp.take_along_axis(targets, logits.argmax(-1, keepdims=True), -1)[:, 0]


def compiled(function: Any, *arguments: Any) -> Compiled:
    """Compiles a function for arguments of these shapes, ahead of its first call."""
    start = time.monotonic()
    executable = function.lower(*arguments).compile()
    seconds = time.monotonic() - start
    # What `pmap` compiles on many hosts takes the arrays of all; `pmap` itself takes this host's.
    local = jax.process_count() > 1 and jax.tree.leaves(arguments)[0].is_fully_addressable
    return Compiled(function if local else executable, seconds, peak_bytes(executable))


def peak_bytes(executable: Any) -> int | None:
    """What a compiled function needs on one device: arguments, results and what lies between."""
    memory = executable.memory_analysis()
    if memory is None:
        return None
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def keep_compiled(folder: Path) -> None:
    """Keeps what is compiled in `folder`, for later processes on this machine.

    With the work and not in the user's home, because hosts of other processors may share that; a
    folder that the user has set stays.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))


def program(config: Config) -> Program:
    """The program of a config; that of the last few configs, seeds aside, is kept."""
    return _program(json.dumps(to_dict(replace(config, seed=0)), sort_keys=True))


@lru_cache(maxsize=2)
def _program(config: str) -> Program:
    return Program(from_dict(json.loads(config)))
