"""Trains on virtual CPU devices, spread over them in several ways.

This is a program of its own, because the number of devices is fixed when JAX first looks for them.
It reads a request, a line of JSON, and writes a line with the answer. Then it reads the folder of a
checkpoint that another process saved, and writes the losses after it.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.multihost_utils import process_allgather

from resjax.config import default_config, override, resolve
from resjax.data.ordering import batch_indices
from resjax.diagnostics import per_layer
from resjax.errors import UserError
from resjax.models.normalization import BatchNorm
from resjax.run_files import Metric
from resjax.train import parallel, trainer
from resjax.train.checkpoints import CheckpointManager
from resjax.train.distributed import Cluster, join
from resjax.train.trainer import Dispatch, StepRunner, Trainer
from resjax.xla.compile_options import quick_compile
from resjax.xla.convolution import NHWC, convolution

EXAMPLES = 75  # which eight devices cannot divide
PAIR = Dispatch(0, 2)
DRAWN = 16  # images of a batch whose draws are kept


def run(runner, trainer, state, steps):
    """Returns the state after some steps, and the losses: means of every two."""
    losses = []
    for _ in range(steps // 2):
        state, metrics = runner.run(state, PAIR)
        losses.append(trainer.metric_values(metrics)["loss"])
    return state, losses


def measure(trainer, state, folder):
    """Runs 20 steps; if there is a folder, saves the state after ten, and evaluates the last."""
    call = trainer.compile_dispatch(state, PAIR).call
    old, moved = state, None
    with StepRunner(trainer, 0, 0) as runner:
        try:
            with jax.transfer_guard("disallow"):
                state, metrics = call(state, runner.arrays)
        except jax.errors.JaxRuntimeError as error:
            moved = str(error)
            state, metrics = call(state, runner.arrays)
        donated = all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        state, until_saved = run(runner, trainer, state, 8)
        if folder:
            checkpoints = CheckpointManager(folder, Metric("error"))
            checkpoints.save(trainer.backend.unreplicate(state), 10, {"metrics": ""})
            checkpoints.close()
        state, after = run(runner, trainer, state, 10)
    return {
        "losses": [trainer.metric_values(metrics)["loss"], *until_saved, *after],
        "test": trainer.metric_values(trainer.evaluate(state)) if folder else {},
        "statistics": [
            np.asarray(leaf).ravel().tolist()
            for leaf in jax.tree.leaves(trainer.backend.unreplicate(state).batch_stats)
        ],
        "moved": moved,
        "donated": donated,
        "placed": [
            [list(leaf.shape), [list(shard.data.shape) for shard in leaf.addressable_shards]]
            for leaf in jax.tree.leaves((state.params, state.opt_state))
        ],
    }


def stream(trainer):
    """Returns the losses of six steps on a stream, means of every two, and the evaluation."""
    with StepRunner(trainer, 0, 0) as runner:
        state, losses = run(runner, trainer, trainer.init(0), 6)
    return {"losses": losses, "test": trainer.metric_values(trainer.evaluate(state))}


def diagnose(trainer, state):
    """Returns what the diagnostics of the config measure in the first step, by layer."""
    with StepRunner(trainer, 0, 0) as runner:
        found = trainer.compile_diagnosis(state, 0).call(state, runner.arrays)
    return {name: per_layer(values) for name, values in jax.device_get(found).items()}


class Draws(nn.Module):
    """Keeps what the dropout key draws, for each image and for all, as a running statistic."""

    classes: int
    backend: str

    @nn.compact
    def __call__(self, images, train=False):
        draws = self.variable("batch_stats", "draws", lambda: jnp.zeros((DRAWN, 2)))
        if train:
            key = self.make_rng("dropout")
            own = jax.random.uniform(key, (len(images), 1))
            own = jnp.concatenate([own, jnp.full_like(own, jax.random.uniform(key))], 1)
            gather = jax.lax.all_gather
            pmap = self.backend == "pmap"
            draws.value = gather(own, parallel.Pmap.AXIS, tiled=True) if pmap else own
        return nn.Dense(self.classes, name="head")(images.reshape(len(images), -1))


def dropout_draws(config):
    """Returns what the images of two steps draw, for each image and for all."""
    build, found = trainer.build, []
    trainer.build = lambda model, head, **_: Draws(head.features, config.parallel.backend)
    made = Trainer(config)
    trainer.build = build
    state = made.init(0)
    with StepRunner(made, 0, 0) as runner:
        for _ in range(2):
            state, _ = runner.run(state, Dispatch(0, 1))
            found += np.asarray(made.backend.unreplicate(state).batch_stats["draws"]).tolist()
    return found


def one_epoch(backend_name):
    """Returns the examples that the steps of an epoch gather, and how many one device holds."""
    config = configured({"parallel.backend": backend_name, "data.batch_size": 16})
    backend = parallel.make_backend(config)
    examples = backend.shard_dataset(np.arange(EXAMPLES, dtype=np.int32))
    steps = EXAMPLES // 16 + 1
    order = batch_indices(jax.random.key(0), jnp.int32(0), steps, 16, EXAMPLES)
    if backend_name == "jit":
        gather = jax.jit(backend.gather_batch)
    else:
        gather = jax.pmap(backend.gather_batch, backend.AXIS, in_axes=(0, None))
    batches = [
        process_allgather(gather(examples, indices), tiled=True) for indices in np.asarray(order)
    ]
    held = max(shard.data.size for shard in examples.addressable_shards)
    return {"gathered": np.concatenate(list(map(np.ravel, batches))).tolist(), "held": held}


def norm_error(backend_name):
    """Returns the largest error of BN over all devices, at a mean of 10,000 deviations."""
    images = np.random.default_rng(0).normal(1e4, 1, (16, 4, 4, 3)).astype(np.float32)
    backend = parallel.make_backend(configured({"parallel.backend": backend_name}))
    norm = BatchNorm(use_running_average=False, **backend.norm_options())
    variables = norm.init(jax.random.key(0), images)

    def normalize(images):
        return norm.apply(variables, images, mutable=["batch_stats"])[0]

    if backend_name == "jit":
        found = jax.jit(normalize)(backend.shard_dataset(images))
    else:
        found = jax.pmap(normalize, backend.AXIS)(backend.shard_dataset(images))
    exact = images.astype(np.float64) - images.mean((0, 1, 2), dtype=np.float64)
    exact /= np.sqrt((exact**2).mean((0, 1, 2)) + 1e-5)
    return float(np.abs(np.reshape(found, exact.shape) - exact).max())


def hessian_product_error(backend_name):
    """Returns the relative error of a product with the Hessian through BN over all devices."""
    rng = np.random.default_rng(0)
    images, kernel, direction = (
        rng.normal(size=size).astype(np.float32)
        for size in ((16, 4, 4, 3), (3, 3, 3, 2), (3, 3, 3, 2))
    )
    backend = parallel.make_backend(configured({"parallel.backend": backend_name}))

    def product(images, options):
        norm = BatchNorm(use_running_average=False, **options)
        variables = norm.init(jax.random.key(0), jnp.zeros((1, 1, 1, 2)))

        def loss(kernel):
            convolved = convolution(images, kernel, (1, 1), "SAME", dimension_numbers=NHWC)
            return (norm.apply(variables, convolved, mutable=["batch_stats"])[0] ** 4).mean()

        return jax.jvp(jax.grad(loss), (kernel,), (direction,))[1]

    def over_devices(images):
        return backend.mean(product(images, backend.norm_options()))

    compile_ = jax.jit if backend_name == "jit" else partial(jax.pmap, axis_name=backend.AXIS)
    found = np.reshape(compile_(over_devices)(backend.shard_dataset(images)), (-1, *kernel.shape))
    exact = jax.jit(partial(product, options={}))(images)
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def resume(trainer, state, folder):
    """Returns the losses of the last ten steps, from a checkpoint after the tenth."""
    checkpoints = CheckpointManager(folder, Metric("error"))
    saved = checkpoints.restore_latest(trainer.checkpoint_template(state)).state
    checkpoints.close()
    with StepRunner(trainer, 0, 10) as runner:
        return run(runner, trainer, trainer.backend.replicate(saved), 10)[1]


def refusal(config):
    try:
        parallel.make_backend(config)
    except UserError as error:
        return str(error)


def configured(overrides):
    return resolve(override(default_config(), overrides))


def main():
    request = json.loads(input())
    trainer.step_compile = quick_compile  # the programs run for a few steps
    jax.config.update("jax_num_cpu_devices", request["devices"])
    if request.get("cluster"):
        join(Cluster(*request["cluster"]))
    answer = {f"epoch of {name}": one_epoch(name) for name in request.get("epochs", ())}

    for name in request.get("norms", ()):
        answer[f"error of BN under {name}"] = norm_error(name)
        answer[f"error of a Hessian product under {name}"] = hessian_product_error(name)

    def configure(overrides):
        return configured(request["run"] | overrides)

    for way, overrides in request.get("streams", {}).items():
        answer[way] = stream(Trainer(configure(overrides)))
    refused = request.get("refused", {}).items()
    answer["refused"] = {case: refusal(configure(overrides)) for case, overrides in refused}
    for way, overrides in request.get("draws", {}).items():
        answer[f"draws, {way}"] = dropout_draws(configure(overrides | {"data.batch_size": DRAWN}))
    for way, overrides in request.get("diagnostics", {}).items():
        made = Trainer(configure(overrides))
        answer[f"diagnostics, {way}"] = diagnose(made, made.init(0))
    starts, saver = {}, None
    for way, overrides in request.get("ways", {}).items():
        made = Trainer(configure(overrides))
        # A run starts the same whatever BN and accumulation do.
        layout = made.config.parallel.shard_parameters, made.config.transfer.freeze
        if layout not in starts:
            starts[layout] = made.init(0)
        saves = way == request["saves"]
        if saves:
            saver = made, starts[layout]
        folder = Path(request["folder"]) if saves else None
        answer[way] = measure(made, jax.tree.map(jnp.copy, starts[layout]), folder)
    print(json.dumps(answer), flush=True)
    if saver:
        print(json.dumps(resume(*saver, Path(input()))), flush=True)


if __name__ == "__main__":
    main()
