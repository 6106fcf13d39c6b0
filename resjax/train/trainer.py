"""The trainer composes, compiles and dispatches a config's train step and evaluation.

A trainer serves every run whose config differs in the seed alone: the seed comes in at run time, so
a sweep compiles once for all seeds. Each dispatch takes many steps in a scan and returns the sums
of their metrics, so no step waits for the host.

Where parameters are frozen or thaw, training has phases (`resjax.train.freezing`), and the step of
each phase is a program of its own.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Key

from resjax.config import Config, code_names, from_dict, to_dict
from resjax.data.augmentation import Augmentation, augment
from resjax.data.normalization import normalize
from resjax.diagnostics import Context, find_diagnostics, layer_patterns, measure, needs_forward
from resjax.diagnostics.forward import FORWARD, forward_values
from resjax.diagnostics.taps import PROBES, TappedModel, norms
from resjax.errors import UserError
from resjax.models.count import Counts, count, multiply_adds
from resjax.models.layout import is_scanned, path_name, unrolled_paths
from resjax.models.resnet import build
from resjax.tasks import make_task
from resjax.tasks.base import Batch
from resjax.train import freezing, init_from_weights, step
from resjax.train.estimate import SECONDS_AT_ONCE, forward_seconds
from resjax.train.freezing import split
from resjax.train.optimizer import make_optimizer
from resjax.train.parallel import make_backend
from resjax.train.sources import make_source
from resjax.train.state import TrainState, order_key, run_key, step_key
from resjax.train.step import Metrics
from resjax.user_code import trust
from resjax.xla.compile_options import step_compile
from resjax.xla.convolution import as_written
from resjax.xla.target import described_target, platform


class Dispatch(NamedTuple):
    """Steps of one phase that run in one call of a compiled function.

    Dispatches are ordered by memory: a larger one trains more parameters, or runs more steps.
    """

    phase: int
    steps: int
    part: bool = False  # of a line of metrics: the call returns those of each step, not their means


class Executable(NamedTuple):
    """A compiled function."""

    call: Any
    compile_seconds: float
    peak_bytes: int | None  # on one device; None if the compiler does not say


class InterruptedEvaluationError(Exception):
    """An evaluation was interrupted between two of its dispatches."""


class PhaseProgram(NamedTuple):
    """The parts of a train step that differ from phase to phase."""

    model: nn.Module
    tx: optax.GradientTransformationExtraArgs
    trainable: Callable[[str], bool]  # of a parameter's path
    updates_stats: Callable[[str], bool]  # of a running statistic's path

    def changes(self, path: str) -> bool:
        """Returns whether training changes a variable, such as `params/head/kernel`."""
        collection, _, name = path.partition("/")
        return (self.trainable if collection == "params" else self.updates_stats)(name)


class Trainer:
    """The compiled functions of one config, for any seed."""

    def __init__(self, config: Config):
        """Reads the dataset and builds the network; compiles nothing yet.

        Raises:
          UserError: data, devices or options do not allow the config.
        """
        trust(code_names(config))  # a config from a file has been checked
        self.config = config
        self.backend = make_backend(config)
        self.source = make_source(config, self.backend)
        self.task = make_task(config.task, self.source.info)
        self._measure = partial(
            measure,
            find_diagnostics(config.diagnostics),
            layers=layer_patterns(config.diagnostics),
        )
        self.image_shape = self.source.info.image_shape
        self.initial_weights = init_from_weights.initial_weights(config, self.image_shape[2])
        self.statistics = init_from_weights.normalization_statistics(
            config, self.initial_weights, self.source.statistics, self.image_shape
        )
        self.augmentation = Augmentation.from_config(config.data, self.image_shape)
        self._require_targets()
        self._require_mixable_labels()
        self.model = self._network()
        # Jitted, so that it is traced once for all uses.
        self._init_variables = jax.jit(lambda key, images: self.model.init(key, images))
        key, image = jax.random.key(0), jnp.zeros((1, *self.image_shape))
        self.shapes = jax.eval_shape(self._init_variables, key, image)
        paths = unrolled_paths(self.shapes["params"])
        self.phases = freezing.phases(
            freezing.starts(paths, config.transfer),
            self.source.examples["train"] / config.data.batch_size,
        )
        factors = freezing.rate_factors(paths, config.transfer, config.optimizer.learning_rate)
        self.programs = [
            self._phase_program(phase, paths, factors) for phase in range(len(self.phases))
        ]
        self.counts: Counts = count(self.model, self.image_shape, self.shapes)
        self._init = self.backend.compile_init(self._init_state)
        self._compiled_init_opt_state = [
            self.backend.compile_init_opt_state(
                partial(self._init_opt_state, phase=phase), self.shapes["params"]
            )
            for phase in range(len(self.phases))
        ]
        self._executables: dict[Any, Executable] = {}

    def with_batch_size(self, **sizes: int) -> "Trainer":
        """Returns a trainer for another `batch_size` or `eval_batch_size`; shares device arrays."""
        changed = copy.copy(self)
        changed.config = replace(self.config, data=replace(self.config.data, **sizes))  # type: ignore[arg-type]
        changed.source = self.source.with_config(changed.config)
        changed._executables = {}
        return changed

    @property
    def loop(self) -> Literal["scan", "unroll"]:
        """The value of `model.loop` that makes a network with these parameters."""
        return "scan" if is_scanned(self.shapes["params"]) else "unroll"

    # States.

    def init(self, seed: int) -> TrainState:
        """Returns the state at step 0 with random parameters."""
        return self._init(jax.random.key(seed))

    def start(self, seed: int) -> TrainState:
        """Returns the state at step 0, with pretrained weights if the config names some.

        Raises:
          UserError: they do not fit.
        """
        if self.initial_weights is None:
            return self.init(seed)
        init_from_weights.require_fit(self.config, self.initial_weights, self.shapes)
        initial = init_from_weights.match_classes(
            self.config, self.initial_weights, self.source.info.class_names
        )
        if described_target():
            return self.init(seed)  # shapes, which the weights do not change
        random = self.backend.unreplicate(self.init(seed))
        return self.backend.replicate(
            init_from_weights.replace_variables(random, initial, self.config.transfer)
        )

    def phase_at(self, step: int) -> int:
        """Returns the number of the phase to which a step, counted from 0, belongs."""
        return sum(phase.first_step <= step for phase in self.phases) - 1

    def enter_phase(self, state: TrainState, phase: int) -> TrainState:
        """Returns the state at the beginning of a phase.

        Existing optimizer state is preserved; newly trainable parameters start with fresh state.
        """
        if len(self.phases) == 1:  # the state has all that it needs from the start
            return state
        leaves = jax.tree.leaves_with_path(state.opt_state)
        existing = {path_name(path): leaf for path, leaf in leaves}
        fresh = self._compiled_init_opt_state[phase](state.params)
        opt_state = jax.tree.map_with_path(
            lambda path, leaf: existing.get(path_name(path), leaf), fresh
        )
        return state._replace(opt_state=opt_state)

    def checkpoint_template(self, state: TrainState) -> Callable[[int], TrainState]:
        """Returns a function from a step to a state of the structure of its checkpoint.

        A checkpoint belongs to the phase of its last step.
        """
        return lambda step: self.backend.unreplicate(
            self.enter_phase(state, self.phase_at(max(step - 1, 0)))
        )

    def trainable_parameters(self, phase: int) -> int:
        """Returns how many parameters train in a phase."""
        trained, _ = split(self.shapes["params"], self.programs[phase].trainable)
        return sum(leaf.size for leaf in jax.tree.leaves(trained))

    # Compiled functions.

    def compile_dispatch(self, state: TrainState, dispatch: Dispatch) -> Executable:
        """Compiles a dispatch at the first call; for a stream, a dispatch of one step."""
        steps = 1 if self.source.streamed else dispatch.steps
        key = dispatch._replace(steps=steps)
        function = partial(self._take_steps, **key._asdict())
        arrays = self.source.example_arrays()[0]
        return self._compile(key, self.backend.compile_steps, function, state, arrays)

    def compile_evaluation(self, state: TrainState, split: str = "test") -> Executable:
        """Compiles the evaluation of the source's arrays of a split at the first call.

        It takes a state without the optimizer's, so one program serves all phases. Batches of a
        stream have one shape, so one program serves both splits.
        """
        state = state._replace(opt_state=())
        split = "test" if self.source.streamed else split
        arrays = self.source.evaluation_arrays(split)
        evaluate = partial(self._evaluate, split=split)
        if at_once := self._batches_at_once(split):
            evaluate = partial(self._evaluate_part, split=split, batches=at_once)
            arrays = next(self._evaluation_arrays(split))
        key = ("evaluation", split)
        return self._compile(key, self.backend.compile_measure, evaluate, state, arrays)

    def compile_diagnosis(
        self, state: TrainState, phase: int, function: Callable[[Context], Any] | None = None
    ) -> Executable:
        """Compiles a function of the next step's context at the first call.

        By default it returns the values of the config's diagnostics by name.
        """
        function = function or self._measure
        diagnose = partial(self._diagnose, phase=phase, function=function)
        key = ("diagnosis", phase, function)
        arrays = self.source.example_arrays()[0]
        return self._compile(key, self.backend.compile_measure, diagnose, state, arrays)

    def step_flops(self, state: TrainState, phase: int) -> int:
        """Counts the FLOPs of convolutions and matrix products in a step, on all devices."""
        arrays = self.source.example_arrays()[0]
        function = self.backend.compile_steps(partial(self._take_steps, phase=phase, steps=1))
        with as_written():
            program = jax.make_jaxpr(function)(state, arrays)
        return 2 * multiply_adds(program.jaxpr)

    def require_layers(self) -> None:
        """Traces the diagnostics if the config selects layers; compiles nothing.

        Raises:
          UserError: a pattern of `diagnostics.layers` matches no layer that is measured.
        """
        if self.config.diagnostics.every and layer_patterns(self.config.diagnostics):
            diagnose = partial(self._diagnose, phase=0, function=self._measure)
            arrays = self.source.example_arrays()[0]
            traced = self.backend.compile_measure(diagnose)
            jax.eval_shape(traced, self.init(self.config.seed), arrays)

    def _compile(
        self, key: Any, compile: Any, function: Any, state: TrainState, arrays: Any
    ) -> Executable:
        if key not in self._executables:
            self._executables[key] = compile_for(compile(function), state, arrays)
        return self._executables[key]

    def evaluate(
        self,
        state: TrainState,
        split: str = "test",
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Metrics:
        """Returns the sums of the metrics over a split, as `metric_values` takes them.

        The whole split is evaluated in evaluation mode, "train" without augmentation too.

        Args:
          state: with the variables.
          split: "train" or "test".
          interrupted: called between the dispatches of the evaluation.

        Raises:
          InterruptedEvaluationError: `interrupted` returned True.
        """
        call, divided = self.compile_evaluation(state, split).call, self._batches_at_once(split)
        state = state._replace(opt_state=())
        results: list[Metrics] = []
        for arrays in self._evaluation_arrays(split):
            if results and interrupted():
                raise InterruptedEvaluationError
            results.append(metrics := call(state, arrays))
            if self.source.streamed:  # the device computes while the next batch is decoded
                jax.block_until_ready(results[-2:-1])
            elif divided:
                jax.block_until_ready(metrics)
        if divided:
            return self._join_batches(results, split)
        return results[0] if len(results) == 1 else _sum_dispatches(results)

    def _evaluation_arrays(self, split: str) -> Iterator[Any]:
        """Yields the arrays of each dispatch of an evaluation."""
        arrays = self.source.evaluation(split)
        if not (at_once := self._batches_at_once(split)):
            yield from arrays
            return
        dataset = next(arrays)
        for first in range(0, self._eval_batches(split), at_once):
            yield dataset, self.backend.replicate(np.int32(first))

    def join_parts(self, parts: list[Metrics]) -> Metrics:
        """Returns the metrics of a line from those that its parts returned for each step.

        On CPU they are those of a single dispatch to the last bit.
        """
        stacked = _concatenate(parts)
        if not self.source.streamed:
            return _mean_of_steps()(stacked)
        steps = len(jax.tree.leaves(stacked)[0])
        return _sum_dispatches([jax.tree.map(itemgetter(i), stacked) for i in range(steps)])

    def metric_values(self, metrics: Metrics) -> dict[str, float]:
        """Returns the metrics by name, from what a dispatch or an evaluation returned.

        If the loss is not finite, no metric is a number: the class with the largest logit, for one,
        means nothing if the logits are NaN.
        """
        values: dict[str, float] = {}
        for name, value in jax.device_get(metrics).items():
            if name.endswith("sums"):
                prefix = name.removesuffix("sums")
                found = self.task.metrics(value)
                finite = math.isfinite(found["loss"])
                for metric, number in found.items():
                    values[prefix + metric] = float(number) if finite else math.nan
            else:
                values[name] = float(value)
        return dict(sorted(values.items()))

    @property
    def evaluated_splits(self) -> tuple[str, ...]:
        """The splits that the config evaluates during training, in this order."""
        return ("train", "test") if self.config.train.evaluate_train else ("test",)

    # How work is divided.

    @property
    def step_seconds(self) -> float:
        """An estimate of the time of one step."""
        return 3 * self._forward_seconds(self.config.data.batch_size)

    def _eval_batches(self, split: str) -> int:
        """Returns the number of batches in an evaluation of a resident split."""
        return -(-self.source.examples[split] // self.config.data.eval_batch_size)

    def _batches_at_once(self, split: str) -> int:
        """Returns how many batches of a split one dispatch evaluates; 0 if it evaluates all."""
        evaluations = 2 if self.config.optimizer.ema_decay else 1
        seconds = evaluations * self._forward_seconds(self.source.examples[split])
        batches = self._eval_batches(split)
        dispatches = min(math.ceil(seconds / SECONDS_AT_ONCE), batches)
        return 0 if self.source.streamed or dispatches == 1 else math.ceil(batches / dispatches)

    def _forward_seconds(self, images: int) -> float:
        macs, depth = self.counts.macs, self.config.model.depth or 0
        return forward_seconds(images, macs, depth, self.backend.devices)

    # Traced functions.

    def _init_state(self, key: Key[Array, ""]) -> TrainState:
        image = jnp.zeros((1, *self.image_shape))
        variables = dict(self._init_variables(jax.random.fold_in(key, 0), image))
        variables.setdefault("batch_stats", {})
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            opt_state=self._init_opt_state(variables["params"], phase=0),
            # A copy, because a buffer can be donated only once.
            ema=jax.tree.map(jnp.copy, variables) if self.config.optimizer.ema_decay else None,
            key=run_key(key),
            diverged=jnp.asarray(False),
        )

    def _init_opt_state(self, params: Any, *, phase: int) -> Any:
        program = self.programs[phase]
        return program.tx.init(split(params, program.trainable)[0])

    def _take_steps(
        self, state: TrainState, arrays: Any, *, phase: int, steps: int, part: bool = False
    ) -> tuple[TrainState, Metrics]:
        drawn = self.source.draw(arrays, order_key(state.key), state.step, steps)
        return step.take_steps(
            self.train_step(phase, arrays),
            state,
            drawn,
            per_step=part,
            # Vectors that are sharded would have to be gathered in each step.
            join_vectors=platform() != "cpu" and self.config.parallel.shard_parameters == 1,
        )

    def train_step(self, phase: int, arrays: Any) -> step.Step:
        """Returns the train step of a phase: (state, drawn batch, key) -> (state, output).

        Args:
          phase: a number.
          arrays: what the source yields for training, or tracers of it.
        """
        program = self.programs[phase]
        train_step = partial(
            step.train_step,
            model=program.model,
            task=self.task,
            tx=program.tx,
            trainable=program.trainable,
            gradients=self._gradients(phase, arrays),
        )
        averaged = step.with_ema(train_step, self.config.optimizer.ema_decay, program.changes)
        return step.apply_nonfinite_policy(averaged, self.config.train.nonfinite)

    def _gradients(self, phase: int, arrays: Any) -> step.ComputeGradients:
        parts = self.config.train.accumulation_steps

        def prepare(drawn: Any, keys: Key[Array, "n"], batch_key: Key[Array, ""]) -> Batch:
            batch = self.task.encode(self.source.train_batch(arrays, drawn))
            own_keys = self.backend.local_shard(keys)
            return augment(own_keys, batch_key, batch, self.statistics, self.augmentation)

        return step.accumulate(
            step.average_over_devices(
                step.compute_gradients, self.backend, self.programs[phase].updates_stats
            ),
            parts,
            self.config.data.batch_size // parts,
            prepare,
        )

    def _evaluate(self, state: TrainState, arrays: Any, *, split: str) -> Metrics:
        sums = partial(self._batch_sums, state, arrays, split=split)

        def body(total: Metrics, drawn: Any) -> tuple[Metrics, None]:
            return jax.tree.map(jnp.add, total, sums(drawn)), None

        draws = self.source.eval_draws(arrays, split)
        shapes = jax.eval_shape(sums, jax.tree.map(lambda stacked: stacked[0], draws))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = step.scan(body, zeros, draws)
        total = self.backend.sum(total)
        if self.source.streamed:  # the sums of one batch out of many
            return total
        return self._split_means(total, split)

    def _split_means(self, total: Metrics, split: str) -> Metrics:
        """Returns means instead of sums, to keep curves those of earlier versions to the bit."""
        return jax.tree.map(lambda value: value / self.source.examples[split], total)

    def _evaluate_part(
        self, state: TrainState, arrays: Any, *, split: str, batches: int
    ) -> Metrics:
        """Computes the sums of the metrics over each of `batches` batches.

        Examples after the last one of the split have weight 0.
        """
        dataset, first = arrays

        def body(carry: tuple[()], drawn: Any) -> tuple[tuple[()], Metrics]:
            return carry, self._batch_sums(state, dataset, drawn, split=split)

        draws = self.source.eval_draws(dataset, split)
        draws = draws[0] + draws.shape[1] * (first + jnp.arange(batches)[:, None])
        _, sums = step.scan(body, (), draws)
        return self.backend.sum(sums)

    def _join_batches(self, parts: list[Metrics], split: str) -> Metrics:
        """Sums the batches of `_evaluate_part` in the order in which `_evaluate` does."""
        total = jax.tree.map(lambda each: np.add.accumulate(each)[-1], _concatenate(parts))
        return self._compiled_split_means(total, split)

    @cached_property
    def _compiled_split_means(self) -> Any:
        """`_split_means`, compiled; only divided evaluations need it on its own."""
        return jax.jit(self._split_means, static_argnums=1, compiler_options=step_compile())

    def _batch_sums(self, state: TrainState, arrays: Any, drawn: Any, *, split: str) -> Metrics:
        """Computes the sums of the metrics over a batch, and those of the EMA if there is one."""
        batch = self.source.eval_batch(arrays, drawn, split)
        batch = {**batch, "image": normalize(batch["image"], self.statistics)}
        variables = {"sums": state.variables}
        if state.ema is not None:
            variables["ema_sums"] = state.ema
        return {
            name: step.eval_step(
                self.backend.gather_parameters(each), batch, model=self.model, task=self.task
            )
            for name, each in variables.items()
        }

    def _diagnose(
        self,
        state: TrainState,
        arrays: Any,
        *,
        phase: int,
        function: Callable[[Context], Any],
    ) -> Any:
        """Computes a function of the context of the next step, without taking it."""
        program = self.programs[phase]
        forward = function is self._measure and needs_forward(self.config.diagnostics)
        tapped = TappedModel(program.model, forward)
        probes, sums = tapped.zeros(state.variables, self.image_shape)
        drawn = self.source.draw(arrays, order_key(state.key), state.step, 1)
        computed = self._gradients(phase, arrays)(
            state._replace(
                params={**state.params, PROBES: probes},
                batch_stats={**state.batch_stats, FORWARD: sums},
            ),
            jax.tree.map(lambda stacked: stacked[0], drawn),
            step_key(state.key, state.step),
            model=tapped,
            task=self.task,
            trainable=lambda path: path.startswith(f"{PROBES}/") or program.trainable(path),
        )
        # The mean of the squared gradients of the parts' and devices' own mean losses; the share of
        # each loss in the mean loss of the batch is one over their number.
        parts = self.config.train.accumulation_steps
        losses = parts * self.backend.sum(1)
        squares = jax.tree.map(lambda square: square / losses, computed.params.pop(PROBES))
        recorded = {
            path: total / parts for path, total in computed.batch_stats.pop(FORWARD).items()
        }
        updates, _ = step.compute_updates(
            state, computed, task=self.task, tx=program.tx, trainable=program.trainable
        )
        context = Context(
            params=state.params,
            gradients=computed.params,
            updates=updates,
            batch_stats=computed.batch_stats,
            activation_gradients=norms(squares),
            forward=forward_values(recorded),
            loss=computed.loss,
        )
        return function(context)

    # Parts of the constructor.

    def _network(self, frozen: frozenset[str] = frozenset()) -> nn.Module:
        """Returns the network; `frozen` BN layers use their running statistics in training too."""
        options = self.backend.norm_options()
        if frozen:
            options["frozen"] = lambda path: "/".join(path) in frozen
        return build(self.config.model, head=self.task.head(), norm_options=options)

    def _require_targets(self) -> None:
        """Refuses a dataset without the task's targets, and augmentations that do not move them."""
        needed, offered = self.task.targets, self.source.targets
        if not {*needed} <= {*offered}:
            raise UserError(
                f"task.name={self.config.task.name} needs {' and '.join(needed)} for each image, "
                f"and {self.config.data.name} has only {', '.join(offered)}"
            )
        if "label" in self.task.targets:
            return
        for name in ("trivial_augment", "mixup", "cutmix"):
            if getattr(self.augmentation, name):
                raise UserError(
                    f"data.{name} moves or mixes images without their "
                    f"{' and '.join(self.task.targets)}; task.name={self.config.task.name} cannot "
                    "use it"
                )

    def _require_mixable_labels(self) -> None:
        """Refuses to mix images whose labels the task leaves as integers."""
        if not self.augmentation.mixes:
            return
        image = jax.ShapeDtypeStruct((2, *self.image_shape), jnp.uint8)
        batch = {"image": image, "label": jax.ShapeDtypeStruct((2,), jnp.int32)}
        label = jax.eval_shape(self.task.encode, batch)["label"]
        if not jnp.issubdtype(label.dtype, jnp.floating):
            raise UserError(
                f"data.mixup, data.cutmix: {self.config.task.name} has integer labels, which "
                "cannot be mixed; let its encode() return floating-point targets"
            )

    def _phase_program(
        self, number: int, paths: Mapping[str, Any], factors: Mapping[str, float]
    ) -> PhaseProgram:
        phase = self.phases[number]
        frozen = frozenset[str]()
        if self.config.transfer.frozen_norm == "eval":
            frozen = freezing.frozen_modules(paths, phase.trains)
        tx = make_optimizer(self.config, self.phases[: number + 1], factors)
        return PhaseProgram(
            model=self._network(frozen),
            tx=tx,
            trainable=phase.trains.__contains__,
            updates_stats=lambda path: path.rpartition("/")[0] not in frozen,
        )


