"""Gradient flow: plain networks degrade although their gradients do not vanish

He et al. 2015 (Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.1) argue
that degradation is unlikely to be caused by vanishing gradients: their plain networks have batch
normalization, and the authors "verify that the backward propagated gradients exhibit healthy norms
with BN". They give no numbers. Yang et al. 2019 (A Mean Field Theory of Batch Normalization, arXiv
1902.08129) predict that at initialization the gradients of a plain network with BN explode towards
its input, by a factor that is exponential in the depth. He et al. 2015 (Delving Deep into
Rectifiers, arXiv 1502.01852) initialize networks without normalization so that gradients keep their
size. Their derivation leaves out zero padding, which takes a part of the signal at every border: in
a 3x3 convolution of 8 x 8 pixels, the last stage of CIFAR networks, 16 % of the products are with
zeros, and of 2 x 2 pixels, the last stage on the digits of 8 x 8 pixels, 56 %.

The sweep trains plain and residual networks with and without BN, over depth. Without BN each
channel has a bias, and a smaller learning rate. The measured quantity is the norm of the gradient
of the loss with respect to the output of each block, over all examples of a batch, at
initialization and through training. A gradient vanishes if its norm at the first block is less than
a tenth of that at the last one, and explodes if it is more than ten times as large.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.claims import Claim, compare, trend, within, worse_and_better
from resjax.analysis.final_values import by_depth
from resjax.analysis.profiles import profiles
from resjax.analysis.runs import primary_metrics, training_column
from resjax.run_files import Metric
from resjax.sweeps import chain, param, product

NORM = "activation_gradient_norm"
UNIT = "decades"
"""The unit of the change of a gradient's norm from the last block to the first: its log10."""


