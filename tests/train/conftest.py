"""Two networks that train in no time: a narrow ResNet-8, and one whose gradient is simple."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import pytest
from flax import linen as nn

from resjax.config import Config, default_config, override, resolve
from resjax.train.step import Program

# Ten steps in dispatches of 3, 3, 3 and 1; whatever can be random is.
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


@pytest.fixture(scope="session")
def configure() -> Configure:
    """A function from overrides to the config of the smallest run."""

    def configure(overrides: Mapping[str, Any] | None = None) -> Config:
        return resolve(override(default_config(), SMALLEST | dict(overrides or {})))

    return configure


class Regression(nn.Module):
    """Softmax regression, and statistics that count the batches that were trained on."""

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
def regression(configure, monkeypatch) -> Callable[..., Program]:
    """A function from overrides to a program that trains softmax regression on plain images."""
    monkeypatch.setattr(
        "resjax.train.step.build", lambda model, classes, **_: Regression(classes=classes)
    )
    return lambda **overrides: Program(configure(UNAUGMENTED | dict(overrides)))