class StepRunner:
    """Takes a run's steps: hands the arrays of its source to compiled dispatches."""

    def __init__(self, trainer: Trainer, seed: int, first_step: int):
        self._trainer = trainer
        self._source = trainer.source.training(seed, first_step)
        self.arrays = next(self._source)
        """The arrays of the next step."""
        self._before: Metrics | None = None  # the metrics of the previous part
        self._ready, self._slow = time.monotonic(), True

    def run(self, state: TrainState, dispatch: Dispatch) -> tuple[TrainState, Metrics]:
        """Takes the steps of a dispatch; returns the sums of their metrics. Donates `state`.

        At the return, at most one part is still running, and none if parts are slow.
        """
        steps_per_call = 1 if self._trainer.source.streamed else dispatch.steps
        call = self._trainer.compile_dispatch(state, dispatch).call
        results: list[Metrics] = []
        for _ in range(0, dispatch.steps, steps_per_call):
            state, metrics = call(state, self.arrays)
            results.append(metrics)
            self.arrays = next(self._source)  # while the step runs
            if len(results) > 1:  # or batches would pile up on the device
                jax.block_until_ready(results[-2])
        if dispatch.part:
            self._wait(results[0])
        return state, results[0] if len(results) == 1 else _sum_dispatches(results)

    def _wait(self, metrics: Metrics) -> None:
        """Waits for the part of these metrics if parts are slow, else for the previous part."""
        jax.block_until_ready(metrics if self._slow else self._before)
        now = time.monotonic()
        self._slow = now - self._ready > SLOW_SECONDS
        self._before, self._ready = metrics, now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()


