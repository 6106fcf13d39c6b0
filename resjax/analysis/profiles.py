"""Draws values against a position in panels: diagnostics by layer or by step, for several networks.

`figures.layer_profile` draws the layers of a network in their order. An experiment compares
networks of different depths, whose layers share an axis only as positions between 0 and 1.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from resjax.analysis import figures as draw

LONGEST_LABEL = 24
"""Characters of a label that stands at the end of its line, if there are several panels."""

LEGEND_ROW = 0.15
"""Height of a row of a legend, in inches."""


def profiles(
    table: pd.DataFrame,
    *,
    xlabel: str,
    ylabel: str,
    label: str = "{}",
    log: bool = False,
    width: float = draw.TEXT_WIDTH,
) -> Figure:
    """Draws a panel per value of `panel` and in it a line per value of `series`.

    Rows that share all but their value, such as those of several seeds, are averaged, with a band
    of one sample standard deviation; on a logarithmic axis mean and deviation are those of the
    logarithm. A point that some of the rows lack, because a run diverged, is left out.

    Args:
        table: The columns `panel`, `series`, `x` and `value`, and one row per seed and point.
        xlabel: Label of the horizontal axis.
        ylabel: Label of the vertical axis.
        label: The format of the labels, applied to a value of `series`. They stand at line ends, or
            in a legend if they are too long to stand beside several panels.
        log: Whether the vertical axis is logarithmic, which leaves out values of zero or less.
        width: Width of the figure, in inches.
    """
    titles = list(dict.fromkeys(table["panel"]))
    palette = draw.colors(table["series"])
    figure, grid = draw.panels(len(titles), width)
    ends = []
    for axes, title in zip(grid, titles, strict=True):
        axes.set_title(draw.plain(title))
        of_panel = table[table["panel"] == title]
        found = [
            (_draw_line(axes, of_panel[of_panel["series"] == name], color, log), name, color)
            for name, color in palette.items()
        ]
        ends.append([draw.LineEnd(*end, label.format(n), color) for end, n, color in found if end])
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.label_outer()
    if log:
        _set_log_axis(grid)
    names = {label.format(name): color for name, color in palette.items()}
    if len(grid) > 1 and max(map(len, names), default=0) > LONGEST_LABEL:
        _add_legend(figure, names)
    else:
        for axes, labels in zip(grid, ends, strict=True):
            draw.label_ends(axes, labels)
    return figure


def _add_legend(figure: Figure, names: Mapping[str, str]) -> None:
    """Names the lines above the panels, for which the figure becomes higher."""
    handles = [Line2D([], [], color=color, label=draw.plain(name)) for name, color in names.items()]
    width, height = figure.get_size_inches()
    columns = 2 if width > draw.COLUMN_WIDTH else 1
    rows = math.ceil(len(handles) / columns)
    figure.set_size_inches(width, height + LEGEND_ROW * rows)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _draw_line(axes: Axes, rows: pd.DataFrame, color: str, log: bool) -> tuple[float, float] | None:
    """Draws a mean with its band, and returns its last point."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log10(rows["value"]) if log else rows["value"]
    value = value.where(np.isfinite(value))
    points = value.groupby(rows["x"]).agg(["mean", "std", "count"])
    points = points[(points["count"] == points["count"].max()) & (points["count"] > 0)]
    if points.empty:
        return None
    mean, deviation = points["mean"], points["std"].fillna(0)
    center, low, high = (10**y if log else y for y in (mean, mean - deviation, mean + deviation))
    axes.plot(points.index, center, color=color, linewidth=1.3, zorder=3)
    draw.note(axes, "band", set(points["count"]))
    if log:
        draw.note(axes, "text", ["Means and deviations are those of the logarithm."])
    axes.fill_between(points.index, low, high, color=color, alpha=0.22, linewidth=0)
    return float(points.index[-1]), float(center.iloc[-1])


def _set_log_axis(grid: Sequence[Axes]) -> None:
    """Makes the shared vertical axis logarithmic, with more ticks if the decades are few."""
    axes = grid[0]
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    if high < 1000 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
