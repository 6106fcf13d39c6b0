"""Object detection by RetinaNet: focal loss, box loss, and COCO's average precision.

Lin et al. 2017, arXiv 1708.02002, with the details of torchvision's RetinaNet.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int

from resjax.models.retinanet import RetinaNetHead
from resjax.tasks import boxes as box_math
from resjax.tasks.average_precision import Counts, average_precision, count
from resjax.tasks.base import Batch, Metric, Sums, Task, weighted_sum
from resjax.tasks.boxes import BETWEEN, Detections

Outputs = dict[str, list[Float[Array, "n h w anchors values"]]]

RATIOS = (0.5, 1.0, 2.0)
OCTAVE = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
STRIDES_PER_ANCHOR = 4
"""The smallest anchors of a level are so many times as large as its stride."""
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
BOX_LOSSES = ("l1", "giou")


@dataclass(frozen=True)
class Detection(Task):
    """Boxes and classes of the objects in an image.

    A batch has `boxes` (n, objects, 4), in pixels from the left and from the top, and their
    `classes` (n, objects), where 0 stands for no object and only fills the array. The primary
    metric, `ap`, is the average precision over all classes and the overlaps 0.50, 0.55, ..., 0.95;
    `ap50` that at an overlap of 0.5. They are evaluated on the test split only.

    Attributes:
      channels: of the feature pyramid and of the head.
      stages: how many of the network's last stages have a level of the pyramid; two coarser levels
        follow.
      coarse_from: "pyramid" or "backbone": see `resjax.models.pyramid.FeaturePyramid`.
      group_norm: whether the head has group norms.
      box_loss: "l1", of encoded boxes, or "giou" (Rezatofighi et al. 2019, arXiv 1902.09630).
    """

    channels: int = 256
    stages: int = 3
    coarse_from: str = "pyramid"
    group_norm: bool = False
    box_loss: str = "l1"

    primary: ClassVar[Metric] = Metric("ap", lower_is_better=False, unit="fraction")
    targets: ClassVar[tuple[str, ...]] = ("boxes", "classes")

    def __post_init__(self) -> None:
        for name, known in (("coarse_from", ("pyramid", "backbone")), ("box_loss", BOX_LOSSES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r}: must be {' or '.join(known)}")
        for name in ("channels", "stages"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number from 1 up")

    def head(self) -> nn.Module:
        return RetinaNetHead(
            len(self.dataset.class_names),
            len(RATIOS) * len(OCTAVE),
            self.channels,
            self.stages,
            self.coarse_from,
            self.group_norm,
        )

    def loss(self, outputs: Outputs, batch: Batch) -> Float[Array, ""]:
        return self._costs(outputs, batch).mean()

    def sums(self, outputs: Outputs, batch: Batch) -> Sums:
        sums: Sums = {"loss": weighted_sum(self._costs(outputs, batch), batch)}
        if "weight" not in batch:  # suppression takes longer than a step of a small network
            return sums
        counts = (batch["weight"] > 0)[:, None]
        found = self.detections(outputs, batch["image"].shape[1:3])
        found = found._replace(scores=jnp.where(counts, found.scores, 0))
        classes = jnp.where(counts, batch["classes"], 0)
        counted = count(found, batch["boxes"], classes, len(self.dataset.class_names))
        images = counts.sum(dtype=jnp.int32)
        return sums | {name: (value, images) for name, value in counted._asdict().items()}

    def predict(self, outputs: Outputs, image_size: Sequence[int]) -> dict[str, Array]:
        """Returns the `boxes`, `scores` and `classes` of the objects, by falling score."""
        return self.detections(outputs, image_size)._asdict()

    def metrics(self, sums: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        found = super().metrics({"loss": sums["loss"]})
        if "objects" in sums:
            counts = Counts(*(sums[name][0] / sums[name][1] for name in Counts._fields))
            precision = average_precision(counts)
            occur = np.asarray(counts.objects) > 0
            found["ap"] = float(precision[occur].mean()) if occur.any() else math.nan
            found["ap50"] = float(precision[occur, 0].mean()) if occur.any() else math.nan
        return found

    def detections(self, outputs: Outputs, image_size: Sequence[int]) -> Detections:
        """Returns the objects in each image from the head's outputs."""
        anchors = [jnp.asarray(level) for level in self.anchors(outputs, image_size)]

        def each(logits: list[Array], deltas: list[Array]) -> Detections:
            return box_math.postprocess(logits, deltas, anchors, image_size)

        return jax.vmap(each)(_by_anchor(outputs["class"]), _by_anchor(outputs["box"]))

    def anchors(
        self, outputs: Outputs, image_size: Sequence[int]
    ) -> list[Float[np.ndarray, "anchors 4"]]:
        """Returns the anchors of each level of the outputs."""
        grids = [level.shape[1:3] for level in outputs["class"]]
        # The last row may be cut, so the quotient is only near the stride, a power of two.
        finest = 2 ** max(round(math.log2(image_size[0] / grids[0][0])), 0)
        sizes = [
            [int(STRIDES_PER_ANCHOR * finest * 2**level * octave) for octave in OCTAVE]
            for level in range(len(grids))
        ]
        return box_math.anchors(image_size, grids, sizes, RATIOS)

    def _costs(self, outputs: Outputs, batch: Batch) -> Float[Array, "n"]:
        """Returns the loss of each image: the focal loss and the box loss, per matched anchor."""
        image_size = batch["image"].shape[1:3]
        anchors = jnp.concatenate(self.anchors(outputs, image_size))
        logits, deltas = (
            jnp.concatenate(_by_anchor(outputs[name]), 1) for name in ("class", "box")
        )

        def cost(logits: Array, deltas: Array, boxes: Array, classes: Array) -> Array:
            overlaps = box_math.overlap(boxes, anchors)
            matched = box_math.match(overlaps, classes > 0)
            objects = jnp.maximum((matched >= 0).sum(), 1)
            return (
                focal_loss(logits, classes, matched)
                + self._box_loss(deltas, boxes, matched, anchors)
            ) / objects

        return jax.vmap(cost)(logits, deltas, batch["boxes"], batch["classes"])

    def _box_loss(
        self,
        deltas: Float[Array, "anchors 4"],
        boxes: Float[Array, "objects 4"],
        matched: Int[Array, "anchors"],
        anchors: Float[Array, "anchors 4"],
    ) -> Float[Array, ""]:
        found = matched >= 0
        # Where nothing is matched, the anchor itself, whose logarithms and ratios are finite.
        wanted = jnp.where(found[:, None], boxes[jnp.maximum(matched, 0)], anchors)
        if self.box_loss == "l1":
            costs = jnp.abs(deltas - box_math.encode(wanted, anchors)).sum(-1)
        else:
            costs = giou_loss(box_math.decode(deltas, anchors), wanted)
        return jnp.where(found, costs, 0).sum()


