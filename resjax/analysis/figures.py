"""The drawing vocabulary of every experiment: style, colours, curves with spread, direct labels.

Figures are made to be printed: at the width of a column or of the text of a two-column paper, in
type that stays legible there, as vectors with embedded fonts. What is compared shares its axes,
lines carry their names at their ends instead of in a legend, and every mean shows its spread. The
qualitative colours are Okabe and Ito's (2008, "Color Universal Design"), the ordered ones the
darker part of matplotlib's plasma: both survive colour blindness, the second also a grey printer.

A figure is drawn under `style()` on axes of `panels`, and written by `save`.
"""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from resjax.disk import write_atomically

COLUMN_WIDTH = 3.3
"""Width of one column of a two-column paper, in inches."""

TEXT_WIDTH = 6.9
"""Width of both columns and the gap between them, in inches."""

OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Colours without an order, the first ones the most distinct; yellow is too light for lines."""

FORMATS = ("png", "pdf", "svg")

_DASHES = (0, (3, 2))

# The same figure gives the same bytes, so that a figure in a repository changes when its data do.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Creator": None, "Date": None, "Format": None, "Type": None},
}


@contextmanager
def style() -> Iterator[None]:
    """Sets the style of a figure in print: a context, and a decorator of drawing functions."""
    settings: dict[Any, Any] = {
        "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure everywhere
        "font.size": 7.5,
        "axes.titlesize": 8,
        "axes.labelsize": 7.5,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.edgecolor": "0.25",
        "axes.labelcolor": "0.15",
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": "0.9",
        "grid.linewidth": 0.5,
        "xtick.color": "0.25",
        "ytick.color": "0.25",
        "xtick.major.width": 0.6,
        "xtick.major.size": 2.5,
        "ytick.major.size": 0,
        "lines.solid_capstyle": "round",
        "lines.solid_joinstyle": "round",
        "figure.dpi": 100,
        "savefig.dpi": 300,
        "pdf.fonttype": 42,  # editable TrueType outlines, which publishers ask for
        "svg.fonttype": "path",
        "svg.hashsalt": "resjax",
    }
    with matplotlib.rc_context(settings):
        yield


def colors(values: Iterable[Any]) -> dict[Any, str]:
    """Returns a colour for every distinct value, from light to dark where the values have an order.

    Numbers are ordered. Names get Okabe and Ito's colours in the order given, and ordered colours
    too if there are more of them than those.
    """
    distinct = list(dict.fromkeys(values))
    numeric = all(isinstance(value, int | float | np.number) for value in distinct)
    if not numeric and len(distinct) <= len(OKABE_ITO):
        return dict(zip(distinct, OKABE_ITO, strict=False))
    ordered = sorted(distinct) if numeric else distinct
    places = np.linspace(0.74, 0.0, len(ordered)) if len(ordered) > 1 else [0.25]
    return {
        value: to_hex(matplotlib.colormaps["plasma"](place))
        for value, place in zip(ordered, places, strict=True)
    }


def panels(count: int, width: float = TEXT_WIDTH, height: float = 2.5) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its `count` axes, side by side with shared scales.

    Args:
        count: Number of panels, at least 1; up to three stand in a row.
        width: Width of the figure, in inches.
        height: Height of one row, in inches.
    """
    # Even rows: four panels are two and two, not three and one.
    rows = math.ceil(count / 3)
    columns = math.ceil(count / rows)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    for above in axes[max(count - columns, 0) : count]:
        above.tick_params(labelbottom=True)
    return figure, axes[:count]


class End(NamedTuple):
    """Where a line ends, for the name that stands there."""

    x: float
    y: float
    text: str
    color: str


class Mean(NamedTuple):
    """Runs that differ only in seed, averaged step by step, and those that cannot be.

    `step`, `mean` and `spread` have the shape (steps,); `spread` is the sample standard deviation,
    NaN for a single run. `stopped` and `diverged` hold the tables (step, value) of the runs that
    end before the others do, `diverged` up to the last value that was finite.
    """

    step: NDArray[np.int64]
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    stopped: list[pd.DataFrame]
    diverged: list[pd.DataFrame]


