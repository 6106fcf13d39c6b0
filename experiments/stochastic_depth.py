"""Stochastic depth: dropping branches at random in training lowers the test error of deep networks

Huang et al. 2016 (Deep Networks with Stochastic Depth, arXiv 1603.09382) drop the branch of each
block at random in training, of the last block with probability 1/2 and of earlier ones with
linearly less, and use all of them in evaluation. The test error of ResNet-110 on CIFAR-10 falls
from 6.41 to 5.23 %, although its training loss is higher, and 1202 layers, which overfit without
it, reach 4.91 %. They train for 500 epochs and choose the epoch on validation data.

The sweep trains each depth with each probability for the last block. Ours drops branches for each
image of a batch by itself, the paper's code for the whole batch.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.claims import Claim, compare, worse_and_better
from resjax.analysis.final_values import Published, by_depth, curves_and_final
from resjax.analysis.runs import primary_metrics
from resjax.sweeps import param, product

CONSTANT = "constant depth"

PUBLISHED = (
    Published("Huang et al. 2016, 500 epochs", CONSTANT, {110: 6.41}),
    Published("Huang et al. 2016, 500 epochs", "rate 0.5", {110: 5.23, 1202: 4.91}),
)


def sweep(
    depths: Iterable[int] = (56, 110),
    rates: Iterable[float] = (0.0, 0.2, 0.5),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run."""
    yield from product(
        param("model.depth", depths),
        param("model.shortcut", ("pad",)),
        param("model.stochastic_depth", rates),
        param("seed", seeds),
    )


@draw.style()
def figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws the curves of each rate and the final errors against depth."""
    final = partial(by_depth, series="network", published=PUBLISHED)
    return curves_and_final(described(runs), curves, panel="network", depth=final)


def claims(runs: pd.DataFrame) -> list[Claim]:
    """Compares the greatest rate with constant depth, at the greatest depth."""
    [metric] = primary_metrics(runs)
    worse, better = worse_and_better(runs)
    deepest = described(runs[runs["model.depth"] == runs["model.depth"].max()])
    rate = f"rate {deepest['model.stochastic_depth'].max():g}"
    statements = {
        "Stochastic depth lowers the test error of a deep residual network": (
            *("test", "6.41 to 5.23 % (ResNet-110, CIFAR-10)", better),
        ),
        "With stochastic depth the error in training mode is higher": (
            *("train", "drawn (training loss)", worse),
        ),
    }
    return [
        compare(
            deepest,
            statement,
            "Huang et al. 2016, section 4.1",
            published,
            value=f"{split}_{metric.name}",
            treatment={"network": rate},
            control={"network": CONSTANT},
            expected=expected,
        )
        for statement, (split, published, expected) in statements.items()
    ]


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds the column `network`, the rate of stochastic depth."""
    rates = runs["model.stochastic_depth"]
    return runs.assign(network=rates.map("rate {:g}".format).where(rates > 0, CONSTANT))
