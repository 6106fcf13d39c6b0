"""Near identity: a residual network survives the loss of any block, a plain one of none

Veit et al. 2016 (Residual Networks Behave Like Ensembles of Relatively Shallow Networks, arXiv
1605.06431, sections 4.1 to 4.3) delete blocks of trained networks, and exchange blocks of equal
shape. Deleting any one layer of VGG brings it to chance. A ResNet-110 on CIFAR-10 hardly changes,
except where a block that changes the shape is deleted; its error grows smoothly with the number of
deleted blocks, and with the distance of their order from that of training. He et al. 2015 (Deep
Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2) find that each layer of a
deeper residual network changes its input less.

The sweep trains plain and residual networks. `measure` deletes each block in turn, then several at
random, and swaps random pairs of blocks that keep the shape, and evaluates on the test set. A
deleted block passes its input on, in a plain network too, as option A does. Diagnostics measure how
near a block is to the identity: the branch's share of the sum, and the cosine between the block's
input and output.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.claims import Claim, compare, trend, within, worse_and_better
from resjax.analysis.profiles import profiles
from resjax.analysis.runs import primary_metrics
from resjax.run_files import Metric
from resjax.sweeps import param, product

if TYPE_CHECKING:
    from resjax.measurements import FinishedRun

SHARE, COSINE = "branch_share", "input_output_cosine"
LESIONS = ("none", "one deleted", "several deleted", "swapped")
LEARNED = 0.1  # of the error below that of a guess, from which on a run has something to lose
DRAWS = 5
"""Random choices of blocks for each number of deletions, and of pairs for each number of swaps."""


def sweep(
    depths: Iterable[int] = (20, 56, 110),
    shortcuts: Iterable[str] = ("none", "pad"),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
    every: int = 64_000,
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run; `every` is the number of steps between diagnostics."""
    yield from product(
        param("model.depth", depths),
        param("model.shortcut", shortcuts),
        param("seed", seeds),
        param("diagnostics.every", (every,)),
        param("diagnostics.names", ((SHARE, COSINE),)),
    )


def measure(run: "FinishedRun") -> list[dict[str, Any]]:
    """Returns the test metrics after each lesion, and without any."""
    from resjax.measurements import (
        LesionedModel,
        block_names,
        delete,
        kendall_tau,
        permute,
        random_orders,
    )

    model, blocks = LesionedModel(run.model), block_names(run.model)
    rng = np.random.default_rng(run.config.seed)

    def without(*names: str) -> dict[str, float]:
        return run.evaluate(delete(run.model, run.variables, names), model)

    chance = 1 - 1 / len(run.task.dataset.class_names)  # the error of a guess
    rows: list[dict[str, Any]] = [{"lesion": "none", "chance": chance, **without()}]
    for index, block in enumerate(blocks):
        changes_shape = index > 0 and block.endswith("/block1")
        where = {"block": block, "position": index + 1, "changes_shape": changes_shape}
        rows.append({"lesion": "one deleted", **where, **without(block)})
    for count in sorted({round(share * len(blocks)) for share in np.linspace(0.1, 0.9, 9)} - {0}):
        for _ in range(DRAWS):
            chosen = rng.choice(blocks, count, replace=False)
            rows.append({"lesion": "several deleted", "deleted": count, **without(*chosen)})
    if max(run.model.stages) > 2:
        for swaps in (1, 2, 4, 8, 16, 32):
            for _ in range(DRAWS):
                orders = random_orders(run.model, swaps, rng)
                found = run.evaluate(permute(run.model, run.variables, orders))
                order = {"swaps": swaps, "tau": kendall_tau(orders)}
                rows.append({"lesion": "swapped", **order, **found})
    return rows


@draw.style()
def figures(
    runs: pd.DataFrame, layers: pd.DataFrame, measurements: pd.DataFrame
) -> dict[str, Figure]:
    """Draws the error after each kind of lesion, and how near blocks are to the identity."""
    [metric] = primary_metrics(runs)
    runs = described(runs)
    drawn = {}
    if SHARE in layers:
        drawn["identity"] = identity_profiles(runs, layers)
    if "lesion" in measurements:
        lesions = runs[["folder", "network", "model.depth"]].merge(measurements, on="folder")
        lines = {
            "one_deleted": ("one deleted", "position", "deleted block, from the first"),
            "several_deleted": ("several deleted", "deleted", "number of deleted blocks"),
            "swapped": ("swapped", "tau", "order of the blocks (Kendall's tau)"),
        }
        for name, (lesion, along, label) in lines.items():
            chosen = lesions[lesions["lesion"].isin([lesion, "none"])]
            if (chosen["lesion"] == lesion).any():
                drawn[name] = lesion_lines(chosen, metric, along, label)
    return drawn


