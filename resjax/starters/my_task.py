"""A task of my own: class k of n stands for the angle 2 pi k / n, which the network predicts.

    python -m pytest test_my_task.py
    resjax train --config=quickstart --config.task.name=my_task:MyTask --workdir=runs/my_task

`python -m pydoc resjax.tasks.Task` explains the members. A metric is a ratio of two sums, which
add up over batches and devices; the primary one selects the best checkpoint.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn

from resjax.tasks import Metric, Task, weighted_sum


class UnitVector(nn.Module):
    @nn.compact
    def __call__(self, features):  # {"stem": (n, h, w, c), "stage1": ..., ...}
        vector = nn.Dense(2)(features["stage3"].mean((1, 2)))
        return vector / jnp.linalg.norm(vector, axis=-1, keepdims=True)


@dataclass(frozen=True)
class MyTask(Task):
    """Regression of an angle; fields of the class are options: --config.task.options.NAME=VALUE."""

    primary = Metric("angle", lower_is_better=True, unit="rad")

    def head(self):
        return UnitVector()

    def loss(self, outputs, batch):
        return (1 - self._cosine(outputs, batch)).mean()

    def sums(self, outputs, batch):
        cosine = self._cosine(outputs, batch)
        angle = jnp.arccos(jnp.clip(cosine, -1, 1))
        return {"loss": weighted_sum(1 - cosine, batch), "angle": weighted_sum(angle, batch)}

    def _cosine(self, outputs, batch):
        angle = 2 * jnp.pi * batch["label"] / len(self.dataset.class_names)
        return outputs[:, 0] * jnp.cos(angle) + outputs[:, 1] * jnp.sin(angle)
