"""Draws final values: the primary metric at the end of training, with published values beside it.

`by_depth` draws it against the depth, with a line per network; `by_category` against names, with a
row per name. Both draw test and training values as means with bars of one sample standard
deviation, a cross for runs that diverged, and published values. Training values are those of the
whole training split if the runs have `train.evaluate_train`. Published values are in the panel of
the measured ones if they are of the same data and series. Otherwise they have a panel and an axis
of their own, since only their pattern can be compared. `curves_and_final` adds the curves.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from resjax.analysis import figures as draw
from resjax.analysis.runs import primary_metrics, summarize, training_column
from resjax.run_files import CLASSIFICATION_ERROR, Metric

FAILS = math.inf
"""The published value of a network of which a paper says only that it fails to train."""

GRAY = "0.3"
MARKERS = "Dsvph*d8"
ROW_LOOKS: tuple[dict[str, Any], ...] = (  # of training and of test
    {"markersize": 2.5, "elinewidth": 0.7},
    {"markersize": 4.5, "elinewidth": 1},
)
DATA_TITLES = {
    "digits": "digits",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "imagenet": "ImageNet",
}

Value = float | tuple[float, float | None]


class Published(NamedTuple):
    """Published final values of a metric, in the unit in which it is printed (errors in per cent).

    Attributes:
      source: the paper or repository, for the legend.
      series: the network that the values belong to, as in the column of the runs.
      values: by depth or category, a value or a pair of mean and standard deviation; `FAILS` if
        the source gives no number.
      data: `data.name` of the config with which the values can be compared.
      setting: title of the panel of their own.
      metric: name of the metric.
    """

    source: str
    series: str
    values: Mapping[Any, Value]
    data: str = "cifar10"
    setting: str = ""
    metric: str = CLASSIFICATION_ERROR.name

    @property
    def title(self) -> str:
        return f"published, {self.setting or DATA_TITLES.get(self.data, self.data)}"

    @property
    def points(self) -> dict[Any, tuple[float, float]]:
        """Mean and deviation, or 0, by depth or category."""
        pairs = {k: v if isinstance(v, tuple) else (v, None) for k, v in self.values.items()}
        return {name: (mean, deviation or 0.0) for name, (mean, deviation) in pairs.items()}

    def only(self, names: Collection[Any]) -> "Published":
        """Returns the values of these depths or categories."""
        return self._replace(values={k: v for k, v in self.values.items() if k in names})


class Layout(NamedTuple):
    """The published rows in the panel of the runs, and those in each panel of their own."""

    inside: list[Published]
    beside: dict[str, list[Published]]

    @property
    def rows(self) -> list[Published]:
        return [*self.inside, *(row for rows in self.beside.values() for row in rows)]

    @property
    def sources(self) -> list[str]:
        return list(dict.fromkeys(row.source for row in self.rows))


def curves_and_final(
    runs: pd.DataFrame,
    curves: pd.DataFrame,
    *,
    panel: str,
    series: str = "model.depth",
    label: str = "{} layers",
    **final: Callable[[pd.DataFrame], Figure],
) -> dict[str, Figure]:
    """Draws the curves in panels and the final values, each only if there is something to draw.

    Args:
        runs: A table of `load_runs` with the additional columns `panel` and `series`.
        curves: A table of `load_curves` of these runs.
        panel: The column whose values each have a panel of curves.
        series: The column whose values each have a line in every panel.
        label: The format of the labels of these lines.
        **final: By the figure's name, a function of the runs, such as `by_depth` with its keywords
            bound.

    Returns:
        "curves" and the figures of `final`, by name.
    """
    drawn = {}
    if len(curves):
        curves = curves.merge(runs[["folder", panel, series]], on="folder")
        drawn["curves"] = draw.metric_curves(curves, panel=panel, series=series, label=label)
    if (runs["finished"] | runs["diverged"]).any():
        drawn |= {name: function(runs) for name, function in final.items()}
    return drawn


def by_depth(
    runs: pd.DataFrame,
    *,
    series: str,
    published: Sequence[Published] = (),
    depth: str = "model.depth",
    xlabel: str = "depth (layers)",
) -> Figure:
    """Draws the final metric against depth, with a line per network.

    Args:
        runs: A table of `load_runs` with the additional column `series`.
        series: The column whose values each have a color and a label at the end of the line.
        published: Values by depth.
        depth: The column of the horizontal axis, whose numbers are positive.
        xlabel: The label of this axis.

    Raises:
        ValueError: if the runs have several primary metrics.
    """
    [metric] = primary_metrics(runs)
    depths = sorted(runs[depth].unique())
    palette = draw.colors(runs[series])
    layout = arrange(published, runs, metric, palette, depths)
    figure, panels = _columns(1 + len(layout.beside), height=2.7)
    results = summarize(runs, by=[series, depth]).sort_values(depth)
    train = _training(panels[0], runs, metric)
    ends = [_draw_networks(panels[0], results, series, depth, metric, palette, train)]
    for row in layout.inside:
        rank = layout.sources.index(row.source)
        # To the right of the measured values.
        points = [(x * (1.03 + 0.02 * rank), *value) for x, value in row.points.items()]
        draw_published(panels[0], points, metric, palette[row.series], rank)
    _set_depth_axis(panels[0], depths, xlabel)
    for axes, rows in zip(panels[1:], layout.beside.values(), strict=True):
        for row in rows:
            color = palette.get(row.series, GRAY)
            rank = layout.sources.index(row.source)
            points = [(float(x), *value) for x, value in row.points.items()]
            draw_published(axes, points, metric, color, rank, line=True)
        ends.append(_published_ends(rows, metric, palette))
        _set_depth_axis(axes, sorted({x for row in rows for x in row.values}), xlabel)
    for axes in panels:
        draw.set_metric_axis(axes, metric, "final " if axes is panels[0] else "test ")
        if metric.lower_is_better:
            axes.set_ylim(*_limits(axes.get_ylim()[1]))
    _finish(figure, panels, runs, layout, diverged=bool(results["diverged"].any()))
    for axes, labels in zip(panels, ends, strict=True):
        draw.label_ends(axes, labels)
    return figure


def by_category(
    runs: pd.DataFrame,
    *,
    category: str,
    series: str | None = None,
    published: Sequence[Published] = (),
    order: Iterable[Any] = (),
) -> Figure:
    """Draws the final metric in a row per category, from top to bottom.

    Args:
        runs: A table of `load_runs` with the additional columns `category` and `series`.
        category: The column whose values each have a row.
        series: The column whose values each have a color, or None for a single color.
        published: Values by category.
        order: The categories in their order; by default that of the runs.

    Raises:
        ValueError: if the runs have several primary metrics.
    """
    [metric] = primary_metrics(runs)
    if series is None:
        series, runs = "series", runs.assign(series="")
    found = set(runs[category])
    names = [name for name in order if name in found] or list(dict.fromkeys(runs[category]))
    palette = draw.colors(runs[series])
    shown = [row.only(names) for row in published]
    layout = arrange(shown, runs, metric, palette, names)
    height = 0.75 + 0.2 * len(names) * max(1.0, 0.7 * len(palette))
    figure, panels = _columns(1 + len(layout.beside), height=height, sharey=True)
    results = summarize(runs, by=[series, category])
    gap = 0.6 / len(palette)  # between the series of a row
    offsets = {name: gap * (i - (len(palette) - 1) / 2) for i, name in enumerate(palette)}
    rows = {name: float(i) for i, name in enumerate(names)}
    train = _training(panels[0], runs, metric)
    for result in results.to_dict("records"):
        place = rows[result[category]] + offsets[result[series]]
        _draw_row(panels[0], result, place, metric, palette[result[series]], train)
    for axes, published_rows in zip(panels, [layout.inside, *layout.beside.values()], strict=True):
        for row in published_rows:
            # Inside, a published value is just below the measured one.
            below = 0.3 * gap if axes is panels[0] else 0.0
            shift = offsets.get(row.series, 0.0) + below
            points = [(rows[name] + shift, *value) for name, value in row.points.items()]
            rank = layout.sources.index(row.source)
            color = palette.get(row.series, GRAY)
            draw_published(axes, points, metric, color, rank, horizontal=True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{metric.scale * value:g}")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.grid(True, axis="x")
        prefix = "final " if axes is panels[0] else "test "
        axes.set_xlabel(draw.plain(f"{prefix}{metric.label}"))
        if metric.lower_is_better:
            axes.set_xlim(*_limits(axes.get_xlim()[1]))
    panels[0].set_yticks(range(len(names)), [draw.plain(name) for name in names])
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    named = palette if len(palette) > 1 else {}
    diverged = bool(results["diverged"].any())
    _finish(figure, panels, runs, layout, diverged=diverged, series=named)
    return figure


def arrange(
    published: Sequence[Published],
    runs: pd.DataFrame,
    metric: Metric,
    palette: Mapping[Any, str],
    names: Collection[Any],
) -> Layout:
    """Decides which published values share the panel of the runs.

    Those of the same data, of a series in `palette` and of one of the depths or categories `names`
    do. If there are none, the values have panels of their own, without the series that were not
    run.
    """
    rows = [row for row in published if row.metric == metric.name and row.values]
    data = set(runs["data.name"])
    comparable = [row for row in rows if {row.data} == data and row.series in palette]
    if comparable:
        restricted = [row.only(names) for row in comparable]
        return Layout([row for row in restricted if row.values], {})
    beside: dict[str, list[Published]] = {}
    for row in [row for row in rows if row.series in palette] or rows:
        beside.setdefault(row.title, []).append(row)
    return Layout([], beside)


def draw_published(
    axes: Axes,
    points: Sequence[tuple[float, float, float]],
    metric: Metric,
    color: str,
    rank: int = 0,
    *,
    line: bool = False,
    horizontal: bool = False,
) -> None:
    """Draws published values as open markers with their deviations, and `FAILS` at the edge.

    Args:
        axes: Where to draw.
        points: (place, mean, deviation), where means and deviations are in the printed unit.
        metric: The metric of the values.
        color: The color of the network.
        rank: The index of the source, which chooses the marker.
        line: Whether a thin line joins the points.
        horizontal: Whether values are on the horizontal axis.
    """
    draw.note(axes, "text", ["Open markers are published values, with deviations where known."])
    known = [(x, y / metric.scale, d / metric.scale) for x, y, d in points if math.isfinite(y)]
    if known:
        place, mean, deviation = zip(*known, strict=True)
        look = _marker(rank) | ({"linewidth": 0.7} if line else {})
        if horizontal:
            axes.errorbar(mean, place, xerr=deviation, color=color, elinewidth=0.6, **look)
        else:
            axes.errorbar(place, mean, yerr=deviation, color=color, elinewidth=0.6, **look)
    for x, *_ in (point for point in points if not math.isfinite(point[1])):
        look = _marker(rank) | {"marker": ">" if horizontal else "^"}
        _draw_at_worst(axes, x, metric, horizontal, color=color, **look)


def _draw_networks(
    axes: Axes,
    results: pd.DataFrame,
    series: str,
    depth: str,
    metric: Metric,
    palette: Mapping[Any, str],
    train: str,
) -> list[draw.LineEnd]:
    ends = []
    for name, color in palette.items():
        of_network = results[results[series] == name]
        for place in of_network.loc[of_network["diverged"] > 0, depth]:
            draw.draw_diverged(axes, place, color)
        result = of_network[of_network["seeds"] > 0]
        for column in (train, f"test_{metric.name}"):
            mean, deviation = result[f"{column}_mean"], result[f"{column}_std"]
            bold, seeds = column != train, result["seeds"]
            draw.draw_error_bars(
                axes, result[depth], mean, deviation, color, bold=bold, seeds=seeds
            )
        if len(result):
            x, final = result.iloc[-1][[depth, f"test_{metric.name}_mean"]]
            ends.append(draw.LineEnd(x, final, str(name), color))
    return ends


def _published_ends(
    rows: Sequence[Published], metric: Metric, palette: Mapping[Any, str]
) -> list[draw.LineEnd]:
    """Returns the last published value of each series."""
    last: dict[str, tuple[float, float]] = {}
    for row in rows:
        known = [(x, mean) for x, (mean, _) in row.points.items() if math.isfinite(mean)]
        last[row.series] = max([*known, last.get(row.series, (0.0, 0.0))])
    return [
        draw.LineEnd(x, y / metric.scale, name, palette.get(name, GRAY))
        for name, (x, y) in last.items()
        if x
    ]


def _draw_row(
    axes: Axes, result: Mapping[Any, Any], place: float, metric: Metric, color: str, train: str
) -> None:
    if result["diverged"]:
        _draw_at_worst(axes, place, metric, True, color=color, marker="x", markersize=4.5)
    if not result["seeds"]:
        return
    draw.note(axes, "bar", [result["seeds"]])
    for column, look in zip((train, f"test_{metric.name}"), ROW_LOOKS, strict=True):
        mean, deviation = result[f"{column}_mean"], result[f"{column}_std"]
        deviation = 0 if math.isnan(deviation) else deviation
        axes.errorbar([mean], [place], xerr=[deviation], color=color, marker="o", zorder=3, **look)


def _training(axes: Axes, runs: pd.DataFrame, metric: Metric) -> str:
    """Returns the column with the training values, and notes it for the caption."""
    column = training_column(runs, metric.name)
    draw.note(axes, "training", [column.removesuffix(f"_{metric.name}")])
    draw.note(axes, "log_every", runs.get("train.log_every", ()))
    return column


def _draw_at_worst(axes: Axes, place: float, metric: Metric, horizontal: bool, **look: Any) -> None:
    """Draws a marker at the edge of the worst values, whatever the limits will be."""
    edge = 1 if metric.lower_is_better else 0
    x, y = (edge, place) if horizontal else (place, edge)
    transform = axes.get_yaxis_transform() if horizontal else axes.get_xaxis_transform()
    axes.plot([x], [y], transform=transform, zorder=4, clip_on=False, **look)


def _limits(worst: float) -> tuple[float, float]:
    """Returns limits from 0, with room for half a marker, to above the worst value."""
    return -0.012 * worst, 1.08 * worst


def _columns(count: int, *, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Returns a figure with panels beside each other, each with scales of its own."""
    width = draw.COLUMN_WIDTH if count == 1 else draw.TEXT_WIDTH
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=sharey).flat)


