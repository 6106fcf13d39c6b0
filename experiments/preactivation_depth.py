"""Pre-activation: the deeper the network, the more it gains from BN and ReLU before the weights

He et al. 2016 (Identity Mappings in Deep Residual Networks, arXiv 1603.05027, section 4.1 and table
3) train networks of both kinds of residual unit. The original unit's ReLU after each addition
impedes the signal the more often it is passed, so that 1001 layers train slowly at first and end at
7.61 % test error on CIFAR-10, above the 5.93 % of 164 layers. With pre-activation 1001 layers are
better than 164: 4.92 against 5.46 %.

The sweep trains bottlenecks (`depths`) with projections where the network widens, and basic blocks
with identities (`basic_depths`), with the original unit and with pre-activation.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.claims import (
    NOT_TESTED,
    Claim,
    compare,
    describe_difference,
    judge,
    worse_and_better,
)
from resjax.analysis.final_values import Published, by_depth, curves_and_final
from resjax.analysis.runs import primary_metrics, training_column
from resjax.analysis.statistics import by_seed, estimate, paired_differences
from resjax.run_files import Metric
from resjax.sweeps import chain, choose, param, product

UNITS = {"original": "", "pre-activation": "preact_"}

PUBLISHED = (
    Published("He et al. 2016", "original", {110: 6.61, 164: 5.93, 1001: 7.61}),
    Published("He et al. 2016", "pre-activation", {110: 6.37, 164: 5.46, 1001: 4.92}),
)


def sweep(
    depths: Iterable[int] = (164, 1001),
    basic_depths: Iterable[int] = (110,),
    units: Iterable[str] = tuple(UNITS),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run; `units` are keys of `UNITS`."""
    prefixes = choose(UNITS, units)
    kinds = (("basic", "pad", basic_depths), ("bottleneck", "project", depths))
    networks = chain(
        *(
            product(
                param("model.depth", each),
                param("model.shortcut", (shortcut,)),
                param("model.block", [prefix + kind for prefix in prefixes]),
            )
            for kind, shortcut, each in kinds
        )
    )
    yield from product(networks, param("seed", seeds))


@draw.style()
def figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws the curves of both units and their final errors against depth."""
    final = partial(by_depth, series="unit", published=PUBLISHED)
    return curves_and_final(described(runs), curves, panel="unit", depth=final)


def claims(runs: pd.DataFrame) -> list[Claim]:
    """Compares the units at the greatest depth of bottlenecks, and their difference over depth."""
    [metric] = primary_metrics(runs)
    _, better = worse_and_better(runs)
    bottlenecks = described(runs[runs["model.block"].str.endswith("bottleneck")])
    if bottlenecks.empty:
        return []
    depths = bottlenecks["model.depth"].min(), bottlenecks["model.depth"].max()
    deepest = bottlenecks[bottlenecks["model.depth"] == depths[1]]
    preact, original = {"unit": "pre-activation"}, {"unit": "original"}
    source = "He et al. 2016, table 3"
    return [
        compare(
            deepest,
            "At great depth, pre-activation has a lower test error than the original unit",
            source,
            "1001 layers: 4.92 against 7.61 % (CIFAR-10)",
            value=f"test_{metric.name}",
            treatment=preact,
            control=original,
            expected=better,
        ),
        compare(
            deepest,
            "At great depth, pre-activation trains to a lower training loss",
            "He et al. 2016, section 4.1 and figure 1",
            "1001 layers: drawn",
            value=training_column(deepest, "loss"),
            treatment=preact,
            control=original,
            expected="lower",
        ),
        growing_gain(bottlenecks, metric, depths, source),
    ]


def growing_gain(runs: pd.DataFrame, metric: Metric, depths: tuple[int, int], source: str) -> Claim:
    """Compares what pre-activation gains at the smallest and at the greatest depth."""
    statement = "The deeper the network, the more pre-activation lowers the test error"
    published = "-0.47 points at 164 layers, -2.69 at 1001 (CIFAR-10)"
    at = [runs[(runs["model.depth"] == depth) & ~runs["diverged"]] for depth in depths]
    if depths[0] == depths[1] or min(each["unit"].nunique() for each in at) < 2:
        measured = "no runs of both units at two depths"
        return Claim(statement, source, published, measured, NOT_TESTED)
    preact, original = {"unit": "pre-activation"}, {"unit": "original"}
    column = f"test_{metric.name}"
    small, great = (
        by_seed(paired_differences(each, column, preact, original, equal=())) for each in at
    )
    change = (great - small).dropna()
    _, better = worse_and_better(runs)
    gains = [
        f"{d} layers: {describe_difference(estimate(x), metric)}"
        for d, x in zip(depths, (small, great), strict=True)
    ]
    measured = f"{'; '.join(gains)}; change {describe_difference(estimate(change), metric)}"
    return Claim(statement, source, published, measured, judge(change, better))


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds the column `unit`, the kind of residual unit."""
    preact = runs["model.block"].str.startswith("preact_")
    return runs.assign(unit=preact.map({True: "pre-activation", False: "original"}))
