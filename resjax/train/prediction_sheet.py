"""Draws the predictions of a run beside the truth: `predictions.png`.

The picture shows the best and the worst of some test images, by the primary metric of each alone
and, among equal ones, by the loss. The average precision of an image, for example, is 1 whatever
objects are found of classes that the image does not have; the loss counts these.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from resjax.data.normalization import normalize
from resjax.data.pictures import draw_boxes, draw_mask
from resjax.disk import atomic_file
from resjax.tasks import Task
from resjax.train.state import TrainState
from resjax.train.trainer import Trainer

FILE = "predictions.png"
IMAGES = 64  # of the test split, spread evenly, from which the best and the worst are chosen
SHOWN = 4  # of each
MIN_SCORE = 0.5  # of the boxes that are drawn
CELL = 1.5  # inches


class Case(NamedTuple):
    """An image with its targets, its predictions, and its own primary metric and loss."""

    image: UInt8[np.ndarray, "h w c"]
    truth: dict[str, np.ndarray]
    found: dict[str, np.ndarray]
    value: float
    loss: float


def draws(task: Task) -> bool:
    """Returns whether `write_predictions` can draw the predictions of a task."""
    return type(task).predict is not Task.predict and "label" not in task.targets


def write_predictions(trainer: Trainer, state: TrainState, folder: Path) -> None:
    """Writes the picture to a run folder.

    Args:
      trainer: the trainer of the run, with a task for which `draws` is true.
      state: one replica of the state at the end of training.
      folder: the run folder.

    Raises:
      OSError: the folder cannot be written.
    """
    from matplotlib.figure import Figure  # takes half a second

    metric = trainer.task.primary
    sign = -1 if metric.lower_is_better else 1
    cases = sorted(find_cases(trainer, state), key=lambda case: (sign * case.value, -case.loss))
    count = min(SHOWN, len(cases) // 2)
    if not count:
        return
    columns = [*cases[: -count - 1 : -1], *cases[:count]]  # the best first
    size = CELL * len(columns), 2.45 * CELL
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    axes = figure.subplots(2, len(columns), squeeze=False)
    names = trainer.task.dataset.class_names
    for column, case in enumerate(columns):
        which = "best" if column < count else "worst"
        for row, targets in enumerate((case.truth, case.found)):
            cell = axes[row, column]
            cell.imshow(_drawn(case.image, targets, names), interpolation="nearest")
            cell.axis("off")
        axes[0, column].set_title(
            f"{which}: {metric.label} {metric.format(case.value)}", fontsize=7
        )
    for row, text in enumerate(("truth", "predicted")):
        axes[row, 0].text(
            -0.06, 0.5, text, rotation=90, va="center", ha="right", fontsize=8,
            transform=axes[row, 0].transAxes,
        )  # fmt: skip
    with atomic_file(folder / FILE) as file:
        figure.savefig(file, format="png")


def find_cases(trainer: Trainer, state: TrainState) -> list[Case]:
    """Returns some images of the test split with their predictions, if their metric is finite."""
    task, variables = trainer.task, state.ema or state.variables

    @jax.jit
    def predict(batch: Any) -> Any:
        images = normalize(batch["image"], trainer.statistics)
        outputs = trainer.model.apply(variables, images)
        single = jax.tree.map(lambda leaf: leaf[:, None], (outputs, {**batch, "image": images}))
        sums = jax.lax.map(lambda each: task.sums(*each), single)
        return task.predict(outputs, images.shape[1:3]), sums

    cases = []
    for batch in trainer.source.read("test", IMAGES):
        found, sums = jax.device_get(predict(batch))
        for index in np.flatnonzero(batch["weight"]):
            own = jax.tree.map(lambda leaf, i=index: leaf[i], sums)
            metrics = task.metrics(own)
            truth = {name: batch[name][index] for name in task.targets}
            predicted = {name: array[index] for name, array in found.items()}
            value, loss = metrics[task.primary.name], metrics["loss"]
            cases.append(Case(batch["image"][index], truth, predicted, value, loss))
    return [case for case in cases if np.isfinite(case.value)]


def _drawn(image: np.ndarray, targets: dict[str, np.ndarray], names: tuple[str, ...]) -> Any:
    if "mask" in targets:
        return draw_mask(image, targets["mask"], len(names))
    classes, scores = targets["classes"], targets.get("scores")
    if scores is not None:
        classes = np.where(scores >= MIN_SCORE, classes, 0)
    return draw_boxes(image, targets["boxes"], classes, names, scores)