def average(curves: pd.DataFrame, value: str = "error") -> Mean:
    """Averages curves of one split over their runs.

    Only runs that reach the last step are averaged: a mean whose members drop out on the way
    jumps where they do, and shows a change that no network made.
    """
    whole: list[pd.Series] = []
    stopped: list[pd.DataFrame] = []
    diverged: list[pd.DataFrame] = []
    for _, run in curves.sort_values("step").groupby("folder", sort=False):
        finite = run[["loss", value]].map(np.isfinite).all(axis=1)
        table = run[finite.cummin()][["step", value]]
        if not finite.all():
            diverged.append(table)
        elif run["step"].max() < curves["step"].max():
            stopped.append(table)
        else:
            whole.append(table.set_index("step")[value])
    together = pd.concat(whole, axis=1, join="inner") if whole else pd.DataFrame()
    return Mean(
        step=together.index.to_numpy(dtype=np.int64),
        mean=together.mean(axis=1).to_numpy(dtype=np.float64),
        spread=together.std(axis=1, ddof=1).to_numpy(dtype=np.float64),
        stopped=stopped,
        diverged=diverged,
    )


def draw_mean(
    axes: Axes, mean: Mean, color: str, *, heavy: bool = True, value: str = "error"
) -> None:
    """Draws a mean and its spread: a line in a band of one sample standard deviation either side.

    The band is the deviation and not the range, because a range widens with the number of seeds.
    Runs outside the mean are drawn singly, thin and dashed, and a cross ends one that diverged.
    """
    if heavy:
        line: dict[str, Any] = {"linewidth": 1.5, "zorder": 3}
    else:
        line = {"linewidth": 0.7, "zorder": 2.5}
    # A handful of measurements should look like one.
    marker = {"marker": "o", "markersize": 2 * line["linewidth"]} if len(mean.step) <= 20 else {}
    axes.plot(mean.step, mean.mean, color=color, **line, **marker)
    if np.isfinite(mean.spread).any():
        low, high = mean.mean - mean.spread, mean.mean + mean.spread
        alpha = 0.22 if heavy else 0.12
        axes.fill_between(
            mean.step, np.maximum(low, 0), high, color=color, alpha=alpha, linewidth=0
        )
    for run in (*mean.stopped, *mean.diverged):
        axes.plot(run["step"], run[value], color=color, linestyle=_DASHES, linewidth=0.7)
    for run in mean.diverged:
        last = run.tail(1)
        axes.plot(last["step"], last[value], color=color, marker="x", markersize=4.5, zorder=4)


def draw_points(
    axes: Axes,
    x: pd.Series,
    mean: pd.Series,
    spread: pd.Series,
    color: str,
    *,
    heavy: bool = True,
) -> None:
    """Draws final values joined by a line, with error bars of one sample standard deviation."""
    axes.errorbar(
        x,
        mean,
        yerr=spread.fillna(0),
        color=color,
        marker="o",
        markersize=4 if heavy else 2.5,
        linewidth=1.5 if heavy else 0.7,
        elinewidth=1 if heavy else 0.7,
        zorder=3 if heavy else 2.5,
    )


def error_curves(
    curves: pd.DataFrame, *, panel: str, series: str, label: str = "{}", width: float = TEXT_WIDTH
) -> Figure:
    """Draws training (thin) and test error (bold) against steps, as He et al. 2015 in figure 6.

    Args:
        curves: A table of `load_curves` with two further columns, `panel` and `series`.
        panel: The column that has a panel for each value, which is its title.
        series: The column that has a colour and a label at the line's end for each value.
        label: How a value of `series` is written there.
        width: Width of the figure, in inches.
    """
    titles = list(dict.fromkeys(curves[panel]))
    palette = colors(curves[series])
    figure, grid = panels(len(titles), width)
    ends: list[list[End]] = []
    means: list[Mean] = []
    for axes, title in zip(grid, titles, strict=True):
        axes.set_title(str(title))
        ends.append([])
        for name, color in palette.items():
            chosen = curves[(curves[panel] == title) & (curves[series] == name)]
            end = None
            # The test curve bears the name; a run that was not evaluated yet has only the other.
            for split in ("train", "test"):
                mean = average(chosen[chosen["split"] == split])
                draw_mean(axes, mean, color, heavy=split == "test")
                end = _end(mean) or end
                means.append(mean)
            if end is not None:
                ends[-1].append(End(*end, label.format(name), color))
        percent(axes)
        steps(axes, int(curves["step"].max()))
        axes.label_outer()
    finals = [mean.mean[-1] + np.nan_to_num(mean.spread[-1]) for mean in means if len(mean.step)]
    grid[0].set_ylim(*error_limits(finals))
    handles = key(
        unfinished=any(mean.stopped for mean in means),
        diverged=any(mean.diverged for mean in means),
    )
    figure.legend(
        handles=handles, loc="outside upper right", ncols=4 if width > COLUMN_WIDTH else 2
    )
    for axes, names in zip(grid, ends, strict=True):
        label_ends(axes, names)
    return figure


