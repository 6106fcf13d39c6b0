"""Transfer: pretrained weights help, and they help more with fewer examples

Kornblith et al. 2018 (Do Better ImageNet Models Transfer Better?, arXiv 1805.08974) train networks
from scratch, train classifiers on frozen pretrained features, and fine-tune whole pretrained
networks. With few examples, fine-tuned networks are far better than networks trained from scratch,
and their advantage shrinks as the number of examples grows. Howard & Ruder 2018 (arXiv 1801.06146)
thaw a pretrained network gradually, starting at the head.

The sweep compares all four methods with a network that was pretrained on one half of
Fashion-MNIST's classes. It learns the other half, and handwritten digits, from 5, 20 and 100
examples per class and from all examples. Each seed draws its own examples. For a given number of
examples all methods train for the same number of steps.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.runs import primary_metrics, summarize
from resjax.run_files import Metric
from resjax.sweeps import param, product


class Target(NamedTuple):
    """A dataset to learn after pretraining."""

    title: str
    classes: int
    images: int  # of these classes in the whole training split
    overrides: dict[str, Any]


TARGETS = {
    "fashion_mnist": Target(
        "Fashion-MNIST, the other classes", 5, 30_000, {"data.classes": (5, 6, 7, 8, 9)}
    ),
    "digits": Target("handwritten digits", 10, 1_437, {"data.image_size": 28}),
}

BATCH = 32  # images
STEPS = {5: 200, 20: 200, 100: 400, None: 600}  # by the number of examples per class

METHODS = ("from scratch", "frozen features", "fine-tuned", "gradually thawed")

# The fraction of the steps after which gradual thawing begins to train each part of the network.
THAW = {"head": 0, "stage3": 1 / 4, "*": 1 / 2}

# Learning rates by method and target. They were chosen on images that are in no test set, as
# configs/transfer_fashion.py describes.
RATES = {
    "from scratch": {"fashion_mnist": 0.3, "digits": 0.1},
    "frozen features": {"fashion_mnist": 3.0, "digits": 1.0},
    "fine-tuned": {"fashion_mnist": 0.1, "digits": 0.3},
    "gradually thawed": {"fashion_mnist": 0.1, "digits": 0.3},
}


def sweep(
    targets: Iterable[str] = tuple(TARGETS),
    methods: Iterable[str] = METHODS,
    examples: Iterable[int | None] = tuple(STEPS),
    seeds: Iterable[int] = (0, 1, 2),
    rates: Sequence[float] = (),
    weights: str = "runs/pretrained",
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run.

    Args:
      targets: Names from `TARGETS`.
      methods: Names from `METHODS`.
      examples: Numbers of examples per class from `STEPS`; None means all examples.
      seeds: Seeds, which also number the draws of examples.
      rates: Learning rates to try with every method; those of `RATES` if empty.
      weights: The folder of the pretrained network.
    """
    for target, count, method, seed in itertools.product(targets, examples, methods, seeds):
        yield from product(
            [{"data.name": target, **TARGETS[target].overrides}],
            [example_overrides(target, count, seed)],
            [method_overrides(method, target, count, weights)],
            param("optimizer.learning_rate", rates or (RATES[method][target],)),
            param("seed", (seed,)),
        )


def example_overrides(target: str, count: int | None, seed: int) -> dict[str, Any]:
    """Returns the overrides for training on `count` examples per class; None means all."""
    draw = {} if count is None else {"data.per_class": count, "data.subset_seed": seed}
    if (size := batch_size(target, count)) < BATCH:
        draw["data.batch_size"] = size
    return {**draw, "train.steps": STEPS[count]}


def batch_size(target: str, count: int | None) -> int:
    """Returns the images of a batch: `BATCH`, or all if there are fewer."""
    _, classes, images, _ = TARGETS[target]
    return min(BATCH, images if count is None else count * classes)


