"""Degradation: deeper plain networks train worse, deeper residual networks train better

He et al. 2015 (Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2 and
figure 6) train networks of growing depth with and without shortcuts. Plain networks end with a
higher training error the deeper they are, so the fault is not overfitting; with shortcuts that
cost no parameters the order turns round, and depth lowers both training and test error.

The sweep trains every depth with no shortcut ("none", plain) and with the paper's option A ("pad",
residual), over several seeds.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from resjax.analysis import figures as draw
from resjax.analysis.runs import describe, summarize, varying
from resjax.sweeps import param, product


class Published(NamedTuple):
    """Test errors on CIFAR-10 by others, in per cent by depth, each with its deviation if known."""

    source: str
    network: str
    errors: dict[int, tuple[float, float | None]]


PUBLISHED = (
    # Depth 110 is the mean of five runs; the paper's 6.43 is the best of them. Of plain networks it
    # gives no numbers, but that plain-110 stays above 60 %.
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
    """Yields the overrides of every run."""
    yield from product(
        param("model.depth", depths), param("model.shortcut", shortcuts), param("seed", seeds)
    )


@draw.style()
def figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws the curves of every network, and how the errors that they end with go with depth."""
    runs = runs.assign(network=networks(runs))
    drawn = {}
    if len(curves):
        columns = runs[["folder", "network", "model.depth"]]
        drawn["degradation"] = draw.error_curves(
            curves.merge(columns, on="folder"),
            panel="network",
            series="model.depth",
            label="{}-layer",
            width=draw.TEXT_WIDTH if runs["network"].nunique() > 1 else draw.COLUMN_WIDTH,
        )
    if runs["finished"].any():
        drawn["final_error"] = final_error(runs)
    return drawn


def networks(runs: pd.DataFrame) -> pd.Series:
    """Names the network of every run: "plain" or "residual", and whatever else the sweep varies."""
    residual = runs["model.shortcut"] != "none"
    names = residual.map({False: "plain", True: "residual"})
    several = runs.loc[residual, "model.shortcut"].nunique() > 1
    names = names.where(~(residual & several), names + ", " + runs["model.shortcut"])
    others = [name for name in varying(runs) if name not in ("model.depth", "model.shortcut")]
    return names + ", " + describe(runs, others) if others else names


def final_error(runs: pd.DataFrame) -> Figure:
    """Draws the errors at the end of training against depth, published ones beside on CIFAR-10."""
    results = summarize(runs, by=["network", "model.depth"]).sort_values("model.depth")
    figure, [axes] = draw.panels(1, width=draw.COLUMN_WIDTH, height=2.7)
    palette = draw.colors(runs["network"])
    ends = []
    handles = draw.key()
    for network, color in palette.items():
        result = results[(results["network"] == network) & (results["seeds"] > 0)]
        for split in ("train", "test"):
            mean, spread = result[f"{split}_error_mean"], result[f"{split}_error_std"]
            draw.draw_points(
                axes, result["model.depth"], mean, spread, color, heavy=split == "test"
            )
        if len(result):
            last = result.iloc[-1]
            ends.append(draw.End(last["model.depth"], last["test_error_mean"], network, color))
    depths = sorted(runs["model.depth"].unique())
    if (runs["data.name"] == "cifar10").all():
        handles += draw_published(axes, palette, depths)
    # Published depths grow by factors, so equal factors get equal room.
    axes.set_xscale("log")
    axes.set_xlim(depths[0] / 1.08, depths[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(depths))
    axes.xaxis.set_major_formatter(FixedFormatter([str(depth) for depth in depths]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("depth (layers)")
    draw.percent(axes, "final error (%)")
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    draw.label_ends(axes, ends)
    return figure


def draw_published(axes: Axes, palette: Mapping[str, str], depths: Collection[int]) -> list[Line2D]:
    """Draws the published test errors of the networks and depths that were run.

    Returns the legend handles of their sources.
    """
    handles: dict[str, Line2D] = {}
    for row in PUBLISHED:
        points = [(depth, *row.errors[depth]) for depth in depths if depth in row.errors]
        if row.network not in palette or not points:
            continue
        rank = SOURCES.index(row.source)
        form: dict[str, Any] = {
            "marker": "D^vs"[rank],
            "markersize": 3,
            "markeredgewidth": 0.6,
            "markerfacecolor": "white",
            "linewidth": 0,
        }
        depth, mean, spread = pd.DataFrame(points).astype(float).fillna(0).to_numpy().T
        beside = depth * (1.03 + 0.02 * rank)  # ours stay visible
        color = palette[row.network]
        axes.errorbar(beside, mean / 100, spread / 100, color=color, elinewidth=0.6, **form)
        handles[row.source] = Line2D([], [], color="0.3", label=row.source, **form)
    return list(handles.values())
