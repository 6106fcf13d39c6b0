"""Trains both dense tasks in several ways on eight virtual devices; prints their losses as JSON."""

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from dense_training import RUN, TASKS, WAYS

from resjax.config import default_config, override, resolve
from resjax.train.trainer import Dispatch, StepRunner, Trainer
from resjax.xla.compilation_cache import enable_compilation_cache


def losses(fields):
    """Returns the training loss of each step and the test metrics after the last."""
    config = resolve(override(default_config(), fields))
    trainer = Trainer(config)
    state, found = trainer.start(0), []
    with StepRunner(trainer, 0, 0) as runner:
        for _ in range(config.train.steps):
            state, metrics = runner.run(state, Dispatch(0, 1))
            found.append(trainer.metric_values(metrics)["loss"])
    return found, trainer.metric_values(trainer.evaluate(state))


if __name__ == "__main__":
    enable_compilation_cache()
    results = {
        f"{task} {way}": losses({**RUN, **TASKS[task], **WAYS[way]})
        for task in sys.argv[1:]
        for way in WAYS
    }
    print(json.dumps({"devices": jax.device_count(), "results": results}))
