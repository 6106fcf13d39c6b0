"""The compiled part of training: initialise, take steps, evaluate.

A `Program` serves every run whose config differs in the seed alone: the seed comes in at run time,
so a sweep compiles once for all seeds. The dataset lies on the device; each dispatch takes many
steps in a scan and returns the mean of their metrics, so no step waits for the host.

Where parameters are frozen or thaw, training has phases (`resjax.train.freezing`), and a step of
each phase is a program of its own. A state always has all parameters; what the optimiser keeps of
them has one entry a phase that has begun, so that the state says which phase it is in.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from resjax.config import Config, from_dict, to_dict
from resjax.data import datasets
from resjax.data.augmentation import Augmentation, augment
from resjax.data.normalization import normalize
from resjax.data.ordering import batch_indices
from resjax.models.count import Counts, count
from resjax.models.layout import unrolled_paths
from resjax.models.resnet import ResNet, build
from resjax.train import freezing, init_from_weights, optimizer, parallel
from resjax.train.sources import Streamed, source
from resjax.xla.compile_options import step_compile

Metrics = dict[str, Float[Array, ""]]
ERROR_MEMORY = 0.98  # of the running training error that ends the warm-up: some fifty batches


class State(NamedTuple):
    """All that a run is, between two steps."""

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    optimizer: tuple[Any, ...]  # of the parameters that each phase thawed, up to this one
    average: Any  # moving average of parameters and BN statistics, or None
    key: Key[Array, ""]  # of the run; every step folds its number in
    running_error: Float[Array, ""]
    warm: Bool[Array, ""]  # whether the warm-up of `optimizer.needs_warmup` is over
    diverged: Bool[Array, ""]  # under train.nonfinite=stop; from then on nothing changes


class Compiled(NamedTuple):
    """A compiled function, and what compiling it took and said."""

    call: Any
    seconds: float
    peak_bytes: int | None  # of one device; None where the compiler does not say


class Program:
    """The compiled functions of one config, whatever its seed."""

    def __init__(self, config: Config):
        self.backend = parallel.backend(config)
        self.config = config
        self.source = source(config, self.backend)
        self.train_split, self.test_split = self.source.arrays(config)
        self.examples = self.source.examples
        self.image_shape = self.source.image_shape
        self.initial_weights = init_from_weights.initial_weights(config, self.image_shape[2])
        self.statistics = init_from_weights.normalization_statistics(
            config, self.initial_weights, self.source.statistics, self.image_shape
        )
        self.augmentation = Augmentation.from_config(config.data)
        self.classes = classes = self.source.classes
        self.model = self._network()
        # Traced once for all that ask for the shapes of the variables.
        self._variables = jax.jit(lambda key, images: self.model.init(key, images))
        key, image = jax.random.key(0), jnp.zeros((1, *self.image_shape))
        self.shapes = jax.eval_shape(self._variables, key, image)
        paths = unrolled_paths(self.shapes["params"])
        self.phases = freezing.phases(
            freezing.starts(paths, config.transfer),
            self.examples["train"] / config.data.batch_size,
        )
        stays = config.transfer.frozen_norm == "eval"
        self._at_rest = [
            freezing.at_rest(paths, phase.trains) if stays else frozenset[str]()
            for phase in self.phases
        ]
        self._trained = [self._network(at_rest) for at_rest in self._at_rest]
        factors = freezing.rate_factors(paths, config.transfer, config.optimizer.learning_rate)
        self.transformation = optimizer.transformation(config.optimizer, factors)
        self._kept = [
            self.backend.compile_kept(partial(self.kept, phase=phase), self.shapes["params"])
            for phase in self.phases
        ]
        self.learning_rate = optimizer.learning_rate(config.optimizer, config.train.steps)
        network = build(config.model, classes=classes)
        self.counts: Counts = count(network, self.image_shape, self.shapes)
        self._init = self.backend.compile_init(self.init_state)
        self.forget()

    def forget(self) -> None:
        """Drops the compiled steps and evaluation."""
        self._steps: dict[tuple[int, int], Compiled] = {}
        self._evaluation: Compiled | None = None

    def _network(self, at_rest: frozenset[str] = frozenset()) -> ResNet:
        """The network, whose BN layers `at_rest` use and keep their running averages."""
        options = self.backend.norm_options()
        if at_rest:
            options["frozen"] = lambda path: "/".join(path) in at_rest
        return build(self.config.model, classes=self.classes, norm_options=options)

    def init(self, seed: int) -> State:
        """A state drawn at random, in the first phase."""
        return self._init(jax.random.key(seed))

    def start(self, seed: int) -> State:
        """The state at step 0: pretrained weights, where the config says so, over drawn ones.

        Raises:
          UserError: they do not fit.
        """
        if (found := self.initial_weights) is None:
            return self.init(seed)
        init_from_weights.require_fit(self.config, found, self.shapes, self.classes)
        drawn = self.backend.one(self.init(seed))
        return self.backend.spread(
            init_from_weights.replace_variables(drawn, found, self.config.transfer)
        )

    def phase_at(self, step: int) -> int:
        """The phase in which a step, counted from 0, is taken."""
        return sum(phase.first_step <= step for phase in self.phases) - 1

    def trainable(self, phase: int) -> int:
        """How many parameters train in a phase."""
        trained, _ = freezing.split(self.shapes["params"], self.phases[phase].trains.__contains__)
        return sum(leaf.size for leaf in jax.tree.leaves(trained))

    def thawed(self, state: State, phase: int) -> State:
        """The state at the beginning of a phase, from one of an earlier phase.

        What the optimiser kept stays; of what comes to train it knows nothing yet.
        """
        coming = self._kept[len(state.optimizer) : phase + 1]
        return state._replace(
            optimizer=(*state.optimizer, *(kept(state.params) for kept in coming))
        )

    def saved(self, state: State) -> Callable[[int], State]:
        """From a step to a state of the structure that its checkpoint has, from any first one.

        A checkpoint is of the phase in which its last step was taken.
        """
        return lambda step: self.backend.one(self.thawed(state, self.phase_at(max(step - 1, 0))))

    def feed(self, seed: int, first_step: int) -> "Feed":
        """What a run takes its steps through; `seed` and `first_step` place a stream."""
        return Feed(self, seed, first_step)

    def steps(self, state: State, steps: int) -> tuple[State, Metrics]:
        """Takes `steps` steps on resident data; gives the mean of their metrics.

        `state` is donated.
        """
        return self.compiled(state, steps).call(state, self.train_split)

    def compiled(self, state: State, steps: int) -> Compiled:
        """A dispatch of `steps` steps; the first call for a phase and a number compiles it.

        A stream's dispatch has one step, whatever is asked for.
        """
        streams = isinstance(self.source, Streamed)
        take, steps = (self.take_streamed, 1) if streams else (self.take_steps, steps)
        key = len(state.optimizer) - 1, steps
        if key not in self._steps:
            function = self.backend.compile_steps(take, steps)
            self._steps[key] = compiled(function, state, self.train_split)
        return self._steps[key]

    def evaluate(self, state: State) -> Metrics:
        """Loss and error over the whole test split; those of the averaged weights beside."""
        call = self.compiled_evaluation(state).call
        state = state._replace(optimizer=())
        if not isinstance(self.source, Streamed):
            return call(state, self.test_split)
        totals = [call(state, batch) for batch in self.source.evaluation()]
        sums = _sums(totals)
        images = sums.pop("images")
        return {name: value / images for name, value in sums.items()}

    def compiled_evaluation(self, state: State) -> Compiled:
        """The evaluation, or for a stream that of one batch; the first call compiles it.

        It takes a state without the optimiser's part, so that one serves all phases.
        """
        if self._evaluation is None:
            streams = isinstance(self.source, Streamed)
            evaluate = self.evaluate_streamed if streams else self.evaluate_split
            function = self.backend.compile_evaluate(evaluate)
            weights = state._replace(optimizer=())
            self._evaluation = compiled(function, weights, self.test_split)
        return self._evaluation

    def init_state(self, key: Key[Array, ""]) -> State:
        image = jnp.zeros((1, *self.image_shape))
        variables = self._variables(jax.random.fold_in(key, 0), image)
        averages = self.config.optimizer.ema_decay > 0
        return State(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            optimizer=(self.kept(variables["params"], self.phases[0]),),
            # A copy: a buffer is donated once.
            average=jax.tree.map(jnp.copy, dict(variables)) if averages else None,
            key=jax.random.fold_in(key, 1),
            running_error=jnp.ones(()),
            warm=jnp.asarray(not optimizer.needs_warmup(self.config)),
            diverged=jnp.asarray(False),
        )

    def kept(self, params: Any, phase: freezing.Phase) -> Any:
        """What the optimiser keeps of the parameters that a phase thaws, at its beginning."""
        return self.transformation.init(freezing.split(params, phase.thaws.__contains__)[0])

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
        means = of_taken(jax.tree.map(jnp.mean, metrics))
        return state, {**means, "learning_rate": metrics["learning_rate"][-1]}

    def take_streamed(self, state: State, batch: Any, *, steps: int) -> tuple[State, Metrics]:
        """One step on a batch that has come, in its parts."""
        _, step_key = jax.random.split(state.key)
        return self.take_step(state, batch, None, jax.random.fold_in(step_key, state.step))

    def take_step(
        self, state: State, split: Any, chosen: Int[Array, "batch"] | None, key: Key[Array, ""]
    ) -> tuple[State, Metrics]:
        """One step of the optimiser on the chosen examples of a split, or on a streamed batch."""
        gradients, batch_stats, metrics = self.gradients(state, split, chosen, key)
        rate = self.learning_rate(state.step) * optimizer.warmup_factor(state.warm)
        params, kept = self.updated(state, gradients, rate)
        running_error = ERROR_MEMORY * state.running_error + (1 - ERROR_MEMORY) * metrics["error"]
        new = State(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            optimizer=kept,
            average=self.averaged(state, {"params": params, "batch_stats": batch_stats}),
            key=state.key,
            running_error=running_error,
            warm=optimizer.warmed_up(state.warm, running_error),
            diverged=state.diverged,
        )
        new, metrics = self.guarded(state, new, gradients, metrics)
        return new, {**metrics, "learning_rate": rate}

    def updated(
        self, state: State, gradients: Any, rate: Float[Array, ""]
    ) -> tuple[Any, tuple[Any, ...]]:
        """The parameters after a step, and what the optimiser keeps then, phase by phase."""
        gradients = optimizer.clipped(self.config.optimizer, gradients)
        params, kept = state.params, []
        for phase, before in zip(self.phases, state.optimizer, strict=False):
            training, rest = freezing.split(params, phase.thaws.__contains__)
            own, _ = freezing.split(gradients, phase.thaws.__contains__)
            added, after = self.transformation.update(own, before, training, rate=rate)
            params = freezing.merge(optax.apply_updates(training, added), rest)
            kept.append(after)
        return params, tuple(kept)

    def guarded(
        self, old: State, new: State, gradients: Any, metrics: Metrics
    ) -> tuple[State, Metrics]:
        """The new state, or what `train.nonfinite` says where loss or gradients are not finite.

        Under `stop` the old one stays, with its step, whatever comes after: so the state that a
        dispatch returns is the one in which the loss was first not finite.
        """
        asked = self.config.train.nonfinite
        if asked == "record":
            return new, metrics
        finite = jnp.isfinite(metrics["loss"]) & ~old.diverged
        if asked == "skip":  # the norm costs a pass over the gradients
            finite &= jnp.isfinite(optax.tree.norm(gradients))
        kept = jax.tree.map(partial(jnp.where, finite), new, old)
        if asked == "stop":
            return kept._replace(diverged=~finite), metrics
        counted = {name: jnp.where(finite, value, 0) for name, value in metrics.items()}
        return kept._replace(step=new.step), {**counted, "skipped": 1.0 - finite}

    def probe(self, state: State, split: Any, *, steps: int) -> tuple[State, Any]:
        """The gradients and BN statistics of the next step, which is not taken."""
        order_key, step_key = jax.random.split(state.key)
        key, chosen = jax.random.fold_in(step_key, state.step), None
        if not isinstance(self.source, Streamed):
            size, examples = self.config.data.batch_size, self.examples["train"]
            chosen = batch_indices(order_key, state.step, steps, size, examples)[0]
        gradients, batch_stats, metrics = self.gradients(state, split, chosen, key)
        # A parameter that does not train has no gradient; here it counts as one that is finite.
        gradients = freezing.merge(gradients, jax.tree.map(jnp.zeros_like, state.params))
        return state, {"params": gradients, "batch_stats": batch_stats, "loss": metrics["loss"]}

    def averaged(self, state: State, new: Any) -> Any:
        """The moving average of the weights, a step on; what does not move stays bit by bit."""
        if state.average is None:
            return None
        phase = len(state.optimizer) - 1
        (old, rest), (new, _) = (self.moving(each, phase) for each in (state.average, new))
        moved = optax.incremental_update(new, old, 1 - self.config.optimizer.ema_decay)
        return freezing.merge(moved, rest)

    def moving(self, variables: Any, phase: int) -> tuple[Any, Any]:
        """Variables that change in a step of a phase, and those that do not."""

        def moves(path: str) -> bool:
            collection, _, name = path.partition("/")
            if collection == "params":
                return name in self.phases[phase].trains
            return name.rpartition("/")[0] not in self._at_rest[phase]

        return freezing.split(variables, moves)

    def gradients(
        self, state: State, split: Any, chosen: Int[Array, "batch"] | None, key: Key[Array, ""]
    ) -> tuple[Any, Any, Metrics]:
        """Of the mean loss over the batch, in as many equal parts as the config accumulates.

        Returns:
          Gradients of what trains, None for what does not, new BN statistics, mean metrics.
        """
        image_key, dropout_key, batch_key = jax.random.split(key, 3)
        parts = self.config.train.accumulation_steps
        image_keys = jax.random.split(image_key, (parts, self.config.data.batch_size // parts))
        dropout_keys = jax.random.split(dropout_key, parts)
        drawn = split if chosen is None else chosen.reshape(parts, -1)

        def body(batch_stats: Any, part: Any) -> tuple[Any, Any]:
            part_drawn, *keys = part
            # A stream's part is there; of a split it is looked up.
            batch = part_drawn if chosen is None else self.backend.take(split, part_drawn)
            variables = {"params": state.params, "batch_stats": batch_stats}
            gradients, batch_stats, metrics = self.part_gradients(
                variables, len(state.optimizer) - 1, batch, batch_key, *keys
            )
            return batch_stats, (gradients, metrics)

        each = (drawn, image_keys, dropout_keys)
        if parts == 1:  # a scan of one would put the convolutions into a loop for nothing
            only = jax.tree.map(lambda stacked: stacked[0], each)
            batch_stats, (gradients, metrics) = body(state.batch_stats, only)
            return gradients, batch_stats, metrics
        batch_stats, results = lax.scan(body, state.batch_stats, each)
        gradients, metrics = jax.tree.map(lambda stacked: stacked.mean(0), results)
        return gradients, batch_stats, metrics

    def part_gradients(
        self,
        variables: Any,
        phase: int,
        batch: datasets.Split,
        batch_key: Key[Array, ""],
        image_keys: Key[Array, "batch"],
        dropout_key: Key[Array, ""],
    ) -> tuple[Any, Any, Metrics]:
        """Of the mean loss over a batch, all devices together; this device has its share."""
        batch_images, labels = batch
        augmented = augment(
            self.backend.share(image_keys),
            batch_key,
            {"image": batch_images, "label": jax.nn.one_hot(labels, self.classes)},
            self.statistics,
            self.augmentation,
        )
        images, targets = augmented["image"], augmented["label"]

        moving, rest = self.moving(variables, phase)

        def loss_of(trained: Any) -> tuple[Array, Any]:
            logits, changed = self._trained[phase].apply(
                freezing.merge({**moving, "params": trained}, rest),
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": self.backend.own_key(dropout_key)},
            )
            smooth = optax.smooth_labels(targets, self.config.train.label_smoothing)
            loss = optax.softmax_cross_entropy(logits, smooth).mean()
            return loss, (changed.get("batch_stats", {}), missed(logits, targets).mean())

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (changed, error)), gradients = gradient(moving["params"])
        averaged, _ = self.moving({"batch_stats": changed}, phase)
        gradients, averaged, metrics = self.backend.mean(
            (gradients, averaged["batch_stats"], {"loss": loss, "error": error})
        )
        return gradients, freezing.merge(averaged, rest["batch_stats"]), metrics

    def evaluate_split(self, state: State, split: datasets.Split) -> Metrics:
        """Exact: the last batch is filled up by examples of no weight."""
        examples = self.examples["test"]
        batches = math.ceil(examples / self.config.data.eval_batch_size)
        each = math.ceil(examples / batches / self.backend.devices)
        size = each * self.backend.devices
        positions = jnp.arange(batches * size).reshape(batches, size)

        def body(sums: Metrics, position: Int[Array, "batch"]) -> tuple[Metrics, None]:
            images, labels = self.backend.take(split, jnp.minimum(position, examples - 1))
            counted = self.backend.share(position) < examples
            return jax.tree.map(jnp.add, sums, self.totals(state, images, labels, counted)), None

        zeros = {name: jnp.zeros(()) for name in self.totals_names()}
        sums, _ = lax.scan(body, zeros, positions)
        return jax.tree.map(lambda total: total / examples, self.backend.sum(sums))

    def evaluate_streamed(self, state: State, batch: Any) -> Metrics:
        """Sums over a streamed batch, and how many images count."""
        images, labels, weights = jax.tree.map(lambda parts: parts[0], batch)
        sums = self.totals(state, images, labels, weights > 0)
        return self.backend.sum({**sums, "images": weights.sum()})

    def totals_names(self) -> list[str]:
        averages = ["ema_"] if self.config.optimizer.ema_decay else []
        return [f"{prefix}{name}" for prefix in ("", *averages) for name in ("loss", "error")]

    def totals(
        self, state: State, images: Array, labels: Int[Array, "n"], counted: Bool[Array, "n"]
    ) -> Metrics:
        """Sums of loss and error over the images that count; those of averaged weights beside.

        Args:
          state: whose weights.
          images: (n, h, w, c), or of several crops (n, crops, h, w, c): their mean logits count.
          labels: of the images.
          counted: whether an image counts.
        """
        raw = {"params": state.params, "batch_stats": state.batch_stats}
        sums = self.totals_of(raw, images, labels, counted)
        if state.average is not None:
            averaged = self.totals_of(state.average, images, labels, counted)
            sums |= {f"ema_{name}": value for name, value in averaged.items()}
        return sums

    def totals_of(
        self, variables: Any, images: Array, labels: Int[Array, "n"], counted: Bool[Array, "n"]
    ) -> Metrics:
        flat = normalize(images.reshape(-1, *images.shape[-3:]), self.statistics)
        logits = self.model.apply(variables, flat).reshape(*images.shape[:-3], -1)
        logits = logits.mean(1) if images.ndim == 5 else logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        values = {"loss": losses, "error": wrong(logits, labels)}
        # Not a product: a filling example's loss may be infinite.
        return {name: jnp.where(counted, value, 0).sum() for name, value in values.items()}


class Feed:
    """A run's way to its steps: dispatches of many on resident data, one by one on a stream."""

    def __init__(self, program: Program, seed: int, first_step: int):
        self._program = program
        self._batches: Any = None
        if isinstance(program.source, Streamed):
            self._batches = program.source.training(seed, first_step)
            self._next = next(self._batches)

    def steps(self, state: State, steps: int) -> tuple[State, Metrics]:
        """Takes `steps` steps; gives the mean of their metrics. `state` is donated."""
        if self._batches is None:
            return self._program.steps(state, steps)
        call = self._program.compiled(state, 1).call
        taken: list[Metrics] = []
        for _ in range(steps):
            state, metrics = call(state, self._next)
            taken.append(metrics)
            self._next = next(self._batches)  # the step runs meanwhile
            if len(taken) > 1:  # or batches would pile up on the device
                jax.block_until_ready(taken[-2])
        means = of_taken({name: value / steps for name, value in _sums(taken).items()})
        return state, {**means, "learning_rate": taken[-1]["learning_rate"]}

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def of_taken(means: Metrics) -> Metrics:
    """Means over the steps that were taken, where `skipped` is the share of those that were not."""
    taken = 1 - means.get("skipped", jnp.zeros(()))
    return {
        name: value / taken if name in ("loss", "error") else value for name, value in means.items()
    }


@jax.jit
def _sums(terms: list[Metrics]) -> Metrics:
    return {name: jnp.stack([term[name] for term in terms]).sum() for name in terms[0]}


def wrong(logits: Float[Array, "n classes"], labels: Int[Array, "n"]) -> Float[Array, "n"]:
    return (logits.argmax(-1) != labels).astype(jnp.float32)


def missed(logits: Float[Array, "n classes"], targets: Float[Array, "n classes"]) -> Array:
    """The targets' share outside the likeliest class: of mixed images, the parts that are wrong."""
    return 1 - jnp.take_along_axis(targets, logits.argmax(-1, keepdims=True), -1)[:, 0]


def compiled(function: Any, *arguments: Any) -> Compiled:
    """Compiles a function for arguments of these shapes, ahead of its first call."""
    start = time.monotonic()
    executable = function.lower(*arguments).compile(step_compile())
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
