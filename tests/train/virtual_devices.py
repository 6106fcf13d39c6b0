"""Trains on virtual CPU devices, in several ways to spread a run over them.

A program of its own, because the number of devices is fixed when JAX first looks for them. It
speaks JSON, a line at a time: reads what to do and answers what came of it, then reads the folder
of another's checkpoints and answers how its own way goes on from there.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from resjax.config import default_config, override, resolve
from resjax.data.ordering import batch_indices
from resjax.errors import UserError
from resjax.run_files import Metric
from resjax.train import parallel
from resjax.train.checkpoints import CheckpointManager
from resjax.train.distributed import Cluster, join
from resjax.train.step import Program

EPOCH = 75  # examples, which eight devices cannot divide


def take(program, state, steps):
    """The state after so many steps, and the losses: means of every two."""
    losses = []
    for _ in range(steps // 2):
        state, metrics = program.steps(state, 2)
        losses.append(float(metrics["loss"]))
    return state, losses


def measure(program, state, folder):
    """A run of 20 steps; where there is a folder, saved at the tenth, and evaluated."""
    program.compiled(state, 2)
    old, moved = state, None
    try:
        with jax.transfer_guard("disallow"):
            state, metrics = program.steps(state, 2)
    except jax.errors.JaxRuntimeError as error:
        moved = str(error)
        state, metrics = program.steps(state, 2)
    donated = all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    state, until_saved = take(program, state, 8)
    if folder:
        checkpoints = CheckpointManager(folder, Metric("error"))
        checkpoints.save(program.backend.one(state), 10, {"metrics": ""})
        checkpoints.close()
    state, after = take(program, state, 10)
    test = program.evaluate(state) if folder else {}
    return {
        "losses": [float(metrics["loss"]), *until_saved, *after],
        "test": {name: float(value) for name, value in test.items()},
        "moved": moved,
        "donated": donated,
        "placed": [
            [list(leaf.shape), [list(shard.data.shape) for shard in leaf.addressable_shards]]
            for leaf in jax.tree.leaves((state.params, state.optimizer))
        ],
    }


def stream(program):
    """The losses of six steps on a stream, means of every two, and the evaluation."""
    state = program.init(0)
    with program.feed(0, 0) as feed:
        losses = []
        for _ in range(3):
            state, metrics = feed.steps(state, 2)
            losses.append(float(metrics["loss"]))
    test = {name: float(value) for name, value in program.evaluate(state).items()}
    return {"losses": losses, "test": test}


def one_epoch(way):
    """The rows that an epoch's steps take, each its number, and how many one device holds."""
    backend = parallel.backend(configured({"parallel.backend": way, "data.batch_size": 16}))
    rows = backend.rows(np.arange(EPOCH, dtype=np.int32))
    steps = EPOCH // 16 + 1
    order = batch_indices(jax.random.key(0), jnp.int32(0), steps, 16, EPOCH)
    if way == "jit":
        take = jax.jit(backend.take)
    else:
        take = jax.pmap(backend.take, backend.AXIS, in_axes=(0, None))
    taken = [process_allgather(take(rows, chosen), tiled=True) for chosen in np.asarray(order)]
    held = max(shard.data.size for shard in rows.addressable_shards)
    return {"taken": np.concatenate(list(map(np.ravel, taken))).tolist(), "held": held}


def resume(program, state, folder):
    """The losses of the last ten steps, from a checkpoint of the tenth."""
    checkpoints = CheckpointManager(folder, Metric("error"))
    saved = checkpoints.restore_latest(program.saved(state)).state
    checkpoints.close()
    return take(program, program.backend.spread(saved), 10)[1]


def refusal(config):
    try:
        parallel.backend(config)
    except UserError as error:
        return str(error)


def configured(overrides):
    return resolve(override(default_config(), overrides))


def main():
    asked = json.loads(input())
    jax.config.update("jax_num_cpu_devices", asked["devices"])
    if asked.get("cluster"):
        join(Cluster(*asked["cluster"]))
    answer = {f"epoch of {way}": one_epoch(way) for way in asked.get("epochs", ())}

    def configure(overrides):
        return configured(asked["run"] | overrides)

    for way, overrides in asked.get("streams", {}).items():
        answer[way] = stream(Program(configure(overrides)))
    refused = asked.get("refused", {}).items()
    answer["refused"] = {case: refusal(configure(overrides)) for case, overrides in refused}
    starts, saver = {}, None
    for way, overrides in asked.get("ways", {}).items():
        program = Program(configure(overrides))
        # Whatever BN and accumulation do, a run starts alike.
        layout = program.config.parallel.shard_parameters, program.config.transfer.freeze
        if layout not in starts:
            starts[layout] = program.init(0)
        saves = way == asked["saves"]
        if saves:
            saver = program, starts[layout]
        folder = Path(asked["folder"]) if saves else None
        answer[way] = measure(program, jax.tree.map(jnp.copy, starts[layout]), folder)
    print(json.dumps(answer), flush=True)
    if saver:
        print(json.dumps(resume(*saver, Path(input()))), flush=True)


if __name__ == "__main__":
    main()
