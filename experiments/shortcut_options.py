"""Shortcut options: any shortcut cures degradation, and projections add little to identities

He et al. 2015 (Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.1 and
table 3) compare three shortcuts of ResNet-34 on ImageNet: (A) identities, padded with zeros where
the network widens, without parameters; (B) projections there, identities elsewhere; (C) projections
everywhere. Their top-1 errors with ten crops are 25.03, 24.52 and 24.19 %, that of the plain
network 28.54 %. All three are considerably better than the plain network; B is slightly better than
A, and C marginally better than B. The differences are small, so projections are not essential. On
CIFAR-10 the paper trains option A only.

The sweep trains each depth with no shortcut ("none", plain) and with options A ("pad"), B
("project") and C ("project_all").
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.claims import Claim, compare, worse_and_better
from resjax.analysis.final_values import Published, by_category, curves_and_final
from resjax.analysis.runs import primary_metrics
from resjax.sweeps import param, product

OPTIONS = {
    "none": "none (plain)",
    "pad": "A: identity",
    "project": "B: projection to widen",
    "project_all": "C: projection everywhere",
}

PUBLISHED = (
    Published(
        "He et al. 2015, ten crops",
        "34 layers",
        dict(zip(OPTIONS.values(), (28.54, 25.03, 24.52, 24.19), strict=True)),
        data="imagenet",
        setting="ImageNet, 34 layers",
    ),
)


def sweep(
    depths: Iterable[int] = (20, 56),
    shortcuts: Iterable[str] = tuple(OPTIONS),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run."""
    yield from product(
        param("model.depth", depths), param("model.shortcut", shortcuts), param("seed", seeds)
    )


@draw.style()
def figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws the curves of each option and their final errors."""
    final = partial(by_category, category="option", series="layers", published=PUBLISHED)
    return curves_and_final(described(runs), curves, panel="option", options=final)


def claims(runs: pd.DataFrame) -> list[Claim]:
    """Compares the options with the plain network, and with each other, at the greatest depth."""
    [metric] = primary_metrics(runs)
    deepest = described(runs[runs["model.depth"] == runs["model.depth"].max()])
    published = PUBLISHED[0].values
    plain, a, b, c = OPTIONS.values()
    lower = "has a lower error than a plain one"
    statements = {
        (a, plain): f"A network with identity shortcuts (A) {lower}",
        (b, plain): f"A network with projections where it widens (B) {lower}",
        (c, plain): f"A network with projections everywhere (C) {lower}",
        (b, a): "Projections where the network widens (B) are slightly better than identities (A)",
        (c, b): "Projections everywhere (C) are marginally better than those where it widens (B)",
    }
    return [
        compare(
            deepest,
            statement,
            "He et al. 2015, table 3",
            f"{published[treatment]} against {published[control]} % (ResNet-34, ImageNet, top 1)",
            value=f"test_{metric.name}",
            treatment={"option": treatment},
            control={"option": control},
            expected=worse_and_better(runs)[1],
        )
        for (treatment, control), statement in statements.items()
    ]


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds the columns `option`, the name of the shortcut, and `layers`, that of the depth."""
    option = runs["model.shortcut"].map(lambda name: OPTIONS.get(name, name))
    return runs.assign(option=option, layers=runs["model.depth"].map("{} layers".format))