SLOW_SECONDS = 0.5
"""Parts that take longer do not overlap, so that a signal waits for one of them and not for two."""


@jax.jit
def _sum_dispatches(results: list[Metrics]) -> Metrics:
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *results)
    return step.reduce_metrics(stacked, jnp.sum)


def _concatenate(parts: list[Metrics]) -> Metrics:
    """Returns the metrics of all parts on the host, along their first axis."""
    return jax.tree.map(lambda *each: np.concatenate(each), *jax.device_get(parts))


@lru_cache(maxsize=1)
def _mean_of_steps() -> Callable[[Metrics], Metrics]:
    """Returns the mean as a dispatch of all steps computes it; other options round it otherwise."""
    reduce = partial(step.reduce_metrics, reduce=jnp.mean)
    return jax.jit(reduce, compiler_options=step_compile())


def compile_for(function: Any, *arguments: Any) -> Executable:
    """Compiles a jitted function for arguments of these shapes, ahead of its first call."""
    start = time.monotonic()
    executable = function.lower(*arguments).compile(step_compile())
    seconds = time.monotonic() - start
    peak, memory = None, executable.memory_analysis()
    if memory is not None:
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    # `pmap` compiled on many hosts takes the arrays of all hosts; called as is, those of this host.
    local = jax.process_count() > 1 and jax.tree.leaves(arguments)[0].is_fully_addressable
    return Executable(function if local else executable, seconds, peak)


def trainer_for(config: Config) -> Trainer:
    """Returns the trainer of a config; those of the last two configs, seeds aside, are cached.

    Raises:
      UserError: data, devices or options do not allow the config.
    """
    return _cached_trainer(json.dumps(to_dict(replace(config, seed=0, track="")), sort_keys=True))


@lru_cache(maxsize=2)
def _cached_trainer(config: str) -> Trainer:
    return Trainer(from_dict(json.loads(config)))