def method_overrides(method: str, target: str, count: int | None, weights: str) -> dict[str, Any]:
    """Returns the overrides for training with a method."""
    pretrained = {"transfer.weights": weights, "transfer.head": "new"}
    methods: dict[str, dict[str, Any]] = {
        "from scratch": {},
        "frozen features": {**pretrained, "transfer.freeze": "*", "transfer.thaw": {"head": 0}},
        "fine-tuned": pretrained,
        "gradually thawed": {**pretrained, "transfer.thaw": thaw_epochs(target, count)},
    }
    return methods[method]


def thaw_epochs(target: str, count: int | None) -> dict[str, float]:
    """Returns the epoch at which each part of the network begins to train."""
    _, classes, images, _ = TARGETS[target]
    steps_per_epoch = (images if count is None else count * classes) / batch_size(target, count)
    epochs = STEPS[count] / steps_per_epoch
    # Rounded down, so that a part begins to train in the intended step and not one step later.
    return {part: int(1e4 * share * epochs) / 1e4 for part, share in THAW.items()}


@draw.style()
def figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws final test metrics against the number of examples, or against rates if several ran."""
    runs = runs.assign(method=method_names(runs))[runs["finished"] | runs["diverged"]]
    if runs.empty:
        return {}
    [metric] = primary_metrics(runs)
    setting = ["data.name", "method", "data.per_class"]
    rate = "optimizer.learning_rate"
    tried = runs.groupby(setting, dropna=False)[rate].nunique().max()
    return {"transfer": final_metric(runs, metric, "data.per_class" if tried == 1 else rate)}


def method_names(runs: pd.DataFrame) -> pd.Series:
    """Returns the method of each run."""
    thaws = [name for name in runs if str(name).startswith("transfer.thaw.")]
    method = pd.Series("fine-tuned", runs.index)
    method[runs[thaws].notna().any(axis=1)] = "gradually thawed"
    method[runs["transfer.freeze"] != ""] = "frozen features"
    method[runs["transfer.weights"].isna()] = "from scratch"
    return method


def final_metric(runs: pd.DataFrame, metric: Metric, along: str) -> Figure:
    """Draws the test metric at the end of training against a column, with values equally spaced."""
    results = summarize(runs, by=["data.name", "method", along]).sort_values(along)
    results["name"] = ["all" if pd.isna(value) else f"{value:g}" for value in results[along]]
    names = list(dict.fromkeys(results["name"]))
    results["position"] = results["name"].map(names.index)
    targets = list(dict.fromkeys(runs["data.name"]))
    palette = dict(zip(METHODS, draw.OKABE_ITO, strict=False))
    figure, panels = draw.panels(len(targets), height=2.7)
    ends = []
    for axes, target in zip(panels, targets, strict=True):
        axes.set_title(TARGETS[target].title)
        shown = results[results["data.name"] == target]
        ends.append(list(draw_methods(axes, shown, f"test_{metric.name}", palette)))
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel(
            "training examples per class" if along == "data.per_class" else "learning rate"
        )
        draw.set_metric_axis(axes, metric, "test ")
        axes.label_outer()
    if metric.lower_is_better:
        panels[0].set_ylim(0, 1.05 * panels[0].get_ylim()[1])
    if results["diverged"].any():
        handle = draw.legend_handles(diverged=True)[-1:]
        figure.legend(handles=handle, loc="outside upper right")
    for axes, labels in zip(panels, ends, strict=True):
        draw.label_ends(axes, labels)
    return figure


def draw_methods(
    axes: Axes, results: pd.DataFrame, name: str, palette: dict[str, str]
) -> Iterator[draw.LineEnd]:
    """Draws a line for each method and yields its end."""
    for rank, (method, color) in enumerate(palette.items()):
        result = results[results["method"] == method]
        if result.empty:
            continue
        x = result["position"] + 0.05 * (rank - 1.5)  # keeps error bars apart
        for place in x[result["diverged"] > 0]:
            draw.draw_diverged(axes, place, color)
        measured = result["seeds"] > 0
        x, mean = x[measured], result.loc[measured, f"{name}_mean"]
        if measured.any():
            deviation = result.loc[measured, f"{name}_std"]
            draw.draw_error_bars(axes, x, mean, deviation, color, seeds=result["seeds"])
            yield draw.LineEnd(float(x.iloc[-1]), float(mean.iloc[-1]), method, color)