def sweep(
    depths: Iterable[int] = (20, 56, 110),
    shortcuts: Iterable[str] = ("none", "pad"),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
    every: int = 1000,
    rate_without_norm: float = 0.01,
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run.

    Args:
      depths: Weight layers.
      shortcuts: Shortcuts; "none" is a plain network.
      seeds: Seeds.
      every: Steps between two measurements of the gradients.
      rate_without_norm: Learning rate of the networks without BN.
    """
    without = {"model.norm": "none", "optimizer.learning_rate": rate_without_norm}
    yield from product(
        chain(param("model.norm", ("batch",)), [without]),
        param("model.shortcut", shortcuts),
        param("model.depth", depths),
        param("seed", seeds),
        param("diagnostics.every", (every,)),
        param("diagnostics.names", ((NORM, "gradient_norm"),)),
        # Networks without BN can diverge; their gradients before that are recorded, too.
        param("train.nonfinite", ("record",)),
    )


@draw.style()
def figures(runs: pd.DataFrame, layers: pd.DataFrame) -> dict[str, Figure]:
    """Draws gradients by block and by step, and final errors by depth."""
    runs = described(runs)
    names = {"network": "panel", "model.depth": "series"}
    columns = runs[["folder", *names]].rename(columns=names)
    blocks = block_gradients(layers).rename(columns={"relative": "value"})
    blocks = columns.merge(blocks, on="folder")
    drawn = {}
    if len(blocks):
        look: dict[str, Any] = {"label": "{} layers", "log": True}
        initial = blocks[blocks["step"] == blocks["step"].min()]
        drawn["initialization"] = profiles(
            initial.assign(x=initial["position"]),
            xlabel="block, from the first (0) to the last (1)",
            ylabel="gradient norm / that of the last block",
            **look,
        )
        first = blocks[blocks["position"] == 0]
        drawn["training"] = profiles(
            first.assign(x=first["step"]),
            xlabel="training steps",
            ylabel="gradient norm, first / last block",
            **look,
        )
    if (runs["finished"] | runs["diverged"]).any():
        drawn["degradation"] = by_depth(runs, series="network")
    return drawn


def claims(runs: pd.DataFrame, layers: pd.DataFrame) -> list[Claim]:
    """Judges whether gradients vanish, and whether plain networks degrade all the same."""
    runs = described(runs).merge(gradient_changes(layers), on="folder", how="left")
    [metric] = primary_metrics(runs)
    shallow, deep = runs["model.depth"].min(), runs["model.depth"].max()
    plain = {"network": "plain, BN", "model.depth": deep}
    residual = {"network": "residual, BN", "model.depth": deep}
    he, verified = "He et al. 2015 (1512.03385), section 4.1", "healthy norms, no numbers"
    return [
        change_within(
            runs,
            "At initialization the gradients of a deep plain network with BN do not vanish",
            he,
            verified,
            value="initial",
            where=plain,
            lowest=-1,
        ),
        change_within(
            runs,
            "Nor do they vanish at any time in training",
            he,
            verified,
            value="lowest",
            where=plain,
            lowest=-1,
        ),
        change_within(
            runs,
            "In training they are healthy: they neither vanish nor explode",
            he,
            verified,
            value="typical",
            where=plain,
            lowest=-1,
            highest=1,
        ),
        compare(
            runs,
            "Nevertheless a deeper plain network with BN has a higher training error",
            he,
            "figures 1 and 6",
            value=training_column(runs, metric.name),
            treatment=plain,
            control={**plain, "model.depth": shallow},
            expected=worse_and_better(runs)[0],
        ),
        trend(
            runs,
            "At initialization the gradients of a plain network with BN explode towards the input, "
            "the more the deeper it is",
            "Yang et al. 2019 (1902.08129)",
            "a factor that is exponential in the depth",
            value="initial",
            where={"network": "plain, BN"},
            expected="higher",
        ),
        change_within(
            runs,
            "With the initialization of He et al. the gradients of a deep plain network without "
            "normalization keep their size",
            "He et al. 2015 (1502.01852), section 2.2",
            "a condition on the variance of the weights, without zero padding",
            value="initial",
            where={**plain, "network": "plain, no norm"},
            lowest=-1,
            highest=1,
        ),
        compare(
            runs,
            "At initialization the gradients of a residual network with BN change less from the "
            "output to the input than those of a plain one",
            "Yang et al. 2019 (1902.08129)",
            "no numbers",
            value="initial_size",
            treatment=residual,
            control=plain,
            expected="lower",
        ),
    ]


def change_within(
    runs: pd.DataFrame,
    statement: str,
    source: str,
    published: str,
    *,
    value: str,
    where: dict[str, Any],
    lowest: float,
    highest: float = np.inf,
) -> Claim:
    """Judges the claim that a change of the gradient is above `lowest` and below `highest`."""
    return within(
        *(runs, statement, source, published),
        value=value,
        where=where,
        lowest=lowest,
        highest=highest,
        unit=Metric(value, unit=UNIT),
        label="change from the last block to the first",
    )


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds the column `network`: "plain, BN", "residual, no norm", ..."""
    kind = runs["model.shortcut"].map(lambda name: "plain" if name == "none" else "residual")
    norm = runs["model.norm"].map(lambda name: {"batch": "BN", "none": "no norm"}.get(name, name))
    return runs.assign(network=kind + ", " + norm)


def block_gradients(layers: pd.DataFrame) -> pd.DataFrame:
    """Returns the norms of the blocks' gradients relative to that of the last block.

    Returns:
        One row per run, step and block: `folder`, `step`, `position` (0 at the first block, 1 at
        the last) and `relative`; NaN if a norm is not finite or zero.
    """
    if NORM not in layers:
        return pd.DataFrame(columns=["folder", "step", "position", "relative"])
    # The first block of the made-up runs of a launch is the stem.
    blocks = layers[layers[NORM].notna() | layers["layer"].str.fullmatch(r"stage\d+/block\d+")]
    groups = blocks.groupby(["folder", "step"], sort=False)[NORM]
    index, count = groups.cumcount(), groups.transform("size")
    last = groups.transform(lambda norms: norms.iloc[-1])
    relative = (blocks[NORM] / last).where((blocks[NORM] > 0) & (last > 0))
    position = index / (count - 1).clip(lower=1)
    return blocks[["folder", "step"]].assign(position=position, relative=relative)


def gradient_changes(layers: pd.DataFrame) -> pd.DataFrame:
    """Returns how the gradient changes from the last block to the first, in decades.

    Returns:
        One row per run: `folder`, `initial` at the first measured step, its size `initial_size`,
        `lowest` and `typical` (the median) over the later steps.
    """
    first = block_gradients(layers).query("position == 0")
    change = first.assign(change=np.log10(first["relative"].astype(float)))
    rows = []
    for folder, run in change.groupby("folder", sort=False):
        initial, later = run["change"].iloc[0], run["change"].iloc[1:]
        rows.append((folder, initial, abs(initial), later.min(), later.median()))
    columns = ["folder", "initial", "initial_size", "lowest", "typical"]
    return pd.DataFrame(rows, columns=columns)
