"""The interface of a task.

A metric is a ratio of two sums, so that it is exact over batches of any size and over devices: a
step returns the sums, which are added up, and `metrics` divides them once at the end. Losses and
metrics as functions of one context are Kauldron's idea, a loss and metrics function per task is
Scenic's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from resjax.run_files import Metric

__all__ = ["Batch", "DatasetInfo", "Metric", "Sums", "Task", "weighted_sum"]

Batch = dict[str, Array]
"""Arrays that share their first axis, the examples: `image`, `label`, and what a task adds."""

Sums = dict[str, tuple[Array, Array]]
"""By metric, the sum of its values over a batch and the sum of their weights."""


class DatasetInfo(NamedTuple):
    """The facts about a dataset that a task may depend on."""

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # height, width, channels


@dataclass(frozen=True)
class Task:
    """Base class of tasks.

    A task of your own is a frozen dataclass that derives from this one. Further fields are options,
    set by `task.options`; a TypeError or ValueError from `__post_init__` is reported in one line.

    Attributes:
      dataset: what the network is trained on.
      primary: the metric that chooses the best checkpoint and that progress, tables and figures
        show.
      targets: the entries of a batch that the dataset must have beside `image`.
    """

    dataset: DatasetInfo

    primary: ClassVar[Metric]
    targets: ClassVar[tuple[str, ...]] = ("label",)

    def head(self) -> nn.Module:
        """Returns the module from stage features to outputs.

        It takes a dict of features {"stem": (n, h, w, c), "stage1": ..., ...}, the last one at the
        lowest resolution. Fields called `conv`, `norm` and `act` whose value is None are bound to
        the network's own.
        """
        raise NotImplementedError

    def encode(self, batch: Batch) -> Batch:
        """Returns a training batch as augmentation takes it, before images are mixed.

        Mixup and CutMix average every floating-point array of the batch, so a task with integer
        labels turns them into floating-point targets here.
        """
        return batch

    def loss(self, outputs: Any, batch: Batch) -> Float[Array, ""]:
        """Returns the mean training loss of a batch, a scalar."""
        raise NotImplementedError

    def sums(self, outputs: Any, batch: Batch) -> Sums:
        """Returns a numerator and a weight for each metric over a batch, `loss` among them.

        Values are arrays of any fixed shape. In evaluation the batch has a `weight` (n,), which is
        0 for the examples that only fill the last batch; they must not count, even if their values
        are not finite. `weighted_sum` does this for metrics with one value per example.
        """
        raise NotImplementedError

    def predict(self, outputs: Any, image_size: Sequence[int]) -> dict[str, Array]:
        """Returns predictions by the names of the targets, for images of (height, width).

        Dense tasks define it; `resjax predict` writes what it returns.
        """
        raise NotImplementedError

    def metrics(self, sums: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        """Returns the metrics, `loss` and the primary one among them, from sums over all batches.

        The sums may all be scaled by the same factor. By default the ratio of each pair, which then
        has to be a pair of scalars, is one metric.
        """
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0: nothing was counted
            return {name: float(total / weight) for name, (total, weight) in sums.items()}


def weighted_sum(values: Float[Array, "n"], batch: Batch) -> tuple[Array, Array]:
    """Returns the sum of one value per example, and the number of examples that count."""
    weight = batch.get("weight")
    if weight is None:
        return values.sum(), jnp.asarray(len(values), jnp.float32)
    # Not a product: the value of a filling example may be infinite.
    return jnp.where(weight > 0, values, 0).sum(), weight.sum()
