"""Regression of an angle: digit d stands for the angle 2 pi d / 10."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn

from resjax.tasks import Metric, Task
from resjax.tasks.base import weighted_sum


class AngleHead(nn.Module):
    """Maps the last stage to a unit vector."""

    @nn.compact
    def __call__(self, features):
        *_, last = features.values()
        vector = nn.Dense(2)(last.mean((1, 2)))
        return vector / jnp.linalg.norm(vector, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Angle(Task):
    power: float = 2.0

    primary: ClassVar[Metric] = Metric("angle", lower_is_better=True, unit="rad")

    def head(self):
        return AngleHead()

    def encode(self, batch):
        return {**batch, "label": self._unit(batch["label"])}

    def loss(self, outputs, batch):
        return self._distance(outputs, batch).mean()

    def sums(self, outputs, batch):
        target = self._target(batch)
        cosine = jnp.clip((outputs * target).sum(-1), -1, 1)
        values = {"loss": self._distance(outputs, batch), "angle": jnp.arccos(cosine)}
        return {name: weighted_sum(value, batch) for name, value in values.items()}

    def _distance(self, outputs, batch):
        return (jnp.abs(outputs - self._target(batch)) ** self.power).sum(-1)

    def _target(self, batch):
        label = batch["label"]
        return label if label.ndim == 2 else self._unit(label)

    def _unit(self, label):
        angle = 2 * jnp.pi * label / len(self.dataset.class_names)
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)


@dataclass(frozen=True)
class Cosine(Angle):
    """The same task, judged by the cosine of the angle, of which more is better."""

    primary: ClassVar[Metric] = Metric("cosine", lower_is_better=False)

    def sums(self, outputs, batch):
        cosine = (outputs * self._target(batch)).sum(-1)
        values = {"loss": self._distance(outputs, batch), "cosine": cosine}
        return {name: weighted_sum(value, batch) for name, value in values.items()}


@dataclass(frozen=True)
class IntegerLabels(Angle):
    """Leaves labels as they are, so images cannot be mixed."""

    def encode(self, batch):
        return batch
