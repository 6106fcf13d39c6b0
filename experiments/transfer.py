"""Transfer: pretrained weights help, the more the fewer examples there are

Kornblith et al. 2018 (Do Better ImageNet Models Transfer Better?, arXiv 1805.08974) train networks
from scratch, train a classifier on frozen pretrained features, and fine-tune the whole of the
pretrained network. Fine-tuned networks are far better than those from scratch where examples are
few, and the advantage fades as there are more. Howard & Ruder 2018 (arXiv 1801.06146) thaw a
pretrained network gradually, from the head downwards.

The sweep does all four with a network that was pretrained on one half of Fashion-MNIST's classes,
and has it learn the other half, and handwritten digits, from 5, 20 and 100 examples a class and
from all. Every seed draws its own examples. At a given number of examples all methods take equally
many steps.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.runs import summarize
from resjax.sweeps import param, product


class Target(NamedTuple):
    """What is learned after pretraining."""

    title: str
    classes: int
    images: int  # in the whole training split, of these classes
    overrides: dict[str, Any]


TARGETS = {
    "fashion_mnist": Target(
        "Fashion-MNIST, the other classes", 5, 30_000, {"data.classes": (5, 6, 7, 8, 9)}
    ),
    "digits": Target("handwritten digits", 10, 1_437, {"data.image_size": 28}),
}

BATCH = 32  # images
STEPS = {5: 200, 20: 200, 100: 400, None: 600}  # by examples a class

METHODS = ("from scratch", "frozen features", "fine-tuned", "gradually thawed")

# The share of the steps after which each part of the network begins to train, by gradual thawing.
THAW = {"head": 0, "stage3": 1 / 4, "*": 1 / 2}

# By method, for each target: chosen on images that no test set has, in the way that
# configs/transfer_fashion.py tells.
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
    """Yields the overrides of every run.

    Args:
      targets: of TARGETS.
      methods: of METHODS.
      examples: a class, of STEPS; None is all.
      seeds: each with the draw of that number.
      rates: learning rates, all of which are tried; none: that of RATES.
      weights: folder of the pretrained network.
    """
    for target, count, method, seed in itertools.product(targets, examples, methods, seeds):
        yield from product(
            [{"data.name": target, **TARGETS[target].overrides}],
            [of_examples(count, seed)],
            [of_method(method, target, count, weights)],
            param("optimizer.learning_rate", rates or (RATES[method][target],)),
            param("seed", (seed,)),
        )


def of_examples(count: int | None, seed: int) -> dict[str, Any]:
    """The overrides of a run on so many examples a class; None is all."""
    draws = {} if count is None else {"data.per_class": count, "data.subset_seed": seed}
    return {**draws, "train.steps": STEPS[count]}


def of_method(method: str, target: str, count: int | None, weights: str) -> dict[str, Any]:
    """The overrides of a method."""
    pretrained = {"transfer.weights": weights, "transfer.head": "new"}
    return {
        "from scratch": {},
        "frozen features": {**pretrained, "transfer.freeze": "*", "transfer.thaw": {"head": 0}},
        "fine-tuned": pretrained,
        "gradually thawed": {**pretrained, "transfer.thaw": thaw(target, count)},
    }[method]


def thaw(target: str, count: int | None) -> dict[str, float]:
    """The epoch from which each part of the network trains."""
    _, classes, images, _ = TARGETS[target]
    epochs = STEPS[count] * BATCH / (images if count is None else count * classes)
    # Rounded down, or a step might begin before the epoch that it should begin with.
    return {part: int(1e4 * share * epochs) / 1e4 for part, share in THAW.items()}


@draw.style()
def figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws how the final test errors go with examples, or with rates where several were tried."""
    runs = runs.assign(method=methods_of(runs))[runs["finished"]]
    if runs.empty:
        return {}
    setting = ["data.name", "method", "data.per_class"]
    rate = "optimizer.learning_rate"
    tried = runs.groupby(setting, dropna=False)[rate].nunique().max()
    return {"transfer": final_error(runs, "data.per_class" if tried == 1 else rate)}


def methods_of(runs: pd.DataFrame) -> pd.Series:
    """The method of every run."""
    thaws = [name for name in runs if str(name).startswith("transfer.thaw.")]
    method = pd.Series("fine-tuned", runs.index)
    method[runs[thaws].notna().any(axis=1)] = "gradually thawed"
    method[runs["transfer.freeze"] != ""] = "frozen features"
    method[runs["transfer.weights"].isna()] = "from scratch"
    return method


def final_error(runs: pd.DataFrame, along: str) -> Figure:
    """Draws test errors at the end of training against a column; its values get equal room."""
    results = summarize(runs, by=["data.name", "method", along]).sort_values(along)
    results["name"] = ["all" if pd.isna(value) else f"{value:g}" for value in results[along]]
    names = list(dict.fromkeys(results["name"]))
    results["place"] = results["name"].map(names.index)
    targets = list(dict.fromkeys(runs["data.name"]))
    palette = dict(zip(METHODS, draw.OKABE_ITO, strict=False))
    figure, panels = draw.panels(len(targets), height=2.7)
    ends = []
    for axes, target in zip(panels, targets, strict=True):
        axes.set_title(TARGETS[target].title)
        ends.append(list(lines(axes, results[results["data.name"] == target], palette)))
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel(
            "training examples a class" if along == "data.per_class" else "learning rate"
        )
        draw.percent(axes, "test error (%)")
        axes.label_outer()
    panels[0].set_ylim(0, 1.05 * panels[0].get_ylim()[1])
    for axes, names_here in zip(panels, ends, strict=True):
        draw.label_ends(axes, names_here)
    return figure


def lines(axes: Axes, results: pd.DataFrame, palette: dict[str, str]) -> Iterator[draw.End]:
    """Draws a line for each method, and gives where it ends."""
    for rank, (method, color) in enumerate(palette.items()):
        result = results[results["method"] == method]
        if result.empty:
            continue
        beside = result["place"] + 0.05 * (rank - 1.5)  # error bars stay apart
        mean = result["test_error_mean"]
        draw.draw_points(axes, beside, mean, result["test_error_std"], color)
        yield draw.End(float(beside.iloc[-1]), float(mean.iloc[-1]), method, color)
