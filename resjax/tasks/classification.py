"""Image classification: softmax cross-entropy, and the top-1 error."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from resjax.errors import UserError
from resjax.models.heads import ClassificationHead
from resjax.tasks.base import Batch, Metric, Sums, Task, weighted_sum


@dataclass(frozen=True)
class Classification(Task):
    """One class per image.

    Labels are class indices (n,) in evaluation and probabilities (n, classes) in training, where
    mixed images have mixed labels.

    Attributes:
      label_smoothing: share of the training target that is spread evenly over all classes
        (Szegedy et al. 2016, arXiv 1512.00567).
    """

    label_smoothing: float = 0.0

    primary: ClassVar[Metric] = Metric("error", lower_is_better=True, unit="fraction")

    def __post_init__(self) -> None:
        if len(self.dataset.class_names) < 2:
            only = "".join(f", {name!r}" for name in self.dataset.class_names)
            raise UserError(f"the data have one class{only}; classification needs two or more")
        share = self.label_smoothing
        if not (isinstance(share, (int, float)) and 0 <= share < 1):
            raise ValueError(f"label_smoothing={share!r}: must be a number from 0 to below 1")

    def head(self) -> nn.Module:
        return ClassificationHead(len(self.dataset.class_names))

    def encode(self, batch: Batch) -> Batch:
        classes = len(self.dataset.class_names)
        return {**batch, "label": jax.nn.one_hot(batch["label"], classes)}

    def loss(self, outputs: Float[Array, "n classes"], batch: Batch) -> Float[Array, ""]:
        return self._cross_entropy(outputs, batch["label"]).mean()

    def sums(self, outputs: Float[Array, "n classes"], batch: Batch) -> Sums:
        label = batch["label"]
        error = top1_error(outputs, label) if label.ndim == 1 else soft_top1_error(outputs, label)
        values = {"loss": self._cross_entropy(outputs, label), "error": error}
        return {name: weighted_sum(value, batch) for name, value in values.items()}

    def _cross_entropy(self, logits: Array, label: Array) -> Float[Array, "n"]:
        if label.ndim == 1:
            return optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(label, self.label_smoothing))


def top1_error(logits: Float[Array, "n classes"], label: Array) -> Float[Array, "n"]:
    """Returns 0 where the most likely class is the label, and 1 where it is not or a logit is NaN.

    NaN is the maximum, so without this all images would belong to the class 0.
    """
    return (_any_nan(logits) | (logits.argmax(-1) != label)).astype(jnp.float32)


def soft_top1_error(
    logits: Float[Array, "n classes"], label: Float[Array, "n classes"]
) -> Float[Array, "n"]:
    """Returns the share of the target outside the most likely class, for mixed labels.

    It is 1 where a logit is NaN.
    """
    found = jnp.take_along_axis(label, logits.argmax(-1, keepdims=True), -1)[:, 0]
    return jnp.where(_any_nan(logits), 1, 1 - found)


def _any_nan(logits: Float[Array, "n classes"]) -> Bool[Array, "n"]:
    return jnp.isnan(logits).any(-1)
