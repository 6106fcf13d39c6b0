"""A contact sheet of training images and augmented versions of them, to look at before a run.

It shows an augmentation that is too strong, a wrong label or swapped channels at a glance.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resjax.data.augmentation import Augmentation, augment
from resjax.data.datasets import Split
from resjax.data.normalization import Statistics

EXAMPLES = 8  # even, because images are mixed in pairs
DRAWS = 7
CELL = 1.1  # inches


def sheet(
    split: Split,
    class_names: Sequence[str],
    statistics: Statistics,
    augmentation: Augmentation,
    seed: int,
) -> Figure:
    """Draws one example per row: the original image, then `DRAWS` augmented versions.

    Normalization is undone for display, except that a subtracted mean image does not move with an
    augmented image. A column is one batch, so its images are mixed with the same share; the title
    of a mixed image lists its classes and their shares.

    Args:
      split: the images and labels.
      class_names: by label.
      statistics: the normalization of training.
      augmentation: the augmentation of training.
      seed: selects the examples and seeds the augmentation.
    """
    order = np.random.default_rng(seed).permutation(len(split.labels))
    chosen = np.resize(order, EXAMPLES)
    images, labels = split.images[chosen], split.labels[chosen]
    targets = jax.nn.one_hot(labels, len(class_names))

    @jax.jit
    def augmented(key: Array) -> tuple[Array, Array]:
        batch_key, image_key = jax.random.split(key)
        keys = jax.random.split(image_key, EXAMPLES)
        batch = {"image": images, "label": targets}
        batch = augment(keys, batch_key, batch, statistics, augmentation)
        return jnp.clip(batch["image"] * statistics.std + statistics.mean, 0, 1), batch["label"]

    figure = Figure(
        figsize=(CELL * (1 + DRAWS), 1.2 * CELL * EXAMPLES), layout="constrained", dpi=150
    )
    axes = figure.subplots(EXAMPLES, 1 + DRAWS)
    for row, image, label in zip(axes[:, 0], images, labels, strict=True):
        draw_image(row, image / 255, class_names[label])
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    for column, key in zip(axes[:, 1:].T, keys, strict=True):
        for cell, image, target in zip(column, *jax.device_get(augmented(key)), strict=True):
            draw_image(cell, image, shares(target, class_names) if augmentation.mixes else "")
    return figure


def draw_image(axes: Axes, image: Float[np.ndarray, "h w c"], title: str) -> None:
    """Draws an image with values in [0, 1] and 1 or 3 channels, without interpolation."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=7)
    axes.axis("off")


def shares(target: Float[np.ndarray, "classes"], class_names: Sequence[str]) -> str:
    """Returns one line for each class of a mixed image, largest share first: "70% cat"."""
    order = sorted(np.flatnonzero(target).tolist(), key=lambda label: -target[label])
    return "\n".join(f"{target[label]:.0%} {class_names[label]}" for label in order)
