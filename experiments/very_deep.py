"""Very deep: a warm-up starts ResNet-110, and 1202 layers train as well but generalize worse

He et al. 2015 (Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2 and
table 6) find the learning rate of 0.1 slightly too large to start ResNet-110. They train it at 0.01
until the training error is below 80 %, about 400 steps, and then at 0.1. A footnote says that
without the warm-up it starts after several epochs and still reaches a similar accuracy. ResNet-1202
has no difficulty of optimization, with a training error below 0.1 %, but its test error of 7.93 %
is higher than the 6.61 +- 0.16 % of ResNet-110, which they attribute to overfitting.

The sweep trains each depth with the paper's schedule. From 110 layers on this schedule has the
warm-up ("he2015"), and the sweep trains the depths of `without_warmup` without it too ("steps").
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.claims import AGREES, NOT_TESTED, Claim, compare, worse_and_better
from resjax.analysis.final_values import Published, by_depth
from resjax.analysis.runs import primary_metrics, training_column
from resjax.sweeps import chain, param, product

SCHEDULES = {"he2015": "warm-up", "steps": "no warm-up"}

PUBLISHED = (
    Published("He et al. 2015", "warm-up", {56: 6.97, 110: (6.61, 0.16), 1202: 7.93}),
    Published("gcr/torch-residual-networks", "warm-up", {56: 6.94, 110: 6.73}),
)

START = 0.1
"""The fraction of the steps that the figure of the start shows, if it has `FEWEST` measurements."""

FEWEST = 6

STARTED = 0.8
"""The training error below which the paper's warm-up ends, as a fraction."""


def sweep(
    depths: Iterable[int] = (56, 110, 1202),
    without_warmup: Iterable[int] = (110,),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run."""
    seeds = tuple(seeds)
    networks = chain(
        product(param("model.depth", depths), param("optimizer.schedule", ("he2015",))),
        product(param("model.depth", without_warmup), param("optimizer.schedule", ("steps",))),
    )
    yield from product(param("model.shortcut", ("pad",)), networks, param("seed", seeds))


@draw.style()
def figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws the curves, their start, and the final errors against depth."""
    runs = described(runs)
    columns = ["folder", "schedule", "model.depth", "train.steps", "train.log_every"]
    curves = curves.merge(runs[columns], on="folder")
    drawn = {}
    if len(curves):
        drawn["curves"] = draw_schedules(curves)
        first = np.maximum(START * curves["train.steps"], FEWEST * curves["train.log_every"])
        drawn["start"] = draw_schedules(curves[curves["step"] <= first], limits=(0, 1))
    if (runs["finished"] | runs["diverged"]).any():
        drawn["depth"] = by_depth(runs, series="schedule", published=PUBLISHED)
    return drawn


def draw_schedules(curves: pd.DataFrame, **options: Any) -> Figure:
    """Draws a panel for each schedule with a line for each depth."""
    return draw.metric_curves(
        curves, panel="schedule", series="model.depth", label="{} layers", **options
    )


def claims(runs: pd.DataFrame, curves: pd.DataFrame) -> list[Claim]:
    """Compares ResNet-110 with and without its warm-up, and with the deepest network."""
    runs = described(runs).merge(starting_steps(curves), on="folder", how="left")
    metric = primary_metrics(runs)[0].name
    warm, cold = ({"model.depth": 110, "schedule": name} for name in SCHEDULES.values())
    depth = max(runs["model.depth"].max(), 111)
    deep = {**warm, "model.depth": depth}
    source = "He et al. 2015, section 4.2"
    without, deeper = ("no warm-up", "warm-up"), (f"{depth} layers", "110 layers")
    trains = compare(
        runs,
        "A much deeper network than ResNet-110 is no difficulty for the optimization: its "
        "training error is as low",
        source,
        "1202 layers: training error below 0.1 %",
        value=training_column(runs, metric),
        treatment=deep,
        control=warm,
        expected="same",
        margin=0.01,
        names=deeper,
    )
    generalizes = compare(
        runs,
        "A much deeper network than ResNet-110 generalizes worse: its test error is higher "
        "although its training error is as low",
        source,
        "1202 layers: 7.93 against 6.61 ± 0.16 % on CIFAR-10",
        value=f"test_{metric}",
        treatment=deep,
        control=warm,
        expected=worse_and_better(runs)[0],
        names=deeper,
    )
    if trains.verdict != AGREES:  # a network that is not trained cannot overfit
        measured = f"{generalizes.measured}; the training errors are not equally low"
        generalizes = generalizes._replace(measured=measured, verdict=NOT_TESTED)
    return [
        compare(
            runs,
            "Without the warm-up, ResNet-110 takes longer until its training error is below 80 %",
            source,
            "about 400 steps with it, several epochs without",
            value="starting_step",
            treatment=cold,
            control=warm,
            expected="higher",
            names=without,
        ),
        compare(
            runs,
            "Without the warm-up, ResNet-110 still reaches a similar test error",
            source,
            "no number",
            value=f"test_{metric}",
            treatment=cold,
            control=warm,
            expected="same",
            margin=0.01,
            names=without,
        ),
        trains,
        generalizes,
    ]


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds the column `schedule`, the name of the learning-rate schedule."""
    return runs.assign(schedule=runs["optimizer.schedule"].replace(SCHEDULES))


def starting_steps(curves: pd.DataFrame) -> pd.DataFrame:
    """Returns the first logged `starting_step` of each run whose training error is below 80 %."""
    started = curves[(curves["split"] == "train") & (curves.get("error", 1.0) < STARTED)]
    return started.groupby("folder")["step"].min().rename("starting_step").reset_index()