def lesion_lines(lesions: pd.DataFrame, metric: Metric, along: str, label: str) -> Figure:
    """Draws the test metric after lesions against a column, and dashed without a lesion.

    Several lesions of a run at the same place are averaged before the mean and the deviation over
    seeds are computed.
    """
    depths = sorted(lesions["model.depth"].unique())
    palette = draw.colors(lesions["network"])
    figure, grid = draw.panels(len(depths), height=2.6)
    if along == "tau":
        grid[0].invert_xaxis()  # from the order of training on; the panels share the axis
    for axes, depth in zip(grid, depths, strict=True):
        axes.set_title(f"{depth} layers")
        ends = []
        for network, color in palette.items():
            own = lesions[(lesions["model.depth"] == depth) & (lesions["network"] == network)]
            if own.empty:
                continue
            intact = own.loc[own["lesion"] == "none", metric.name].mean()
            axes.axhline(intact, color=color, linestyle=(0, (3, 2)), linewidth=0.7)
            each_run = own.groupby([along, "folder"])[metric.name].mean()
            found = each_run.groupby(along).agg(["mean", "std", "count"])
            x = found.index.to_series()
            mean, deviation, seeds = found["mean"], found["std"], found["count"]
            draw.draw_error_bars(axes, x, mean, deviation, color, seeds=seeds)
            last = 0 if along == "tau" else -1
            ends.append(draw.LineEnd(x.iloc[last], found["mean"].iloc[last], network, color))
        draw.note(axes, "text", ["Dashed lines are the networks without a lesion."])
        draw.set_metric_axis(axes, metric, "test ")
        axes.set_xlabel(label)
        axes.label_outer()
        draw.label_ends(axes, ends)
    return figure


def identity_profiles(runs: pd.DataFrame, layers: pd.DataFrame) -> Figure:
    """Draws the share of the branch and the cosine of the blocks, after the last step."""
    columns = runs[["folder", "network", "model.depth"]]
    last = blocks_at_the_end(layers).merge(columns, on="folder")
    panels = {SHARE: "share of the branch", COSINE: "cosine of input and output"}
    several = last["model.depth"].nunique() > 1
    names = last["network"]
    if several:
        names = names + last["model.depth"].map(", {} layers".format)
    parts = [
        pd.DataFrame({"panel": title, "series": names, "x": last["position"], "value": last[name]})
        for name, title in panels.items()
    ]
    return profiles(
        pd.concat(parts), xlabel="block, from the first (0) to the last (1)", ylabel="value"
    )


