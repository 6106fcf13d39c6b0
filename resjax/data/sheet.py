"""A contact sheet of training images and augmented versions of them, to look at before a run.

It shows an augmentation that is too strong, a wrong label or swapped channels at a glance.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resjax.data.augmentation import Augmentation, augment
from resjax.data.datasets import Split
from resjax.data.normalization import Statistics
from resjax.data.pictures import SMALLEST_SIDE, draw_boxes, draw_mask

EXAMPLES = 8  # even, because images are mixed in pairs
DRAWS = 7
CELL = 1.1  # inches
LARGEST_CELL = 512  # pixels of a cell with masks or boxes


class Sample(NamedTuple):
    """Training examples as training reads them."""

    originals: Split  # `EXAMPLES` of them
    crops: UInt8[np.ndarray, "draws n h w c"]  # `DRAWS` times the images, as training crops them
    class_names: Sequence[str]
    statistics: Statistics  # the normalization of training
    moved: Mapping[str, np.ndarray] = MappingProxyType({})  # masks and boxes of the crops


def choose(examples: int, seed: int) -> Int[np.ndarray, "n"]:
    """Returns the indices of `EXAMPLES` random examples; a small dataset repeats some."""
    return np.resize(np.random.default_rng(seed).permutation(examples), EXAMPLES)


def sheet(sample: Sample, augmentation: Augmentation, seed: int) -> Figure:
    """Draws one example per row: the original image, then `DRAWS` augmented versions.

    Normalization is undone for display, except that a subtracted mean image does not move with an
    augmented image. A column is one batch, so its images are mixed with the same share; the title
    of a mixed image lists its classes and their shares. Masks and boxes are drawn over the images.

    Args:
      sample: the examples.
      augmentation: of training, after the crops.
      seed: of the augmentation.
    """
    originals, crops, class_names, statistics, moved = sample
    dense = "label" not in originals.targets
    own = {} if dense else {"label": jax.nn.one_hot(originals.labels, len(class_names))}

    @jax.jit
    def augmented(key: Array, batch: dict[str, Array]) -> dict[str, Array]:
        batch_key, image_key = jax.random.split(key)
        keys = jax.random.split(image_key, EXAMPLES)
        batch = augment(keys, batch_key, batch | own, statistics, augmentation)
        image = jnp.clip(batch["image"] * statistics.std + statistics.mean, 0, 1)
        return batch | {"image": image}

    side = max(SMALLEST_SIDE, min(LARGEST_CELL, *originals.images.shape[1:3]))
    figure = Figure(
        figsize=(CELL * (1 + DRAWS), 1.2 * CELL * EXAMPLES),
        layout="constrained",
        dpi=1.1 * side / CELL if dense else 150,  # drawn names of classes can be read
    )
    axes = figure.subplots(EXAMPLES, 1 + DRAWS)
    for index, cell in enumerate(axes[:, 0]):
        title = "" if dense else class_names[originals.labels[index]]
        example = {name: array[index] for name, array in originals.arrays.items()}
        example["image"] = example["image"] / 255
        draw_image(cell, _overlaid(example, class_names), title)
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    for draw, (column, key) in enumerate(zip(axes[:, 1:].T, keys, strict=True)):
        batch = {"image": crops[draw], **{name: array[draw] for name, array in moved.items()}}
        drawn = jax.device_get(augmented(key, batch))
        for index, cell in enumerate(column):
            example = {name: array[index] for name, array in drawn.items()}
            title = shares(example["label"], class_names) if augmentation.mixes else ""
            draw_image(cell, _overlaid(example, class_names), title)
    return figure


def _overlaid(
    example: Mapping[str, np.ndarray], class_names: Sequence[str]
) -> Float[np.ndarray, "h w c"]:
    """Returns an image in [0, 1] with its mask or boxes drawn over it."""
    image = np.asarray(example["image"])
    if "mask" not in example and "boxes" not in example:
        return image
    picture = np.round(255 * image).astype(np.uint8)
    if "mask" in example:
        picture = draw_mask(picture, example["mask"], len(class_names))
    if "boxes" in example:
        picture = draw_boxes(picture, example["boxes"], example["classes"], class_names)
    return picture / 255


def draw_image(axes: Axes, image: Float[np.ndarray, "h w c"], title: str) -> None:
    """Draws an image with values in [0, 1] and 1 or 3 channels, without interpolation."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=7, parse_math=False)
    axes.axis("off")


def shares(target: Float[np.ndarray, "classes"], class_names: Sequence[str]) -> str:
    """Returns one line for each class of a mixed image, largest share first: "70% cat"."""
    order = sorted(np.flatnonzero(target).tolist(), key=lambda label: -target[label])
    return "\n".join(f"{target[label]:.0%} {class_names[label]}" for label in order)
