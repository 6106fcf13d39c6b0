"""Layer responses: residual layers respond less than plain ones, and less in deeper networks

He et al. 2015 (Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2 and
figure 7) measure the standard deviation of the output of each 3x3 layer after BN, before the ReLU
and the addition. They conclude that residual functions are generally closer to zero than those of
plain networks, and that a layer of a deeper residual network changes its signal less. The figure
has no numbers; its networks are plain-20 and 56 and ResNet-20, 56 and 110 on CIFAR-10.

The sweep trains these networks and records the mean and the standard deviation of each response,
over the images of a training batch, their pixels and the channels, in training mode. With BN the
standard deviation follows the scales that BN has learned, which start at 1. It says nothing about
networks that have hardly been trained.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.claims import Claim, compare, trend
from resjax.analysis.profiles import profiles
from resjax.sweeps import chain, param, product

DEVIATION = "response_std"
NAMES = {"none": "plain", "pad": "residual"}


def sweep(
    plain_depths: Iterable[int] = (20, 56),
    residual_depths: Iterable[int] = (20, 56, 110),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
    every: int = 4000,
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run.

    Args:
      plain_depths: Weight layers of the plain networks.
      residual_depths: Weight layers of the residual networks.
      seeds: Seeds.
      every: Steps between two measurements of the responses; the last step is one of them.
    """
    yield from product(
        chain(
            product(param("model.shortcut", ("none",)), param("model.depth", plain_depths)),
            product(param("model.shortcut", ("pad",)), param("model.depth", residual_depths)),
        ),
        param("seed", seeds),
        param("diagnostics.every", (every,)),
        param("diagnostics.names", ((DEVIATION, "response_mean"),)),
    )


@draw.style()
def figures(runs: pd.DataFrame, layers: pd.DataFrame) -> dict[str, Figure]:
    """Draws the responses at the end, in the order of the layers and by rank, and by step."""
    runs = described(runs)
    found = responses(layers).merge(runs[["folder", "network", "model.depth"]], on="folder")
    if found.empty:
        return {}
    found = found.rename(columns={"model.depth": "series", DEVIATION: "value"})
    last = found[found["step"] == found.groupby("folder")["step"].transform("max")]
    by_order = last.assign(x=last["layer_index"], panel=last["network"] + ", in order")
    by_rank = last.assign(x=last["rank"], panel=last["network"] + ", by size")
    look: dict[str, Any] = {"label": "{} layers", "log": True}
    mean = found.groupby(["folder", "network", "series", "step"], as_index=False)["value"].mean()
    return {
        "responses": profiles(
            pd.concat([by_order, by_rank]),
            xlabel="layer",
            ylabel="standard deviation of the response",
            **look,
        ),
        "training": profiles(
            mean.assign(x=mean["step"], panel=mean["network"]),
            xlabel="training steps",
            ylabel="mean over layers of the deviation",
            **look,
        ),
    }


def claims(runs: pd.DataFrame, layers: pd.DataFrame) -> list[Claim]:
    """Compares the mean over the layers of the responses' deviations at the end of training."""
    found = responses(layers)
    last = found[found["step"] == found.groupby("folder")["step"].transform("max")]
    mean = last.groupby("folder")[DEVIATION].mean().rename("response").reset_index()
    runs = described(runs).merge(mean, on="folder", how="left")
    both = set.intersection(
        *(set(runs.loc[runs["network"] == n, "model.depth"]) for n in NAMES.values())
    )
    source = "He et al. 2015, figure 7"
    return [
        compare(
            runs,
            "The layers of a residual network respond less than those of a plain one",
            source,
            "drawn, no numbers",
            value="response",
            treatment={"network": "residual", "model.depth": sorted(both)},
            control={"network": "plain", "model.depth": sorted(both)},
            expected="lower",
            equal=["model.depth"],
            names=("residual", "plain"),
        ),
        trend(
            runs,
            "The deeper the residual network, the less its layers respond",
            source,
            "drawn, no numbers",
            value="response",
            where={"network": "residual"},
            expected="lower",
        ),
    ]


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds the column `network`, "plain" or "residual"."""
    return runs.assign(network=runs["model.shortcut"].map(lambda name: NAMES.get(name, name)))


def responses(layers: pd.DataFrame) -> pd.DataFrame:
    """Returns the responses of the blocks' layers, with the index and the rank of each.

    Returns:
        The rows of `layers` in blocks, without shortcuts, and the columns `layer_index` and `rank`
        from 1, the rank in descending order of the standard deviation.
    """
    if DEVIATION not in layers:
        layers = layers.assign(**{DEVIATION: float("nan")})
    inside = layers["layer"].str.match(r"stage\d+/block\d+/(?!shortcut)")
    found = layers[inside & layers[DEVIATION].notna()]
    groups = found.groupby(["folder", "step"])
    rank = groups[DEVIATION].rank(method="first", ascending=False)
    return found.assign(layer_index=groups.cumcount() + 1, rank=rank)