def focal_loss(
    logits: Float[Array, "anchors classes"],
    classes: Int[Array, "objects"],
    matched: Int[Array, "anchors"],
) -> Float[Array, ""]:
    """Returns the sum of the focal loss over the anchors that are not between two thresholds."""
    wanted = jnp.where(matched >= 0, classes[jnp.maximum(matched, 0)], -1)
    target = jax.nn.one_hot(wanted, logits.shape[-1], dtype=logits.dtype)
    entropy = optax.sigmoid_binary_cross_entropy(logits, target)
    right = jax.nn.sigmoid(logits) * target + jax.nn.sigmoid(-logits) * (1 - target)
    share = FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)
    costs = share * (1 - right) ** FOCAL_GAMMA * entropy
    return jnp.where((matched != BETWEEN)[:, None], costs, 0).sum()


def giou_loss(
    found: Float[Array, "boxes 4"], wanted: Float[Array, "boxes 4"]
) -> Float[Array, "boxes"]:
    """Returns 1 minus the generalized overlap of each box with the one that is wanted."""
    epsilon = 1e-7  # torchvision's

    def sides(corner: Array, opposite: Array) -> Array:
        return jnp.prod(jnp.maximum(opposite - corner, 0), -1)

    shared = sides(
        jnp.maximum(found[:, :2], wanted[:, :2]), jnp.minimum(found[:, 2:], wanted[:, 2:])
    )
    union = box_math.area(found) + box_math.area(wanted) - shared
    hull = jnp.prod(
        jnp.maximum(found[:, 2:], wanted[:, 2:]) - jnp.minimum(found[:, :2], wanted[:, :2]), -1
    )
    return 1 - shared / (union + epsilon) + (hull - union) / (hull + epsilon)


def _by_anchor(levels: list[Float[Array, "n h w anchors values"]]) -> list[Array]:
    """Returns the values of each level as (n, h * w * anchors, values)."""
    return [level.reshape(level.shape[0], -1, level.shape[-1]) for level in levels]