def key(*, unfinished: bool = False, diverged: bool = False) -> list[Line2D]:
    """Returns legend handles for the weights of lines, and for runs outside a mean if there are."""
    handles = [
        Line2D([], [], color="0.3", linewidth=1.5, label="test"),
        Line2D([], [], color="0.3", linewidth=0.7, label="training"),
    ]
    if unfinished:
        handles.append(
            Line2D([], [], color="0.3", linewidth=0.7, linestyle=_DASHES, label="unfinished run")
        )
    if diverged:
        handles.append(
            Line2D([], [], color="0.3", linewidth=0, marker="x", ms=4.5, label="diverged run")
        )
    return handles


def error_limits(finals: Sequence[float]) -> tuple[float, float]:
    """Returns limits that show how curves end: half as much again as the worst of `finals`.

    Curves start near the error of guessing, and an axis that shows the start shows little of what
    is compared. All of it is shown if nothing has ended yet.
    """
    worst = 1.5 * max(finals, default=1.0)
    steps_up = (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
    top = next((step for step in steps_up if step >= worst), 1.0)
    # A line at zero should not hide in the axis.
    return -0.012 * top, top


def percent(axes: Axes, label: str = "error (%)") -> None:
    """Makes `axes` show fractions as per cent on their vertical axis."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_ylabel(label)


def steps(axes: Axes, last: int) -> None:
    """Makes the horizontal axis of `axes` count training steps from 0 to `last`."""
    axes.set_xlim(0, 1.01 * last)  # room for half a marker
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(
        FuncFormatter(
            lambda step, _: f"{step / 1000:g}k" if last >= 10_000 and step else f"{step:g}"
        )
    )
    axes.set_xlabel("training steps")


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Writes the name of every line beside its end, right of `axes`, so that none overlap.

    Call it last: the names are placed for the limits and the size that the axes have then.
    """
    if not ends:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # lets the layout settle, so that the axes have their height
    box = axes.get_window_extent()
    points = figure.dpi / 72
    low, high = axes.get_ylim()
    heights = (np.clip([end.y for end in ends], low, high) - low) / (high - low)
    size = float(matplotlib.rcParams["xtick.labelsize"])
    places = spread_apart(heights, 1.25 * size * points / box.height, 0.0, 1.0)
    for end, place in zip(ends, places, strict=True):
        axes.annotate(
            end.text,
            xy=(end.x, float(np.clip(end.y, low, high))),
            xytext=(1 + 9 * points / box.width, float(place)),
            textcoords="axes fraction",
            color=_ink(end.color),
            fontsize=size,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": end.color,
                "linewidth": 0.5,
                "shrinkA": 1.5,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
        )


def spread_apart(
    places: Sequence[float] | NDArray[np.float64], gap: float, low: float, high: float
) -> NDArray[np.float64]:
    """Moves `places` as little as possible, in squares, so that neighbours are `gap` apart.

    Their order stays and they stay within `low` and `high`; if they do not fit, the gap shrinks
    until they do. With the gaps taken out this is isotonic regression, solved by pooling adjacent
    violators.
    """
    count = len(places)
    if count > 1:
        gap = min(gap, (high - low) / (count - 1))
    order = np.argsort(places, kind="stable")
    blocks: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        mean, size = float(places[index]) - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            below, number = blocks.pop()
            mean, size = (mean * size + below * number) / (size + number), size + number
        blocks.append((mean, size))
    pooled = np.concatenate([np.full(size, mean) for mean, size in blocks] or [np.empty(0)])
    moved = np.empty(count)
    moved[order] = np.clip(pooled, low, high - gap * max(count - 1, 0)) + gap * np.arange(count)
    return moved


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes `figure` as `stem`.png, .pdf and .svg, each whole or not at all; returns the paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix in FORMATS:
        content = io.BytesIO()
        with style():
            figure.savefig(content, format=suffix, metadata=_METADATA[suffix])
        paths.append(write_atomically(stem.with_name(f"{stem.name}.{suffix}"), content.getvalue()))
    return paths


def _end(mean: Mean, value: str = "error") -> tuple[float, float] | None:
    """Returns where a mean ends, or the longest of the runs outside it where there is none."""
    if len(mean.step):
        return float(mean.step[-1]), float(mean.mean[-1])
    ends = [run.iloc[-1] for run in (*mean.stopped, *mean.diverged) if len(run)]
    return max(((float(end["step"]), float(end[value])) for end in ends), default=None)


def _ink(color: str) -> tuple[float, float, float]:
    """Darkens a line's colour for type, whose strokes are thinner."""
    red, green, blue = to_rgb(color)
    return 0.8 * red, 0.8 * green, 0.8 * blue
