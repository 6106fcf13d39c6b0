"""Code of a user who checks types: `mypy --strict` must accept it (tests/test_wheel.py)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pandas as pd
from flax import linen as nn
from matplotlib.figure import Figure

import resjax
from resjax.analysis import figures as draw
from resjax.analysis.claims import Claim, compare
from resjax.config import load, override, resolve
from resjax.diagnostics import Context
from resjax.models.blocks import Block
from resjax.models.conformance import check_block
from resjax.models.shortcuts import Shortcut, pad
from resjax.sweeps import param, product
from resjax.tasks import DatasetInfo, Metric, Task, weighted_sum
from resjax.tasks.base import Batch, Sums


class MyBlock(Block):
    layers: ClassVar[int] = 1

    start: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(last=True)(self.conv(self.features, 3, self.strides)(x))
        scale = self.param("scale", nn.initializers.constant(self.start), ())
        return self.act(scale * y + self.shortcut(self.features, self.strides)(x))


class MyShortcut(Shortcut):
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm()(2 * pad(x, self.features, self.strides))


class Head(nn.Module):
    @nn.compact
    def __call__(self, features: dict[str, jax.Array]) -> jax.Array:
        return nn.Dense(2)(features["stage3"].mean((1, 2)))


@dataclass(frozen=True)
class MyTask(Task):
    power: float = 1.0

    primary: ClassVar[Metric] = Metric("distance", lower_is_better=True)

    def head(self) -> nn.Module:
        return Head()

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        return self._distance(outputs, batch).mean()

    def sums(self, outputs: jax.Array, batch: Batch) -> Sums:
        distance = weighted_sum(self._distance(outputs, batch), batch)
        return {"loss": distance, "distance": distance}

    def _distance(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        return jnp.abs(outputs[:, 0] - batch["label"]) ** self.power


def my_diagnostic(context: Context) -> Mapping[str, jax.Array]:
    return context.per_array(jnp.linalg.norm, context.gradients)


def sweep(depths: tuple[int, ...] = (20, 56)) -> Iterator[dict[str, Any]]:
    yield from product(param("model.depth", depths), param("seed", (0, 1, 2)))


@draw.style()
def figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    return {"curves": draw.metric_curves(curves, panel="model.block", series="model.depth")}


def claims(runs: pd.DataFrame) -> list[Claim]:
    deep, shallow = {"model.depth": 56}, {"model.depth": 20}
    claim = compare(
        runs, "", "", "", value="test_error", treatment=deep, control=shallow, expected="lower"
    )
    return [claim]


def in_a_notebook() -> tuple[int, int, str]:
    model = resjax.build("cifar_resnet20", block="my_blocks:MyBlock")
    images = jnp.zeros((1, 32, 32, 3))
    variables = model.init(jax.random.key(0), images)
    logits = model.apply(variables, images)
    counts = resjax.count(model, (32, 32, 3))
    tables: list[pd.DataFrame] = [resjax.load_runs("runs"), resjax.load_curves("runs")]
    pretrained, weights = resjax.load_pretrained("runs/one")
    held: list[str] = check_block("my_blocks:MyBlock")
    task = MyTask(DatasetInfo(("a", "b"), (8, 8, 1)), power=2.0)
    config = resolve(override(load("quickstart"), {"model.depth": 8}))
    print(logits, tables, pretrained.feature_strides["stage1"], weights, held, task.primary.name)
    return counts.parameters + counts.macs, config.train.steps, resjax.__version__
