"""Degradation: deeper plain networks train worse, deeper residual networks train better

He et al. 2015 (Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2 and
figure 6) train networks of increasing depth with and without shortcuts. The deeper a plain network
is, the higher its final training error, so overfitting is not the cause. With shortcuts that add no
parameters the order reverses, and depth lowers both training and test error. A training error is
the mean over the last `train.log_every` steps, in training mode on images as the
config augments them.

The sweep trains each depth without shortcuts ("none", plain) and with the paper's option A ("pad",
residual), with several seeds.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from resjax.analysis import figures as draw
from resjax.analysis.runs import describe, primary_metrics, summarize, varying
from resjax.run_files import Metric
from resjax.sweeps import param, product


class Published(NamedTuple):
    """Published test errors on CIFAR-10 in per cent: for each depth the error and its deviation."""

    source: str
    network: str
    errors: dict[int, tuple[float, float | None]]


PUBLISHED = (
    # Depth 110 is the mean of five runs; the paper's 6.43 is the best of them. For plain networks
    # the paper reports no numbers except that plain-110 stays above 60 %.
    Published(
        "He et al. 2015",
        "residual",
        {
            20: (8.75, None),
            32: (7.51, None),
            44: (7.17, None),
            56: (6.97, None),
            110: (6.61, 0.16),
            1202: (7.93, None),
        },
    ),
    Published("nabla0001/resnet", "plain", {20: (9.78, 0.13), 56: (12.95, 0.22)}),
    Published(
        "nabla0001/resnet", "residual", {20: (8.51, 0.22), 56: (7.40, 0.27), 110: (7.14, 0.20)}
    ),
    Published(
        "a-martyn/resnet, best epoch",
        "plain",
        {20: (9.5, None), 32: (9.92, None), 44: (11.35, None), 56: (12.76, None)},
    ),
    Published(
        "a-martyn/resnet, best epoch",
        "residual",
        {20: (8.0, None), 32: (7.51, None), 44: (7.38, None), 56: (7.33, None)},
    ),
    Published(
        "gcr/torch-residual-networks",
        "residual",
        {20: (8.29, None), 32: (7.63, None), 44: (7.14, None), 56: (6.94, None), 110: (6.73, None)},
    ),
)

SOURCES = tuple(dict.fromkeys(row.source for row in PUBLISHED))


def sweep(
    depths: Iterable[int] = (20, 32, 44, 56, 110),
    shortcuts: Iterable[str] = ("none", "pad"),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run."""
    yield from product(
        param("model.depth", depths), param("model.shortcut", shortcuts), param("seed", seeds)
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
            label="{}-layer",
            width=draw.TEXT_WIDTH if runs["network"].nunique() > 1 else draw.COLUMN_WIDTH,
        )
    if (runs["finished"] | runs["diverged"]).any():
        [metric] = primary_metrics(runs)
        drawn[f"final_{metric.name}"] = final_metric(runs, metric)
    return drawn


def network_names(runs: pd.DataFrame) -> pd.Series:
    """Returns "plain" or "residual" for each run, with everything else that the sweep varies."""
    residual = runs["model.shortcut"] != "none"
    names = residual.map({False: "plain", True: "residual"})
    several = runs.loc[residual, "model.shortcut"].nunique() > 1
    names = names.where(~(residual & several), names + ", " + runs["model.shortcut"])
    others = [name for name in varying(runs) if name not in ("model.depth", "model.shortcut")]
    return names + ", " + describe(runs, others) if others else names


def final_metric(runs: pd.DataFrame, metric: Metric) -> Figure:
    """Draws the metric at the end of training against depth, on CIFAR-10 with published errors."""
    results = summarize(runs, by=["network", "model.depth"]).sort_values("model.depth")
    figure, [axes] = draw.panels(1, width=draw.COLUMN_WIDTH, height=2.7)
    palette = draw.colors(runs["network"])
    ends = []
    handles = draw.legend_handles(diverged=bool(results["diverged"].any()))
    for network, color in palette.items():
        of_network = results[results["network"] == network]
        for depth in of_network.loc[of_network["diverged"] > 0, "model.depth"]:
            draw.draw_diverged(axes, depth, color)
        result = of_network[of_network["seeds"] > 0]
        for split in ("train", "test"):
            name = f"{split}_{metric.name}"
            mean, deviation = result[f"{name}_mean"], result[f"{name}_std"]
            draw.draw_error_bars(
                axes, result["model.depth"], mean, deviation, color, bold=split == "test"
            )
        if len(result):
            depth, final = result.iloc[-1][["model.depth", f"test_{metric.name}_mean"]]
            ends.append(draw.LineEnd(depth, final, network, color))
    depths = sorted(runs["model.depth"].unique())
    if metric.name == "error" and (runs["data.name"] == "cifar10").all():
        handles += draw_published(axes, palette, depths)
    # Published depths increase by factors, so equal factors have equal distances.
    axes.set_xscale("log")
    axes.set_xlim(depths[0] / 1.08, depths[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(depths))
    axes.xaxis.set_major_formatter(FixedFormatter([str(depth) for depth in depths]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("depth (layers)")
    draw.set_metric_axis(axes, metric, "final ")
    if metric.lower_is_better:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    draw.label_ends(axes, ends)
    return figure


def draw_published(axes: Axes, palette: Mapping[str, str], depths: Collection[int]) -> list[Line2D]:
    """Draws the published test errors of the networks and depths that were run.

    Returns:
        The legend handles of their sources.
    """
    handles: dict[str, Line2D] = {}
    for row in PUBLISHED:
        points = [(depth, *row.errors[depth]) for depth in depths if depth in row.errors]
        if row.network not in palette or not points:
            continue
        rank = SOURCES.index(row.source)
        marker: dict[str, Any] = {
            "marker": "D^vs"[rank],
            "markersize": 3,
            "markeredgewidth": 0.6,
            "markerfacecolor": "white",
            "linewidth": 0,
        }
        depth, mean, deviation = pd.DataFrame(points).astype(float).fillna(0).to_numpy().T
        beside = depth * (1.03 + 0.02 * rank)  # right of the measured points
        color = palette[row.network]
        axes.errorbar(beside, mean / 100, deviation / 100, color=color, elinewidth=0.6, **marker)
        handles[row.source] = Line2D([], [], color="0.3", label=row.source, **marker)
    return list(handles.values())
