"""Identity mappings: every change of the identity shortcut makes a deep network worse

He et al. 2016 (Identity Mappings in Deep Residual Networks, arXiv 1603.05027, section 3 and table
1) put scales, gates, convolutions and dropout into the shortcuts of ResNet-110. The signal that a
block receives then reaches later blocks times a product of these factors. All variants have a
higher test error on CIFAR-10 than identities (6.61 %), and many fail, which is above 20 %, although
gates and convolutions could learn the identity.

The sweep trains each depth with each of these shortcuts.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.claims import Claim, compare, worse_and_better
from resjax.analysis.final_values import FAILS, Published, by_category, curves_and_final
from resjax.analysis.runs import name_settings, primary_metrics
from resjax.sweeps import choose, param, product


def shortcut(name: str, **options: float) -> dict[str, Any]:
    """Returns the overrides that set a shortcut and its options."""
    fields = {f"model.shortcut_options.{option}": value for option, value in options.items()}
    return {"model.shortcut": name, **fields}


IDENTITY = "identity"

SHORTCUTS = {
    IDENTITY: shortcut("pad"),
    "none (plain)": shortcut("none"),
    "scale 0.5": shortcut("scale", factor=0.5, branch_factor=1.0),
    "scale 0.5, branch 0.5": shortcut("scale", factor=0.5, branch_factor=0.5),
    "exclusive gate, bias 0": shortcut("exclusive_gate", bias=0.0),
    "exclusive gate, bias -6": shortcut("exclusive_gate", bias=-6.0),
    "exclusive gate, bias -7": shortcut("exclusive_gate", bias=-7.0),
    "shortcut gate, bias 0": shortcut("shortcut_gate", bias=0.0),
    "shortcut gate, bias -6": shortcut("shortcut_gate", bias=-6.0),
    "1x1 convolution": shortcut("conv"),
    "dropout 0.5": shortcut("dropout", rate=0.5),
}

ERRORS = (6.61, FAILS, FAILS, 12.35, FAILS, 8.70, 9.81, 12.86, 6.91, 12.22, FAILS)

PUBLISHED = (
    Published(
        "He et al. 2016, median of five",
        "110 layers",
        dict(zip(SHORTCUTS, ERRORS, strict=True)),
        setting="CIFAR-10, 110 layers",
    ),
)


def sweep(
    depths: Iterable[int] = (110,),
    shortcuts: Iterable[str] = tuple(SHORTCUTS),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run; `shortcuts` are names of `SHORTCUTS`."""
    depths, seeds = tuple(depths), tuple(seeds)
    for chosen in choose(SHORTCUTS, shortcuts):
        yield from product(param("model.depth", depths), [chosen], param("seed", seeds))


@draw.style()
def figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws the curves of each shortcut and the final errors."""
    final = partial(
        by_category, category="network", series="layers", published=PUBLISHED, order=SHORTCUTS
    )
    return curves_and_final(described(runs), curves, panel="network", shortcuts=final)


def claims(runs: pd.DataFrame) -> list[Claim]:
    """Compares each shortcut with the identity at the greatest depth."""
    [metric] = primary_metrics(runs)
    worse, _ = worse_and_better(runs)
    deepest = described(runs[runs["model.depth"] == runs["model.depth"].max()])
    published = PUBLISHED[0].points
    return [
        compare(
            deepest,
            f"With the shortcut “{name}” a network has a higher test error than with identities",
            "He et al. 2016, table 1",
            f"{error(published[name])} against {error(published[IDENTITY])} (110 layers, CIFAR-10)",
            value=f"test_{metric.name}",
            treatment={"network": name},
            control={"network": IDENTITY},
            expected=worse,
        )
        for name in SHORTCUTS
        if name != IDENTITY
    ]


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds the columns `network`, the name of the shortcut, and `layers`, that of the depth."""
    network = name_settings(runs, SHORTCUTS)
    return runs.assign(network=network, layers=runs["model.depth"].map("{} layers".format))


def error(value: tuple[float, float]) -> str:
    """Returns a published error as text."""
    return "more than 20 %" if value[0] == FAILS else f"{value[0]} %"
