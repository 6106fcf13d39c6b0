"""Order of activation: BN and ReLU help before the weights, and harm after or before the addition

He et al. 2016 (Identity Mappings in Deep Residual Networks, arXiv 1603.05027, section 4 and table
2) move BN and ReLU within the residual unit. Whatever is applied after the addition, or makes the
branch's output nonnegative, impedes the signal: BN after the addition and ReLU before it raise the
test error on CIFAR-10, to 8.17 and 7.84 % from 6.61 % at 110 layers. ReLU alone before the weights,
where it does not see a normalized input, changes little (6.71 %). BN and ReLU before the weights,
full pre-activation, lower it (6.37 %, and at 164 layers 5.46 % from 5.93 %).

The sweep trains basic blocks with identities (`depths`) and bottlenecks with projections where the
network widens (`bottleneck_depths`) in all five orders. A reproduction by
gcr/torch-residual-networks has 13.56 % for BN after the addition at 110 layers.
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
from resjax.sweeps import chain, choose, param, product

ORDERS = {
    "": "original",
    "bn_after_addition": "BN after addition",
    "relu_before_addition": "ReLU before addition",
    "relu_preact": "ReLU-only pre-activation",
    "preact": "full pre-activation",
}

PUBLISHED = tuple(
    Published(
        "He et al. 2016, median of five",
        f"{kind}, {depth} layers",
        dict(zip(ORDERS.values(), errors, strict=True)),
        setting="CIFAR-10",
    )
    for kind, depth, errors in (
        ("basic", 110, (6.61, 8.17, 7.84, 6.71, 6.37)),
        ("bottleneck", 164, (5.93, 6.50, 6.14, 5.91, 5.46)),
    )
)


def sweep(
    depths: Iterable[int] = (110,),
    bottleneck_depths: Iterable[int] = (164,),
    orders: Iterable[str] = tuple(ORDERS.values()),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run; `orders` are values of `ORDERS`."""
    prefixes = choose({name: prefix for prefix, name in ORDERS.items()}, orders)
    kinds = (("basic", "pad", depths), ("bottleneck", "project", bottleneck_depths))
    networks = chain(
        *(
            product(
                param("model.depth", each),
                param("model.shortcut", (shortcut,)),
                param("model.block", [f"{prefix}_{kind}".lstrip("_") for prefix in prefixes]),
            )
            for kind, shortcut, each in kinds
        )
    )
    yield from product(networks, param("seed", seeds))


@draw.style()
def figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws the curves of each order and the final errors."""
    final = partial(
        by_category, category="order", series="network", published=PUBLISHED, order=ORDERS.values()
    )
    return curves_and_final(
        described(runs), curves, panel="order", series="network", label="{}", orders=final
    )


def claims(runs: pd.DataFrame) -> list[Claim]:
    """Compares each order with the original one, for the deepest network of each kind of block."""
    [metric] = primary_metrics(runs)
    worse, better = worse_and_better(runs)
    runs = described(runs)
    original, after, before, relu_only, full = ORDERS.values()
    statements = {
        after: ("BN after the addition raises the test error", worse),
        before: ("ReLU before the addition raises the test error", worse),
        relu_only: ("ReLU alone before the weights changes the test error little", "same"),
        full: ("BN and ReLU before the weights lower the test error", better),
    }
    found = []
    for row in PUBLISHED:
        kind, errors = row.series.partition(",")[0], row.values
        of_kind = runs[runs["kind"] == kind]
        deepest = of_kind[of_kind["model.depth"] == of_kind["model.depth"].max()]
        for order, (statement, expected) in statements.items():
            found.append(
                compare(
                    deepest,
                    f"{statement} ({kind} blocks)",
                    "He et al. 2016, table 2",
                    f"{errors[order]} against {errors[original]} % ({row.series}, CIFAR-10)",
                    value=f"test_{metric.name}",
                    treatment={"order": order},
                    control={"order": original},
                    expected=expected,
                    margin=0.005 if expected == "same" else 0.0,
                )
            )
    return found


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds the columns `order`, `kind` of the block, and `network`, the kind with its depth."""
    kind = runs["model.block"].str.extract("(basic|bottleneck)$")[0]
    prefix = runs["model.block"].str.replace("_?(basic|bottleneck)$", "", regex=True)
    network = kind + ", " + runs["model.depth"].astype(str) + " layers"
    order = prefix.map(lambda name: ORDERS.get(name, name))
    return runs.assign(kind=kind.fillna(""), order=order, network=network.fillna("other"))