def blocks_at_the_end(layers: pd.DataFrame) -> pd.DataFrame:
    """Returns what diagnostics measured in each block after the last step.

    Returns:
        The rows of blocks with `position`, 0 at the first block and 1 at the last.
    """
    blocks = layers[layers[SHARE].notna()]
    blocks = blocks[blocks["step"] == blocks.groupby("folder")["step"].transform("max")]
    groups = blocks.groupby("folder", sort=False)[SHARE]
    position = groups.cumcount() / (groups.transform("size") - 1).clip(lower=1)
    return blocks.assign(position=position)


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds the column `network`: "plain" or "residual"; with several shortcuts, which."""
    shortcut = runs["model.shortcut"]
    names = shortcut.map(lambda name: "plain" if name == "none" else "residual")
    several = shortcut[shortcut != "none"].nunique() > 1
    return runs.assign(network=names + (", " + shortcut).where((shortcut != "none") & several, ""))


def claims(runs: pd.DataFrame, layers: pd.DataFrame, measurements: pd.DataFrame) -> list[Claim]:
    """Judges whether residual networks survive lesions that plain ones do not."""
    if "lesion" not in measurements or SHARE not in layers:
        return []
    [metric] = primary_metrics(runs)
    worse, better = worse_and_better(runs)
    above: dict[str, Any] = {"lowest": 0.0}
    below: dict[str, Any] = {"highest": 0.0}
    rises, falls = (above, below) if worse == "higher" else (below, above)
    means = blocks_at_the_end(layers).groupby("folder", as_index=False)[[SHARE, COSINE]].mean()
    runs = runs.merge(lesion_effects(measurements, metric), on="folder")
    runs = runs.merge(means, on="folder", how="left")
    plain, residual = {"model.shortcut": "none"}, {"model.shortcut": "pad"}
    deepest = {"model.depth": runs["model.depth"].max()}
    veit = "Veit et al. 2016 (1605.06431), section 4.{}"
    deletions = [
        compare(
            runs,
            f"The deletion of one block destroys less of what a residual network of {depth} layers "
            "has above chance than of what a plain one has",
            veit.format(1),
            "ResNet-110 hardly changes, VGG falls to chance",
            value=f"lost_{metric.name}",
            treatment={**residual, "model.depth": depth},
            control={**plain, "model.depth": depth},
            expected=better,
            names=("residual", "plain"),
        )
        for depth in sorted(runs["model.depth"].unique())
    ]
    return [
        *deletions,
        within(
            runs,
            "In a residual network the deletion of a block that changes the shape does more harm "
            "than that of another one",
            veit.format(1),
            "the exceptions in figure 3",
            value=f"shape_{metric.name}",
            label="difference",
            where=residual,
            **rises,
        ),
        within(
            runs,
            "The more blocks of a residual network are deleted, the worse it is",
            veit.format(2),
            "a smooth rise of the error, figure 5 (a)",
            value="deleted_correlation",
            label="rank correlation",
            where={**residual, **deepest},
            **rises,
        ),
        within(
            runs,
            "The more the order of its blocks differs from that of training, the worse a residual "
            "network is",
            veit.format(3),
            "a smooth rise of the error, figure 5 (b)",
            value="order_correlation",
            where={**residual, **deepest},
            label="rank correlation",
            **falls,  # Kendall's tau is 1 for the order of training
        ),
        compare(
            runs,
            "The blocks of a residual network keep the direction of their input more than those of "
            "a plain one",
            "He et al. 2015 (1512.03385), section 3.1",
            "no numbers",
            value=COSINE,
            treatment=residual,
            control=plain,
            expected="higher",
            names=("residual", "plain"),
        ),
        trend(
            runs,
            "The deeper a residual network, the less each block adds to its input",
            "He et al. 2015 (1512.03385), section 4.2",
            "smaller responses in figure 7",
            value=SHARE,
            where=residual,
            expected="lower",
        ),
    ]


def better_than_chance(intact: pd.DataFrame, metric: Metric) -> float:
    """Returns how much better than chance the error of a run is; NaN if it has learned too little.

    For a metric other than an error, whose value for a guess is not known, returns 1.
    """
    if metric.name != "error" or "chance" not in intact:
        return 1.0
    better = float((intact["chance"] - intact[metric.name]).mean())
    return better if better >= LEARNED else np.nan


def lesion_effects(measurements: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Returns what lesions do to each run.

    Returns:
        One row per run: `folder`; `lost_METRIC`, the mean change of the metric if one block is
        deleted, as a share of what the run is better than chance, because a network that has
        learned little has little to lose; `shape_METRIC`, how much larger the change is for blocks
        that change the shape; and the rank correlations of the metric with the number of deleted
        blocks, `deleted_correlation`, and with Kendall's tau of their order, `order_correlation`.
        NaN without such lesions.
    """
    rows = []
    for folder, run in measurements.groupby("folder", sort=False):
        kinds = {kind: run[run["lesion"] == kind] for kind in LESIONS}
        intact = kinds["none"][metric.name].mean()
        one = kinds["one deleted"]
        change = one[metric.name] - intact
        shape = one["changes_shape"].astype(bool)
        pairs = {"deleted": "several deleted", "tau": "swapped"}
        row: dict[str, Any] = {
            "folder": folder,
            f"lost_{metric.name}": change.mean() / better_than_chance(kinds["none"], metric),
            f"shape_{metric.name}": change[shape].mean() - change[~shape].mean(),
        }
        for along, kind in pairs.items():
            lesions = kinds[kind].reindex(columns=[along, metric.name]).astype(float)
            name = "order" if along == "tau" else along
            row[f"{name}_correlation"] = lesions[along].corr(lesions[metric.name], "spearman")
        rows.append(row)
    return pd.DataFrame(rows)
