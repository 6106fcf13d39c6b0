"""A sheet of training images beside what augmentation makes of them.

To be looked at before a run: too strong an augmentation, a wrong label or a swapped channel is seen
here at once, and in a curve perhaps never.
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
from resjax.data.resident import Statistics

EXAMPLES = 8  # even, because images mix in pairs
DRAWS = 7
CELL = 1.1  # inches


def sheet(
    split: Split,
    class_names: Sequence[str],
    statistics: Statistics,
    asked: Augmentation,
    seed: int,
) -> Figure:
    """Draws some examples of a split, a row each: the image, then how training may see it.

    What normalisation did is undone, but a mean image stays where it lay when the image moves. A
    column is one batch, so its images mix by one share; a mixed image tells the shares of both
    classes.

    Args:
      split: whose images to show.
      class_names: by label.
      statistics: as training normalises.
      asked: what training does to the images.
      seed: draws the examples and their augmentation.
    """
    order = np.random.default_rng(seed).permutation(len(split.labels))
    chosen = np.resize(order, EXAMPLES)
    images, labels = split.images[chosen], split.labels[chosen]
    targets = jax.nn.one_hot(labels, len(class_names))

    @jax.jit
    def drawn(key: Array) -> tuple[Array, Array]:
        batch_key, image_key = jax.random.split(key)
        keys = jax.random.split(image_key, EXAMPLES)
        seen, mixed = augment(keys, batch_key, images, targets, statistics, asked)
        return jnp.clip(seen * statistics.std + statistics.mean, 0, 1), mixed

    figure = Figure(
        figsize=(CELL * (1 + DRAWS), 1.2 * CELL * EXAMPLES), layout="constrained", dpi=150
    )
    axes = figure.subplots(EXAMPLES, 1 + DRAWS)
    for row, image, label in zip(axes[:, 0], images, labels, strict=True):
        draw_image(row, image / 255, class_names[label])
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    for column, key in zip(axes[:, 1:].T, keys, strict=True):
        for cell, image, target in zip(column, *jax.device_get(drawn(key)), strict=True):
            draw_image(cell, image, told(target, class_names) if asked.mixes else "")
    return figure


def draw_image(axes: Axes, image: Float[np.ndarray, "h w c"], title: str) -> None:
    """Shows an image whose values are in [0, 1], of 1 channel or 3, pixel by pixel."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=7)
    axes.axis("off")


def told(target: Float[np.ndarray, "classes"], class_names: Sequence[str]) -> str:
    """The classes of a mixed image with their shares, a line each, the larger first."""
    order = sorted(np.flatnonzero(target).tolist(), key=lambda label: -target[label])
    return "\n".join(f"{target[label]:.0%} {class_names[label]}" for label in order)
