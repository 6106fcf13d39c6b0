"""Pre-activation: the deeper the network, the more it gains from BN and ReLU before the weights

He et al. 2016 (Identity Mappings in Deep Residual Networks, arXiv 1603.05027, section 4.1 and table
3) train networks of both kinds of residual unit. The original unit's ReLU after each addition
impedes the signal the more often it is passed, so that 1001 layers train slowly at first and end at
7.61 % test error on CIFAR-10, above the 5.93 % of 164 layers. With pre-activation 1001 layers are
better than 164: 4.92 against 5.46 %.

The sweep trains bottlenecks (`depths`) with projections where the network widens, and basic blocks
with identities (`basic_depths`), with the original unit and with pre-activation. The paper trains
basic blocks of 110 layers: 6.61 % with the original unit and 6.37 % with pre-activation.
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
from resjax.sweeps import chain, choose, param, product

UNITS = {"original": "", "pre-activation": "preact_"}

PREACTIVATION, ORIGINAL = {"unit": "pre-activation"}, {"unit": "original"}

TABLE = "He et al. 2016, table 3"

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
    """Compares the units at the greatest depth of each kind of block, and their gain over depth."""
    runs = described(runs)
    kinds = (("bottleneck", _bottleneck_claims), ("basic", _basic_claims))
    return [
        claim
        for kind, claims_of in kinds
        if (own := runs["model.block"].str.endswith(kind)).any()
        for claim in claims_of(runs[own])
    ]


def _bottleneck_claims(runs: pd.DataFrame) -> list[Claim]:
    [metric] = primary_metrics(runs)
    _, better = worse_and_better(runs)
    deepest = runs[runs["model.depth"] == runs["model.depth"].max()]
    return [
        compare(
            deepest,
            "At great depth, pre-activation has a lower test error than the original unit",
            TABLE,
            "1001 layers: 4.92 against 7.61 % (CIFAR-10)",
            value=f"test_{metric.name}",
            treatment=PREACTIVATION,
            control=ORIGINAL,
            expected=better,
        ),
        compare(
            deepest,
            "At great depth, pre-activation trains to a lower training loss",
            "He et al. 2016, section 4.1 and figure 1",
            "1001 layers: drawn",
            value=training_column(deepest, "loss"),
            treatment=PREACTIVATION,
            control=ORIGINAL,
            expected="lower",
        ),
        growing_gain(
            runs,
            "The deeper the network, the more pre-activation lowers the test error",
            "-0.47 points at 164 layers, -2.69 at 1001 (CIFAR-10)",
        ),
    ]


def _basic_claims(runs: pd.DataFrame) -> list[Claim]:
    """Returns the claims about basic blocks, which the paper trains at one depth only."""
    [metric] = primary_metrics(runs)
    _, better = worse_and_better(runs)
    found = [
        compare(
            runs[runs["model.depth"] == runs["model.depth"].max()],
            "Pre-activation has a lower test error than the original unit (basic blocks)",
            TABLE,
            "110 layers: 6.37 against 6.61 % (CIFAR-10)",
            value=f"test_{metric.name}",
            treatment=PREACTIVATION,
            control=ORIGINAL,
            expected=better,
        )
    ]
    if runs["model.depth"].nunique() > 1:
        statement = "The deeper the network, the more pre-activation lowers the test error"
        found.append(growing_gain(runs, f"{statement} (basic blocks)", "no number"))
    return found


def growing_gain(runs: pd.DataFrame, statement: str, published: str) -> Claim:
    """Compares what pre-activation gains at the smallest and at the greatest depth."""
    [metric] = primary_metrics(runs)
    depths = int(runs["model.depth"].min()), int(runs["model.depth"].max())
    at = [runs[(runs["model.depth"] == depth) & ~runs["diverged"]] for depth in depths]
    if depths[0] == depths[1] or min(each["unit"].nunique() for each in at) < 2:
        measured = "no runs of both units at two depths"
        return Claim(statement, TABLE, published, measured, NOT_TESTED)
    column = f"test_{metric.name}"
    small, great = (
        by_seed(paired_differences(each, column, PREACTIVATION, ORIGINAL, equal=())) for each in at
    )
    change = (great - small).dropna()
    _, better = worse_and_better(runs)
    gains = [
        f"{d} layers: {describe_difference(estimate(x), metric)}"
        for d, x in zip(depths, (small, great), strict=True)
    ]
    measured = f"{'; '.join(gains)}; change {describe_difference(estimate(change), metric)}"
    return Claim(statement, TABLE, published, measured, judge(change, better))


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds the column `unit`, the kind of residual unit."""
    preact = runs["model.block"].str.startswith("preact_")
    return runs.assign(unit=preact.map({True: "pre-activation", False: "original"}))
