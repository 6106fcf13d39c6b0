"""The train step, a pure function, and its wrappers.

`train_step` needs nothing else in this file but `compute_gradients` and `compute_updates`. The
wrappers average gradients over parts of a batch or over devices, average the weights, handle losses
that are not finite, and take many steps per dispatch. `resjax.train.trainer` composes and compiles
them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Key

from resjax.tasks import Task
from resjax.tasks.base import Batch, Sums
from resjax.train.freezing import merge, split
from resjax.train.parallel import Backend
from resjax.train.state import TrainState, step_key
from resjax.xla.target import platform

Chooses = Callable[[str], bool]
"""A predicate on the path of a variable, such as `stage1/block1/Conv_0/kernel`."""


class Gradients(NamedTuple):
    """The results of a forward and a backward pass.

    Attributes:
      params: gradients of the mean loss; None for frozen parameters.
      batch_stats: running statistics after the batch.
      loss: mean loss of the batch.
      sums: sums of the task's metrics, as `Task.sums` returns them.
    """

    params: Any
    batch_stats: Any
    loss: Float[Array, ""]
    sums: Sums


ComputeGradients = Callable[..., Gradients]
"""A function with the parameters of `compute_gradients`."""


class StepOutput(NamedTuple):
    """The results of a step, besides the new state.

    Attributes:
      gradients: as `compute_gradients` returns them.
      sums: sums of the task's metrics; zero if the step was skipped.
      learning_rate: rate of this step, or None if the optimizer's state does not hold it.
      skipped: 1 if `train.nonfinite=skip` skipped the step, else 0; None under other policies.
    """

    gradients: Gradients
    sums: Sums
    learning_rate: Any = None
    skipped: Any = None


def compute_gradients(
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    *,
    model: nn.Module,
    task: Task,
    trainable: Chooses = lambda path: True,
) -> Gradients:
    """Computes the gradients of a batch.

    Args:
      state: parameters and running statistics.
      batch: `image` (n, h, w, c), normalized, and what the task needs.
      key: for dropout and stochastic depth.
      model: returns the task's outputs.
      task: loss and metrics.
      trainable: chooses parameters by path; the others have no gradient and cost no backward pass.
    """
    params, frozen = split(state.params, trainable)

    def loss_fn(params: Any) -> tuple[Array, Any]:
        outputs, updated = model.apply(
            {"params": merge(params, frozen), "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        sums = task.sums(outputs, batch)
        return task.loss(outputs, batch), (updated.get("batch_stats", {}), sums)

    (loss, (batch_stats, sums)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return Gradients(gradients, batch_stats, loss, sums)


def train_step(
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    *,
    model: nn.Module,
    task: Task,
    tx: optax.GradientTransformation,
    trainable: Chooses = lambda path: True,
    gradients: ComputeGradients = compute_gradients,
) -> tuple[TrainState, StepOutput]:
    """Takes one step of the optimizer.

    Args:
      state: before the step.
      batch, key, model, task, trainable: as in `compute_gradients`.
      tx: the optimizer. If its `update` takes extra arguments, it also receives the number of the
        step as `step`, and loss and primary metric of the batch as `value` and `metric` (the loss
        again, unless the task has sums of that name).
      gradients: `compute_gradients`, or a function that wraps it.

    Returns:
      The state after the step, and the step's output.
    """
    computed = gradients(state, batch, key, model=model, task=task, trainable=trainable)
    updates, opt_state = compute_updates(state, computed, task=task, tx=tx, trainable=trainable)
    params, frozen = split(state.params, trainable)
    new = state._replace(
        step=state.step + 1,
        params=merge(optax.apply_updates(params, updates), frozen),
        batch_stats=computed.batch_stats,
        opt_state=opt_state,
    )
    rates = [rate for _, rate in optax.tree.get_all_with_path(opt_state, "learning_rate")]
    return new, StepOutput(computed, computed.sums, *rates[-1:])


def compute_updates(
    state: TrainState,
    computed: Gradients,
    *,
    task: Task,
    tx: optax.GradientTransformation,
    trainable: Chooses,
) -> tuple[Any, Any]:
    """Returns what the optimizer adds to the trainable parameters, and its new state."""
    total, weight = computed.sums.get(task.primary.name, computed.sums["loss"])
    return optax.with_extra_args_support(tx).update(
        computed.params,
        state.opt_state,
        split(state.params, trainable)[0],
        step=state.step,
        value=computed.loss,
        metric=total.sum() / weight.sum(),
    )


def eval_step(variables: Any, batch: Batch, *, model: nn.Module, task: Task) -> Sums:
    """Returns the sums of the task's metrics over a batch, in evaluation mode.

    Args:
      variables: of the model.
      batch: `image` is (n, h, w, c), or (n, crops, h, w, c) to average the outputs over crops.
      model: returns the task's outputs.
      task: metrics.
    """
    images = batch["image"]
    leading = images.shape[:-3]
    outputs = model.apply(variables, images.reshape(-1, *images.shape[-3:]))
    outputs = jax.tree.map(lambda output: output.reshape(*leading, *output.shape[1:]), outputs)
    if len(leading) > 1:
        outputs = jax.tree.map(lambda output: output.mean(1), outputs)
    return task.sums(outputs, batch)


# Wrappers of `compute_gradients`.


def average_over_devices(
    compute: ComputeGradients, backend: Backend, updates_stats: Chooses
) -> ComputeGradients:
    """Averages what each device computed from its share of the batch.

    Args:
      compute: runs on every device, with a key of its own.
      backend: averages and sums over devices.
      updates_stats: chooses the running statistics that training changes. The others are not
        averaged, which could round them.
    """

    def averaged(state: TrainState, batch: Any, key: Key[Array, ""], **options: Any) -> Gradients:
        whole = state._replace(params=backend.gather_parameters(state.params))
        own = compute(whole, batch, backend.own_key(key), **options)
        moving, fixed = split(own.batch_stats, updates_stats)
        gradients = backend.gather_parameters(own.params)  # or the backward pass is sharded
        params, moving, loss = backend.mean((gradients, moving, own.loss))
        return Gradients(params, merge(moving, fixed), loss, backend.sum(own.sums))

    return averaged


Prepare = Callable[[Any, Key[Array, "n"], Key[Array, ""]], Batch]


def accumulate(
    compute: ComputeGradients, parts: int, part_size: int, prepare: Prepare
) -> ComputeGradients:
    """Averages gradients over equal parts of a batch, computed one after the other to save memory.

    Args:
      compute: computes the gradients of one part.
      parts: number of parts; the batch has them as its first axis.
      part_size: images per part, over all devices.
      prepare: looks up and augments the images of a part just before `compute` needs them. It
        receives the part, a key for each image, and a key for the whole batch.
    """

    def accumulated(
        state: TrainState, batch: Any, key: Key[Array, ""], **options: Any
    ) -> Gradients:
        image_key, dropout_key, batch_key = jax.random.split(key, 3)
        image_keys = jax.random.split(image_key, (parts, part_size))
        dropout_keys = jax.random.split(dropout_key, parts)

        def body(batch_stats: Any, part: Any) -> tuple[Any, Gradients]:
            arrays, keys, own_key = part
            prepared = prepare(arrays, keys, batch_key)
            current = state._replace(batch_stats=batch_stats)
            computed = compute(current, prepared, own_key, **options)
            return computed.batch_stats, computed._replace(batch_stats=())

        each = (batch, image_keys, dropout_keys)
        if parts == 1:  # a stacked mean would change how the compiler shards the gradients
            batch_stats, computed = body(state.batch_stats, jax.tree.map(lambda x: x[0], each))
            return computed._replace(batch_stats=batch_stats)
        batch_stats, results = lax.scan(body, state.batch_stats, each)
        means = jax.tree.map(lambda stacked: stacked.mean(0), results._replace(sums={}))
        sums = jax.tree.map(lambda stacked: stacked.sum(0), results.sums)
        return means._replace(batch_stats=batch_stats, sums=sums)

    return accumulated


# Wrappers of a bound `train_step`.

Step = Callable[[TrainState, Any, Key[Array, ""]], tuple[TrainState, StepOutput]]


def with_ema(step: Step, decay: float, changes: Chooses) -> Step:
    """Keeps an exponential moving average of parameters and running statistics in `state.ema`.

    Args:
      step: a step.
      decay: factor of the old average in each step; without one, 0, the step is returned as it is.
      changes: chooses the variables that training changes; the others stay equal bit by bit.
    """
    if not decay:
        return step

    def averaged(
        state: TrainState, batch: Any, key: Key[Array, ""]
    ) -> tuple[TrainState, StepOutput]:
        new, output = step(state, batch, key)
        average, fixed = split(state.ema, changes)
        current, _ = split(new.variables, changes)
        moved = optax.incremental_update(current, average, 1 - decay)
        return new._replace(ema=merge(moved, fixed)), output

    return averaged


def apply_nonfinite_policy(step: Step, policy: str) -> Step:
    """Guards the state against losses and gradients that are not finite.

    Args:
      step: a step.
      policy: "record" returns the step as it is. "stop" leaves the state, with its number of
        steps, unchanged from the first loss on that is not finite. "skip" leaves out steps whose
        loss or gradients are not finite, and counts them.
    """
    if policy == "record":
        return step

    def guarded(
        state: TrainState, batch: Any, key: Key[Array, ""]
    ) -> tuple[TrainState, StepOutput]:
        new, output = step(state, batch, key)
        finite = jnp.isfinite(output.gradients.loss) & ~state.diverged
        if policy == "skip":  # the norm costs a pass over the gradients
            finite &= jnp.isfinite(optax.tree.norm(output.gradients.params))
        if platform() not in ("cpu", "tpu"):
            finite = _read_from_array(finite)
        chosen = jax.tree.map(partial(jnp.where, finite), new, state)
        if policy == "stop":
            return chosen._replace(diverged=~finite), output
        counted = jax.tree.map(lambda value: jnp.where(finite, value, 0), output.sums)
        return chosen._replace(step=new.step), output._replace(sums=counted, skipped=1.0 - finite)

    return guarded


def _read_from_array(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """Returns the flag as an element of an array.

    Problem: XLA's compiler for GPUs updates filters of one shape in one kernel if the updates share
    an array, but not if they share only single numbers. Effect: 14 fewer kernels per step of
    ResNet-20, and more than 80 of ResNet-50, on an H100 (jax 0.10).
    """
    return lax.optimization_barrier(jnp.stack([flag, flag]))[0]


Metrics = Mapping[str, Any]
"""A dispatch returns `sums` of the task's metrics, and `learning_rate` and `skipped` if known; an
evaluation returns `sums`, and `ema_sums` if the state has an EMA."""


def take_steps(
    step: Step,
    state: TrainState,
    batches: Any,
    per_step: bool = False,
    join_vectors: bool = False,
) -> tuple[TrainState, Metrics]:
    """Takes as many steps as `batches` has along its first axis, in one scan.

    Args:
      step: a step.
      state: before the first step.
      batches: stacked along a first axis.
      per_step: whether to stack the metrics of the steps along a first axis.
      join_vectors: whether to use `scan_joined`.

    Returns:
      The new state; the metrics, averaged over the steps or stacked, with the last learning rate.
    """

    def body(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        state, output = step(state, batch, step_key(state.key, state.step))
        metrics = {
            "sums": output.sums,
            "learning_rate": output.learning_rate,
            "skipped": output.skipped,
        }
        return state, {name: value for name, value in metrics.items() if value is not None}

    state, stacked = (scan_joined if join_vectors else scan)(body, state, batches)
    return state, stacked if per_step else reduce_metrics(stacked, jnp.mean)


def reduce_metrics(stacked: Metrics, reduce: Callable[..., Array]) -> Metrics:
    """Reduces the metrics of several steps or dispatches along their first axis.

    Numerators and weights may be averaged as well as summed: only their ratio counts.
    """
    special = {"learning_rate": lambda rates: rates[-1], "skipped": jnp.mean}
    return {
        name: jax.tree.map(special.get(name, partial(reduce, axis=0)), value)
        for name, value in stacked.items()
    }


def scan(body: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    """`lax.scan`, without a loop for a single iteration: convolutions are slower in loops."""
    if len(jax.tree.leaves(xs)[0]) > 1:
        return lax.scan(body, carry, xs)
    carry, result = body(carry, jax.tree.map(lambda stacked: stacked[0], xs))
    return carry, jax.tree.map(lambda single: jnp.asarray(single)[None], result)


def scan_joined(body: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    """`scan` that joins all vectors of the carry into one between iterations, and all results.

    Problem: in a loop, XLA's compilers for accelerators compute each array of the carry in a kernel
    of its own, and a network has hundreds of scales, biases and running statistics; each result is
    stored by a kernel of its own, too. Effect: one kernel computes all vectors and one stores all
    results, and the values are the same. For ResNet-20 on an H100 this saves about 55 of 361
    kernels per step for the vectors, and 3 for the results (jax 0.10).
    """
    leaves, structure = jax.tree.flatten(carry)
    is_vector = [leaf.ndim == 1 and leaf.dtype == jnp.float32 for leaf in leaves]
    is_other = [not each for each in is_vector]
    _, split = ravel_pytree([*compress(leaves, is_vector)])
    split_results: Any = None

    def join(carry: Any) -> Any:
        leaves = jax.tree.leaves(carry)
        return ravel_pytree([*compress(leaves, is_vector)])[0], [*compress(leaves, is_other)]

    def restore(joined: Any) -> Any:
        vectors, others = iter(split(joined[0])), iter(joined[1])
        whole = (next(vectors if each else others) for each in is_vector)
        return jax.tree.unflatten(structure, whole)

    def joined_body(joined: Any, x: Any) -> tuple[Any, Any]:
        nonlocal split_results
        carry, y = body(restore(joined), x)
        results, split_results = ravel_pytree(y)
        return join(carry), results

    joined, stacked = scan(joined_body, join(carry), xs)
    return restore(joined), jax.vmap(split_results)(stacked)
