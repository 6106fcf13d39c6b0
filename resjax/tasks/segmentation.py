"""Semantic segmentation: a class for every pixel, softmax cross-entropy and the mean IoU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int

from resjax.data.examples import VOID
from resjax.models.segmentation import DECODERS, SegmentationHead, enlarge
from resjax.tasks.base import Batch, Metric, Sums, Task

Outputs = dict[str, Float[Array, "n h w classes"]]


@dataclass(frozen=True)
class Segmentation(Task):
    """One class per pixel.

    A batch has a `mask` (n, height, width) of class indices; its void pixels, 255, do not count.
    Logits are enlarged bilinearly to its size. The mean IoU is the mean, over the classes that
    occur in the masks or in the predictions, of the pixels that both give a class, divided by those
    that either does; it is computed from one confusion matrix over the whole split. `accuracy` is
    the share of pixels whose class is right.

    Attributes:
      decoder: "unet", "fcn" or "deeplabv3".
      auxiliary_weight: weight of the loss of an FCN on the last stage but one; 0 has none.
        torchvision's models have 0.5.
    """

    decoder: str = "unet"
    auxiliary_weight: float = 0.0

    primary: ClassVar[Metric] = Metric("miou", lower_is_better=False, unit="fraction")
    targets: ClassVar[tuple[str, ...]] = ("mask",)

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            known = ", ".join(DECODERS)
            raise ValueError(f"decoder={self.decoder!r}: there is no such decoder; known: {known}")
        weight = self.auxiliary_weight
        if not (isinstance(weight, (int, float)) and weight >= 0):
            raise ValueError(f"auxiliary_weight={weight!r}: must be a number of at least 0")

    def head(self) -> nn.Module:
        return SegmentationHead(self._classes, self.decoder, self.auxiliary_weight > 0)

    def loss(self, outputs: Outputs, batch: Batch) -> Float[Array, ""]:
        total = jnp.zeros(())
        for name, weight in (("out", 1.0), ("aux", self.auxiliary_weight)):
            if weight:
                costs, pixels = self._cross_entropy(outputs[name], batch)
                total += weight * costs / jnp.maximum(pixels, 1)
        return total

    def sums(self, outputs: Outputs, batch: Batch) -> Sums:
        mask = _counted(batch)
        found = enlarge(outputs["out"], mask.shape[1:]).argmax(-1)
        pairs = jnp.where(mask == VOID, self._classes**2, mask * self._classes + found)
        # Integers, since float32 counts no further than 2^24 pixels.
        confusion = jnp.bincount(pairs.ravel(), length=self._classes**2)
        return {
            "loss": self._cross_entropy(outputs["out"], batch),
            "confusion": (
                confusion.reshape(self._classes, self._classes).astype(jnp.int32),
                _images(batch),
            ),
        }

    def predict(self, outputs: Outputs, image_size: Sequence[int]) -> dict[str, Array]:
        """Returns the most likely class of each pixel: `mask` (n, height, width)."""
        return {"mask": enlarge(outputs["out"], image_size).argmax(-1).astype(jnp.uint8)}

    def metrics(self, sums: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        confusion = np.asarray(sums["confusion"][0], np.float64)  # true class, predicted class
        right = np.diag(confusion)
        union = confusion.sum(0) + confusion.sum(1) - right
        occurs = union > 0
        with np.errstate(invalid="ignore"):  # 0 / 0: no pixel was counted
            return {
                "loss": float(sums["loss"][0] / sums["loss"][1]),
                "miou": float((right[occurs] / union[occurs]).sum() / np.float64(occurs.sum())),
                "accuracy": float(right.sum() / confusion.sum()),
            }

    @property
    def _classes(self) -> int:
        return len(self.dataset.class_names)

    def _cross_entropy(
        self, logits: Float[Array, "n h w classes"], batch: Batch
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the sum of the cross-entropy over the pixels that count, and their number."""
        mask = _counted(batch)
        counts = mask != VOID
        costs = optax.softmax_cross_entropy_with_integer_labels(
            enlarge(logits, mask.shape[1:]), jnp.where(counts, mask, 0)
        )
        return jnp.where(counts, costs, 0).sum(), counts.sum().astype(jnp.float32)


def _images(batch: Batch) -> Int[Array, ""]:
    """Returns the number of examples that count."""
    weight = batch.get("weight")
    number = jnp.asarray(len(batch["mask"])) if weight is None else (weight > 0).sum()
    return number.astype(jnp.int32)


def _counted(batch: Batch) -> Int[Array, "n h w"]:
    """Returns the masks; those of examples of weight 0 are void."""
    mask = batch["mask"].astype(jnp.int32)
    if (weight := batch.get("weight")) is None:
        return mask
    return jnp.where(weight[:, None, None] > 0, mask, VOID)