def _set_depth_axis(axes: Axes, depths: Sequence[float], label: str) -> None:
    # Published depths increase by factors, so equal factors have equal distances.
    axes.set_xscale("log")
    axes.set_xlim(depths[0] / 1.08, depths[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(depths))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{depth:g}" for depth in depths]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def _finish(
    figure: Figure,
    panels: Sequence[Axes],
    runs: pd.DataFrame,
    layout: Layout,
    *,
    diverged: bool,
    series: Mapping[Any, str] | None = None,
) -> None:
    """Writes the titles of several panels and the legend."""
    if layout.beside:
        data = dict.fromkeys(DATA_TITLES.get(name, name) for name in runs["data.name"])
        titles = [f"measured, {', '.join(data)}", *layout.beside]
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(draw.plain(title))
    handles = draw.legend_handles(diverged=diverged)
    if series is not None:  # of rows, which have no lines
        for handle, look in zip(handles, reversed(ROW_LOOKS), strict=False):
            handle.set(marker="o", markersize=look["markersize"], linewidth=0)
        handles += [
            Line2D([], [], color=color, marker="o", markersize=4, linewidth=0, label=name)
            for name, color in series.items()
        ]
    if any(FAILS in row.values.values() for row in layout.rows):
        look = _marker(0) | {"marker": "^" if series is None else ">"}
        handles.append(Line2D([], [], color=GRAY, label="published: fails to train", **look))
    handles += [
        Line2D([], [], color=GRAY, label=source, **_marker(rank))
        for rank, source in enumerate(layout.sources)
    ]
    columns = 2 if len(panels) == 1 else 4
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _marker(rank: int) -> dict[str, Any]:
    return {
        "marker": MARKERS[rank % len(MARKERS)],
        "markersize": 3,
        "markeredgewidth": 0.6,
        "markerfacecolor": "white",
        "linewidth": 0,
    }
