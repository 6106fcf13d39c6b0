"""Normalization-free: a deep residual network without BN trains if its blocks start as identities

Without BN the branches of a deep residual network add up to signals that grow with depth, and a
learning rate of 0.1 destroys the network. Three remedies start every block as its shortcut. Fixup
(Zhang et al. 2019, arXiv 1901.09321) starts the last convolution of a branch at zero and the others
smaller the deeper the network is, and adds scalar biases and a scalar factor per branch: 7.24 %
test error with ResNet-110 on CIFAR-10, where BN has 6.61. SkipInit (De & Smith 2020, arXiv
2002.10444) multiplies every branch by one learned number that starts at zero, and is enough to
train networks of 1,000 layers without BN. ReZero (Bachlechner et al. 2020, arXiv 2003.04887) has
the same number; its authors report that ResNet-56 reaches 85 % accuracy on CIFAR-10 in 32 % fewer
epochs with it.

The sweep trains ReZero in networks with BN, and SkipInit and Fixup in networks without it. It also
trains networks without BN or a remedy, unscaled and with branches scaled by the inverse square root
of the number of blocks, which De & Smith derive as enough. All parameters have the learning rate of
the config. The authors of Fixup train biases and factors at a tenth of it, and De & Smith find that
networks without BN need smaller rates than those with it.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.claims import Claim, compare, worse_and_better
from resjax.analysis.final_values import Published, by_depth, curves_and_final
from resjax.analysis.runs import name_settings, primary_metrics, training_column
from resjax.sweeps import choose, param, product


def network(block: str, norm: str, branch_scale: float | str = 1.0) -> dict[str, Any]:
    """Returns the overrides that set how branches are normalized and scaled."""
    return {"model.block": block, "model.norm": norm, "model.branch_scale": branch_scale}


BN, NOTHING, SCALED = "BN", "no norm", "no norm, branches / sqrt(L)"
FIXUP, SKIPINIT, REZERO = "Fixup", "SkipInit", "BN and ReZero"

NETWORKS = {
    BN: network("basic", "batch"),
    REZERO: network("basic", "batch", "learned"),
    FIXUP: network("fixup_basic", "fixup"),
    SKIPINIT: network("basic", "none", "learned"),
    SCALED: network("basic", "none", "L^-0.5"),
    NOTHING: network("basic", "none"),
}

PUBLISHED = (
    Published("He et al. 2016", BN, {110: 6.61}),
    Published("Zhang et al. 2019", FIXUP, {110: 7.24}),
)

REACHED = 0.15
"""The training error that ReZero reaches sooner, as a fraction."""


def sweep(
    depths: Iterable[int] = (56, 110),
    networks: Iterable[str] = tuple(NETWORKS),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run; `networks` are names of `NETWORKS`."""
    yield from product(
        param("model.depth", depths), choose(NETWORKS, networks), param("seed", seeds)
    )


@draw.style()
def figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws the curves of each network and the final errors against depth."""
    final = partial(by_depth, series="network", published=PUBLISHED)
    return curves_and_final(described(runs), curves, panel="network", depth=final)


def claims(runs: pd.DataFrame, curves: pd.DataFrame) -> list[Claim]:
    """Compares the networks at the greatest depth."""
    metric = primary_metrics(runs)[0].name
    worse, _ = worse_and_better(runs)
    deepest = described(runs[runs["model.depth"] == runs["model.depth"].max()])
    deepest = deepest.merge(first_steps(curves), on="folder", how="left")
    train, test = training_column(deepest, metric), f"test_{metric}"
    fixup, skipinit = "Zhang et al. 2019", "De & Smith 2020"
    rows: list[tuple[Any, ...]] = [
        (
            "Without BN or a remedy, a deep residual network trains worse than with BN",
            *(skipinit, "no number", train, NOTHING, BN, worse, 0.0),
        ),
        *(
            (
                f"{remedy} train a deep network without BN as far as BN does: the training errors "
                "differ by less than 5 points",
                *(source, "no number", train, name, BN, "same", 0.05),
            )
            for remedy, source, name in (
                ("The initialization and scalars of Fixup", fixup, FIXUP),
                ("Learned scales from zero (SkipInit)", skipinit, SKIPINIT),
                ("Branches divided by the square root of their number", skipinit, SCALED),
            )
        ),
        (
            "With Fixup the test error differs from that with BN by less than 2 points",
            *(fixup, "7.24 against 6.61 % (ResNet-110, CIFAR-10)", test, FIXUP, BN, "same", 0.02),
        ),
        (
            "With SkipInit the test error differs from that with BN by less than 2 points",
            *(skipinit, "no number for this network", test, SKIPINIT, BN, "same", 0.02),
        ),
        (
            "With ReZero, a network with BN reaches a training error of 15 % in fewer steps",
            *("Bachlechner et al. 2020", "32 % fewer epochs (ResNet-56, CIFAR-10)"),
            *("steps_to_15_percent", REZERO, BN, "lower", 0.0),
        ),
    ]
    return [
        compare(
            deepest,
            statement,
            source,
            published,
            value=value,
            treatment={"network": treatment},
            control={"network": control},
            expected=expected,
            margin=margin,
        )
        for statement, source, published, value, treatment, control, expected, margin in rows
    ]


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds the column `network`, the name of the network."""
    return runs.assign(network=name_settings(runs, NETWORKS))


def first_steps(curves: pd.DataFrame) -> pd.DataFrame:
    """Returns the first logged step of each run with a training error of at most `REACHED`."""
    reached = curves[(curves["split"] == "train") & (curves.get("error", 1.0) <= REACHED)]
    first = reached.groupby("folder")["step"].min().astype(float)
    return first.rename("steps_to_15_percent").reset_index()
