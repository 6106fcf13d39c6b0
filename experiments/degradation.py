"""Degradation: deeper plain networks train worse, deeper residual networks train better

He et al. 2015 (Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2 and
figure 6) train networks of increasing depth with and without shortcuts. The deeper a plain network
is, the higher its final training error, so overfitting is not the cause. With shortcuts that add no
parameters the order reverses, and depth lowers both training and test error. A training error is
the mean over the last `train.log_every` steps, in training mode on images as the config augments
them.

The sweep trains each depth without shortcuts ("none", plain) and with the paper's option A ("pad",
residual), with several seeds. The paper shows the effect for blocks of two layers only. The same
question for bottlenecks, at the depths that exist for them, is

    resjax sweep experiments/degradation.py --config=configs/quickstart.py --workdir=DIR \\
        --config.sweep.blocks=bottleneck --config.sweep.depths=11,20,56
"""

from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.claims import Claim, compare, worse_and_better
from resjax.analysis.final_values import FAILS, Published, by_depth
from resjax.analysis.runs import primary_metrics, training_column, varying
from resjax.analysis.setting_names import setting_names
from resjax.sweeps import param, product

PUBLISHED = (  # of networks of basic blocks
    # Depth 110 is the mean of five runs; the paper's 6.43 is the best of them. For plain networks
    # the paper reports no numbers except that plain-110 stays above 60 %.
    Published("He et al. 2015", "plain", {110: FAILS}),
    Published(
        "He et al. 2015",
        "residual",
        {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: (6.61, 0.16)},
    ),
    Published("nabla0001/resnet", "plain", {20: (9.78, 0.13), 56: (12.95, 0.22)}),
    Published(
        "nabla0001/resnet", "residual", {20: (8.51, 0.22), 56: (7.40, 0.27), 110: (7.14, 0.20)}
    ),
    Published(
        "a-martyn/resnet, best epoch",
        "plain",
        {20: 9.5, 32: 9.92, 44: 11.35, 56: 12.76},
    ),
    Published(
        "a-martyn/resnet, best epoch",
        "residual",
        {20: 8.0, 32: 7.51, 44: 7.38, 56: 7.33},
    ),
    Published(
        "gcr/torch-residual-networks",
        "residual",
        {20: 8.29, 32: 7.63, 44: 7.14, 56: 6.94, 110: 6.73},
    ),
)


def sweep(
    depths: Iterable[int] = (20, 32, 44, 56, 110),
    shortcuts: Iterable[str] = ("none", "pad"),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
    blocks: Iterable[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run; without `blocks` the config's block is trained."""
    block = param("model.block", blocks) if (blocks := tuple(blocks)) else product()
    yield from product(
        block,
        param("model.depth", depths),
        param("model.shortcut", shortcuts),
        param("seed", seeds),
    )


@draw.style()
def figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws the curves of each network and their final values against depth."""
    runs = runs.assign(network=network_names(runs))
    drawn = {}
    if len(curves):
        columns = runs[["folder", "network", "model.depth"]]
        drawn["degradation"] = draw.metric_curves(
            curves.merge(columns, on="folder"),
            panel="network",
            series="model.depth",
            label="{} layers",
            width=draw.TEXT_WIDTH if runs["network"].nunique() > 1 else draw.COLUMN_WIDTH,
        )
    if (runs["finished"] | runs["diverged"]).any():
        [metric] = primary_metrics(runs)
        published = PUBLISHED if "basic" in set(runs["model.block"]) else ()
        drawn[f"final_{metric.name}"] = by_depth(runs, series="network", published=published)
    return drawn


def network_names(runs: pd.DataFrame) -> pd.Series:
    """Returns "plain" or "residual" for each run, with everything else that the sweep varies."""
    residual = runs["model.shortcut"] != "none"
    names = residual.map({False: "plain", True: "residual"})
    several = runs.loc[residual, "model.shortcut"].nunique() > 1
    names = names.where(~(residual & several), names + ", " + runs["model.shortcut"])
    others = [name for name in varying(runs) if name not in ("model.depth", "model.shortcut")]
    return names + ", " + setting_names(runs, others) if others else names


def claims(runs: pd.DataFrame) -> list[Claim]:
    """Compares the deepest with the shallowest networks, and residual with plain ones."""
    others = [name for name in varying(runs) if name not in ("model.depth", "model.shortcut")]
    if "model.block" not in others and not of_basic_blocks(runs):
        others.insert(0, "model.block")
    groups = runs.groupby(setting_names(runs, others), sort=False) if others else [("", runs)]
    return [
        claim
        for setting, group in groups
        for shortcut in dict.fromkeys(group["model.shortcut"])
        if shortcut != "none"
        for claim in _claims_of(group, shortcut, f" ({setting})" if setting else "")
    ]


def of_basic_blocks(runs: pd.DataFrame) -> bool:
    """Returns whether all networks have the basic blocks of the published numbers."""
    return set(runs["model.block"]) == {"basic"}


def _claims_of(runs: pd.DataFrame, shortcut: str, setting: str) -> list[Claim]:
    """Returns the claims about plain networks and those with one shortcut."""
    low, high = int(runs["model.depth"].min()), int(runs["model.depth"].max())
    [metric] = primary_metrics(runs)
    worse, better = worse_and_better(runs)
    train, test = training_column(runs, metric.name), f"test_{metric.name}"
    words = {"plain": {"model.shortcut": "none"}, "residual": {"model.shortcut": shortcut}}

    def name(network: str, depth: int) -> str:
        return f"{network}, {depth} layers"

    def of(network: str, depth: int) -> dict[str, Any]:
        return {**words[network], "model.depth": depth}

    def claim(statement: str, published: str, first: Any, second: Any, **options: Any) -> Claim:
        return compare(
            runs,
            f"{statement}{setting}",
            "He et al. 2015, section 4.2 and figure 6",
            published if of_basic_blocks(runs) else "no number for these blocks",
            treatment=of(*first),
            control=of(*second),
            names=(name(*first), name(*second)),
            **options,
        )

    return [
        claim(
            "The deepest plain network has a higher training error than the shallowest",
            "drawn for 20 to 56 layers; plain-110 stays above 60 %",
            ("plain", high),
            ("plain", low),
            value=train,
            expected=worse,
        ),
        claim(
            "The deepest residual network has a lower training error than the shallowest",
            "drawn for 20 to 110 layers",
            ("residual", high),
            ("residual", low),
            value=train,
            expected=better,
        ),
        claim(
            "The deepest residual network has a lower test error than the shallowest",
            "8.75 % (20 layers) to 6.61 ± 0.16 % (110 layers)",
            ("residual", high),
            ("residual", low),
            value=test,
            expected=better,
        ),
        claim(
            "At the largest depth, shortcuts lower the training error",
            "plain-110 above 60 %, residual-110 far below",
            ("residual", high),
            ("plain", high),
            value=train,
            expected=better,
        ),
        claim(
            "At the largest depth, shortcuts lower the test error",
            "plain-110 above 60 %, residual-110 6.61 ± 0.16 %",
            ("residual", high),
            ("plain", high),
            value=test,
            expected=better,
        ),
    ]
