"""Two networks that train in no time: a narrow ResNet-8, and one whose gradient is simple."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import jax.numpy as jnp
import pytest
from flax import linen as nn

from resjax.config import Config, default_config, override, resolve
from resjax.train import trainer as trainers
from resjax.train.state import TrainState
from resjax.train.trainer import Dispatch, Trainer

# Ten steps in dispatches of 3, 3, 3 and 1; everything that can be random is random.
SMALLEST = {
    "model.family": "cifar",
    "model.depth": 8,
    "model.width": 4,
    "model.stochastic_depth": 0.2,
    "data.batch_size": 16,
    "data.crop_padding": 1,
    "data.flip": True,
    "train.steps": 10,
    "train.log_every": 3,
    "train.eval_every": 6,
    "train.checkpoint_every": 6,
}
UNAUGMENTED = {"data.crop_padding": 0, "data.flip": False}

Configure = Callable[..., Config]
StartPython = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="session")
def configure() -> Configure:
    """A function from overrides to the config of the smallest run."""

    def configure(overrides: Mapping[str, Any] | None = None) -> Config:
        return resolve(override(default_config(), SMALLEST | dict(overrides or {})))

    return configure


@pytest.fixture
def start_python() -> Iterator[StartPython]:
    """A function from arguments of Python to its process, which is killed when the test ends."""
    processes = []

    def start(*arguments: Any) -> subprocess.Popen[str]:
        command = [sys.executable, *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, text=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


class Regression(nn.Module):
    """Softmax regression, and a running statistic that counts the training batches."""

    classes: int

    @nn.compact
    def __call__(self, images, train=False):
        batches = self.variable("batch_stats", "batches", jnp.zeros, ())
        if train:
            batches.value += 1
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.1), name="head")(
            images.reshape(len(images), -1)
        )


@pytest.fixture
def with_network(configure, monkeypatch) -> Callable[..., Trainer]:
    """A function from a network's class and overrides to a trainer on unaugmented images.

    The class is called with the number of classes. Until the test ends, runs train it too.
    """

    def make(network: Callable[[int], nn.Module], **overrides: Any) -> Trainer:
        cached = lru_cache(maxsize=2)(trainers._cached_trainer.__wrapped__)
        monkeypatch.setattr(trainers, "_cached_trainer", cached)
        monkeypatch.setattr(trainers, "build", lambda model, head, **_: network(head.features))
        return Trainer(configure(UNAUGMENTED | overrides))

    return make


@pytest.fixture
def regression(with_network) -> Callable[..., Trainer]:
    """A function from overrides to a trainer of softmax regression on unaugmented images.

    Until the test ends, runs train softmax regression too.
    """
    with_network(Regression)
    return partial(with_network, Regression)


@pytest.fixture(scope="session")
def run_steps() -> Callable[..., tuple[TrainState, dict[str, float]]]:
    """A function that takes steps in one dispatch, and returns the state and metrics by name."""

    def run(trainer: Trainer, state: TrainState, steps: int, phase: int = 0) -> Any:
        arrays, _ = trainer.source.example_arrays()
        state, metrics = trainer.compile_dispatch(state, Dispatch(phase, steps)).call(state, arrays)
        return state, trainer.metric_values(metrics)

    return run
