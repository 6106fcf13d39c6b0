"""Draws the figures of experiments: print style, curves with deviations, labels at line ends.

Figures are made for print at the width of a column or of the text of a two-column paper, with
legible type, as vector graphics with embedded fonts. Panels that are compared share their axes,
lines are labeled at their ends, and means show their deviation. Colors are those of `palette`.

Draw on the axes of `panels` within `style()`, then call `save`.
"""

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from resjax.analysis.palette import OKABE_ITO as OKABE_ITO
from resjax.analysis.palette import colors as colors
from resjax.analysis.palette import legible
from resjax.analysis.runs import primary_metrics
from resjax.disk import write_atomically
from resjax.run_files import Metric
from resjax.text import printable

COLUMN_WIDTH = 3.3
"""Width of one column of a two-column paper, in inches."""

TEXT_WIDTH = 6.9
"""Width of both columns and the gap between them, in inches."""

MOST_LABELS = 24
"""The most lines of a panel that are labeled at their ends; more labels would cover each other."""

LONGEST_ENTRY = 26
"""Characters of the entries of a legend of which two stand beside each other in one column."""

LONGEST_TEXT = 60
"""Characters of a text from the data in a figure; a longer one loses its middle."""

_DASHES = (0, (3, 2))
_CROSS = "diverged"
_CROSS_LOOK: dict[str, Any] = {
    "marker": "x",
    "markersize": 4.5,
    "linewidth": 0,
    "zorder": 4,
    "clip_on": False,
}

# The same figure yields the same bytes, so a committed figure changes only if its data do.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Creator": None, "Date": None, "Format": None, "Type": None},
}


@contextmanager
def style() -> Iterator[None]:
    """Applies the style of printed figures, as a context manager or as a decorator."""
    with matplotlib.rc_context(fname=Path(__file__).with_name("print.mplstyle")):
        yield


def panels(count: int, width: float = TEXT_WIDTH, height: float = 2.5) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its `count` axes, which share their scales.

    Args:
        count: Number of panels, at least 1; a row holds at most three.
        width: Width of the figure, in inches.
        height: Height of one row, in inches.
    """
    # Rows are even: four panels are two and two, not three and one.
    rows = math.ceil(count / 3)
    columns = math.ceil(count / rows)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    for lowest in axes[max(count - columns, 0) : count]:
        lowest.tick_params(labelbottom=True)
    return figure, axes[:count]


def plain(value: Any) -> str:
    """Returns the text of a value for a figure: short, on one line, and never a formula."""
    text = printable(str(value))
    if len(text) > LONGEST_TEXT:
        half = LONGEST_TEXT // 2
        text = f"{text[:half]}…{text[-half:]}"
    return text.replace("$", r"\$")


_NOTES: WeakKeyDictionary[Figure, dict[str, set[Any]]] = WeakKeyDictionary()
"""Notes on each figure, from which `caption` is composed."""

_TRAINING = {
    "train": "Training values are means over the last {steps} steps, in training mode on images as "
    "the config augments them.",
    "train_set": "Training values are those of the whole training split, in evaluation mode and "
    "without augmentation.",
}


def note(axes: Axes, what: str, values: Iterable[Any]) -> None:
    """Notes for the caption what was drawn.

    Args:
        axes: Where it was drawn.
        what: "band" or "bar", with the numbers of seeds that were averaged; "training", with the
            split of the training values, "train" or "train_set"; "log_every", with the numbers of
            steps that these are means over; or "text", with sentences.
        values: The numbers of seeds, splits, numbers of steps or sentences.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    _NOTES.setdefault(figure, {}).setdefault(what, set()).update(values)


_LINES: WeakKeyDictionary[Figure, pd.DataFrame] = WeakKeyDictionary()


def lines(figure: Figure) -> pd.DataFrame | None:
    """Returns which run is in which line of a figure of `metric_curves`; None for other figures.

    The table has a row per run: `folder`, the title of its `panel`, the `label` and the `color` of
    its line.
    """
    return _LINES.get(figure)


def caption(figure: Figure) -> str:
    """Returns sentences that explain the lines, bands and bars of a figure and count the seeds."""
    notes = _NOTES.get(figure, {})
    sentences = sorted(map(str, notes.get("text", ())))
    for what, mark in (("band", "Lines"), ("bar", "Marks")):
        seeds = {int(count) for count in notes.get(what, ()) if count}
        if not seeds:
            continue
        if seeds == {1}:
            sentences.append(f"{mark} are single runs.")
            continue
        many = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"{max(seeds)}"
        sentences.append(
            f"{mark} are means over {many} seeds, {what}s one sample standard deviation on either "
            "side."
        )
    if "outside" in notes:
        sentences.append("Dashed lines are single runs that no mean contains.")
    every = {f"{steps:.0f}" for steps in notes.get("log_every", ()) if pd.notna(steps)}
    steps = every.pop() if len(every) == 1 else "train.log_every"
    splits = sorted(notes.get("training", ()))
    sentences += [_TRAINING[split].format(steps=steps) for split in splits]
    return " ".join(sentences)


class LineEnd(NamedTuple):
    """The last point of a line and the label to write beside it."""

    x: float
    y: float
    label: str
    color: str


class MeanCurve(NamedTuple):
    """The mean over runs that differ only in their seed, and the runs that it leaves out.

    `step`, `mean` and `deviation` have the shape (steps,); `deviation` is the sample standard
    deviation, NaN for a single run. `stopped` and `diverged` hold a table (step, value) for each
    run that ends before the others or diverges; a diverged run ends at its last finite value, or
    with NaN at its first step if it has none. `seeds` are the numbers of runs that were averaged.
    """

    step: NDArray[np.int64]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    stopped: list[pd.DataFrame]
    diverged: list[pd.DataFrame]
    seeds: tuple[int, ...] = ()

    @property
    def end(self) -> tuple[float, float] | None:
        """The last point of the mean or, without a mean, of the longest run."""
        if len(self.step):
            return float(self.step[-1]), float(self.mean[-1])
        ends = [run.iloc[-1] for run in (*self.stopped, *self.diverged)]
        ends = [end for end in ends if np.isfinite(end["value"])]
        return max(((float(end["step"]), float(end["value"])) for end in ends), default=None)


def average_curves(curves: pd.DataFrame, value: str) -> MeanCurve:
    """Averages the column `value` over runs, for one split of a table of `load_curves`.

    Only runs that reach the last step are averaged: if runs dropped out of the mean on the way, it
    would jump there and show a change that no network made.
    """
    curves = curves.sort_values("step")
    finite = np.isfinite(curves[["loss", value]].to_numpy(np.float64)).all(axis=1)
    table = curves[["folder", "step"]].assign(value=curves[value], finite=finite)
    by_run = table.groupby("folder", sort=False)
    last, whole = by_run["step"].max(), by_run["finite"].all()
    if "diverged" in curves:
        whole &= ~curves.groupby("folder", sort=False)["diverged"].any()
    complete = whole & (last == curves["step"].max())
    diverged, stopped = list[pd.DataFrame](), list[pd.DataFrame]()
    for folder in complete.index[~complete]:
        run = table[table["folder"] == folder]
        shown = run.loc[run["finite"].cummin(), ["step", "value"]]
        if whole[folder]:
            stopped.append(shown)
        else:
            first = run.head(1)[["step"]].assign(value=np.nan)
            diverged.append(shown if len(shown) else first)
    # The steps that all of the complete runs have measured.
    averaged = complete.index[complete]
    together = table[table["folder"].isin(averaged)].pivot(
        index="step", columns="folder", values="value"
    )
    together = together[averaged].dropna()
    return MeanCurve(
        step=together.index.to_numpy(dtype=np.int64),
        mean=together.mean(axis=1).to_numpy(dtype=np.float64),
        deviation=together.std(axis=1, ddof=1).to_numpy(dtype=np.float64),
        stopped=stopped,
        diverged=diverged,
        seeds=(int(complete.sum()),),
    )


def draw_mean(axes: Axes, curve: MeanCurve, color: str, *, bold: bool = True) -> None:
    """Draws a mean in a band of one sample standard deviation on either side.

    The band is the deviation and not the range, because a range widens with the number of seeds.
    Each run outside the mean is drawn as a thin dashed line, which ends in a cross if it diverged.
    Call `show_crosses` once the limits of the axes are set.
    """
    line = _line(bold)
    note(axes, "band", curve.seeds)
    if curve.stopped or curve.diverged:
        note(axes, "outside", [True])
    # A handful of measurements should look like one.
    few = {"marker": "o", "markersize": 2 * line["linewidth"]} if len(curve.step) <= 20 else {}
    axes.plot(curve.step, curve.mean, color=color, **line, **few)
    if np.isfinite(curve.deviation).any():
        low, high = curve.mean - curve.deviation, curve.mean + curve.deviation
        if (curve.mean >= 0).all():
            low = np.maximum(low, 0)
        alpha = 0.22 if bold else 0.12
        axes.fill_between(curve.step, low, high, color=color, alpha=alpha, linewidth=0)
    for run in (*curve.stopped, *curve.diverged):
        axes.plot(run["step"], run["value"], color=color, linestyle=_DASHES, linewidth=0.7)
    for run in curve.diverged:
        last = run.tail(1)
        axes.plot(last["step"], last["value"], color=color, gid=_CROSS, **_CROSS_LOOK)


def show_crosses(axes: Axes, *, lower_is_better: bool = True) -> None:
    """Moves the crosses of diverged runs to the edge of the axes if they are beyond it.

    A run without a finite value has its cross at the edge of the worst values.
    """
    low, high = axes.get_ylim()
    for line in axes.lines:
        if line.get_gid() == _CROSS:
            value = np.asarray(line.get_ydata(), float)
            line.set_ydata(
                np.clip(np.nan_to_num(value, nan=high if lower_is_better else low), low, high)
            )


def draw_diverged(axes: Axes, x: float, color: str) -> None:
    """Draws the cross of runs that diverged, which have no value, at the upper edge of the axes."""
    axes.plot([x], [1], color=color, transform=axes.get_xaxis_transform(), **_CROSS_LOOK)


def draw_error_bars(
    axes: Axes,
    x: pd.Series,
    mean: pd.Series,
    deviation: pd.Series,
    color: str,
    *,
    bold: bool = True,
    seeds: Iterable[int] = (),
) -> None:
    """Draws means joined by a line, with error bars of one sample standard deviation.

    The caption says of how many `seeds`.
    """
    note(axes, "bar", seeds)
    look: dict[str, Any] = (
        {"markersize": 4, "elinewidth": 1} if bold else {"markersize": 2.5, "elinewidth": 0.7}
    )
    axes.errorbar(x, mean, deviation.fillna(0), color=color, marker="o", **look, **_line(bold))


def _line(bold: bool) -> dict[str, Any]:
    return {"linewidth": 1.5, "zorder": 3} if bold else {"linewidth": 0.7, "zorder": 2.5}


def metric_curves(
    curves: pd.DataFrame,
    metric: str | None = None,
    *,
    panel: str,
    series: str,
    label: str = "{}",
    width: float = TEXT_WIDTH,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draws a metric on training (thin) and test data (bold) against steps.

    The form is that of figure 6 of He et al. 2015. The training curve is that of the whole training
    split if all runs have `train.evaluate_train`.

    Args:
        curves: A table of `load_curves` with two additional columns, `panel` and `series`.
        metric: The column to draw; by default the primary metric of the runs.
        panel: The column whose values each have a panel, with the value as its title.
        series: The column whose values each have a color and a label at the end of the line.
        label: The format of these labels, applied to a value of `series`.
        width: Width of the figure, in inches.
        limits: Limits of the vertical axis; by default those of `metric_limits`.

    Raises:
        ValueError: if `metric` is None and the runs have several primary metrics.
    """
    shown, curves = _select_metric(curves, metric)
    train = training_split(curves)
    titles = list(dict.fromkeys(curves[panel]))
    palette = colors(curves[series])
    figure, grid = panels(len(titles), width)
    note(grid[0], "log_every", curves[curves["split"] == "train"].groupby("folder")["step"].min())
    runs = curves.drop_duplicates("folder")
    _LINES[figure] = pd.DataFrame(
        {
            "folder": runs["folder"],
            "panel": runs[panel].map(str),
            "label": runs[series].map(label.format),
            "color": runs[series].map(palette),
        }
    )
    ends: list[list[LineEnd]] = []
    means: list[MeanCurve] = []
    for axes, title in zip(grid, titles, strict=True):
        axes.set_title(plain(title))
        ends.append([])
        for name, color in palette.items():
            chosen = curves[(curves[panel] == title) & (curves[series] == name)]
            end = None
            # The label belongs to the test curve, or to the training curve before any evaluation.
            for split in (train, "test"):
                mean = average_curves(chosen[chosen["split"] == split], shown.name)
                draw_mean(axes, mean, color, bold=split == "test")
                end = mean.end or end
                means.append(mean)
            if end is not None:
                ends[-1].append(LineEnd(*end, label.format(name), color))
        note(axes, "training", [train])
        set_metric_axis(axes, shown)
        set_step_axis(axes, int(curves["step"].max()))
        axes.label_outer()
    worse = 1 if shown.lower_is_better else -1
    finals = [m.mean[-1] + worse * np.nan_to_num(m.deviation[-1]) for m in means if len(m.step)]
    if limits := limits or metric_limits(finals, shown):
        grid[0].set_ylim(*limits)
    for axes in grid:
        show_crosses(axes, lower_is_better=shown.lower_is_better)
    unfinished, diverged = any(mean.stopped for mean in means), any(mean.diverged for mean in means)
    handles = legend_handles(unfinished=unfinished, diverged=diverged)
    columns = 4 if width > COLUMN_WIDTH else 2
    figure.legend(handles=handles, loc="outside upper right", ncols=columns)
    for axes, labels in zip(grid, ends, strict=True):
        label_ends(axes, labels)
    return figure


def training_split(curves: pd.DataFrame) -> str:
    """Returns the split with the training values to draw: "train_set" if all runs have it."""
    measured = set(curves.loc[curves["split"] == "train_set", "folder"])
    return "train_set" if measured and measured == set(curves["folder"]) else "train"


error_curves = metric_curves
"""The name of `metric_curves` from when every primary metric was an error."""


def _select_metric(curves: pd.DataFrame, name: str | None) -> tuple[Metric, pd.DataFrame]:
    """Returns the metric to draw and the measurements of the runs that have it."""
    primary = {metric.name: metric for metric in primary_metrics(curves)}
    if name is None and len(primary) > 1:
        several = ", ".join(primary)
        raise ValueError(f"these runs have several primary metrics: {several}; choose one: metric=")
    metric = primary.get(name or next(iter(primary))) or Metric(str(name))
    if len(primary) > 1 and metric.name in primary:
        curves = curves[curves["primary_metric"] == metric.name]
    # A task need not measure the loss of a split; a missing loss is then no divergence.
    measured = curves.groupby("split")["loss"].transform("count") > 0
    return metric, curves.assign(loss=curves["loss"].where(measured, 0.0))


def layer_profile(
    layers: pd.DataFrame,
    value: str,
    *,
    series: str = "step",
    label: str = "{}",
    log: bool = False,
    width: float = COLUMN_WIDTH,
    panel: str | None = None,
    palette: Mapping[Any, str] | None = None,
) -> Figure:
    """Draws a diagnostic against the index of the layer in the network.

    Args:
        layers: A table of `load_layers`, with an additional column `series` unless that is "step".
        value: The column to draw; layers without a value are left out.
        series: The column whose values each have a line. Rows of the same layer within a line,
            such as those of several seeds, are averaged, in a band of one standard deviation.
        label: The format of the labels at line ends, applied to a value of `series`.
        log: Whether the vertical axis is logarithmic, which leaves out values of zero or less.
        width: Width of the figure, in inches.
        panel: The column whose values each have a panel; by default all lines share one.
        palette: The color of each value of `series`; by default those of `colors`.
    """
    measured = layers[layers.groupby("layer")[value].transform("count") > 0]
    titles = list(dict.fromkeys(measured[panel])) if panel else [""]
    palette = palette or colors(measured[series])
    figure, grid = panels(len(titles), width)
    ends = []
    for axes, title in zip(grid, titles, strict=True):
        own = measured[measured[panel] == title] if panel else measured
        ends.append(
            [
                LineEnd(*curve.end, label.format(name), palette[name])
                for name in palette
                if (
                    curve := _draw_profile(
                        axes, own[own[series] == name], value, palette[name], log
                    )
                ).end
            ]
        )
        axes.set_title(plain(title) if len(titles) > 1 else "")
        axes.set_yscale("log" if log else "linear")
        axes.set_xlabel("layer, from the input to the output")
        axes.set_ylabel(plain(value.replace("_", " ")))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(titles) > 1:
            axes.label_outer()
    for axes, labels in zip(grid, ends, strict=True):
        label_ends(axes, labels)
    return figure


def _draw_profile(axes: Axes, rows: pd.DataFrame, value: str, color: str, log: bool) -> MeanCurve:
    """Draws the mean of each layer over seeds, and returns it."""
    groups = rows.groupby("layer", sort=False)[value]
    profile = groups.agg(["mean", "std", "count"]).reset_index(drop=True)
    profile = profile[profile["mean"] > (0 if log else -np.inf)]
    mean, deviation, count = profile.to_numpy(dtype=np.float64).T
    curve = MeanCurve(profile.index.to_numpy(), mean, deviation, [], [], tuple(set(count)))
    if len(mean):
        draw_mean(axes, curve, color)
    return curve


def legend_handles(*, unfinished: bool = False, diverged: bool = False) -> list[Line2D]:
    """Returns legend entries for line weights and, on request, for runs outside a mean."""
    lines: dict[str, dict[str, Any]] = {"test": _line(bold=True), "training": _line(bold=False)}
    if unfinished:
        lines["unfinished run"] = {"linewidth": 0.7, "linestyle": _DASHES}
    if diverged:
        lines["diverged run"] = _CROSS_LOOK
    return [Line2D([], [], color="0.3", label=name, **line) for name, line in lines.items()]


def metric_limits(finals: Sequence[float], metric: Metric) -> tuple[float, float] | None:
    """Returns axis limits that show where curves end, or None to leave the axis alone.

    Curves begin near the metric of a random guess, and an axis that includes the beginning shows
    little of what is compared. The limits extend half as far again as the worst of `finals`, from
    the best possible value. They include all fractions if no curve has ended yet.
    """
    if metric.unit == "fraction":
        errors = finals if metric.lower_is_better else [1 - final for final in finals]
        worst = 1.5 * max(errors, default=1.0)
        rounded = (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
        top = next((limit for limit in rounded if limit >= worst), 1.0)
    elif metric.lower_is_better and min(finals, default=0) > 0:
        top = 1.5 * max(finals)
    else:
        return None
    if not math.isfinite(top):
        return None
    low = -0.012 * top  # a line at the best value remains visible beside the axis
    return (low, top) if metric.lower_is_better else (1 - top, 1 - low)


def set_metric_axis(axes: Axes, metric: Metric, prefix: str = "") -> None:
    """Formats the vertical axis for a metric: fractions in per cent, the unit in the label."""
    axes.yaxis.set_major_formatter(lambda value, _: f"{metric.scale * value:g}")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_ylabel(plain(f"{prefix}{metric.label}"))


def set_step_axis(axes: Axes, last: int) -> None:
    """Formats the horizontal axis for training steps from 0 to `last`."""
    axes.set_xlim(0, 1.01 * last)  # room for half a marker
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    if last >= 10_000:
        axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k" if step else "0")
    axes.set_xlabel("training steps")


_ENDS: WeakKeyDictionary[Axes, tuple[Sequence[LineEnd], list[Text]]] = WeakKeyDictionary()
"""The labels at the line ends of each axes and their texts, which `narrow` writes again."""


def label_ends(axes: Axes, ends: Sequence[LineEnd]) -> None:
    """Writes the label of each line to the right of `axes`, without overlaps, or none if too many.

    Call this function last: labels are placed for the current limits and size of the axes.
    """
    if len(ends) > MOST_LABELS:
        note(axes, "text", [f"Lines have no labels where there are more than {MOST_LABELS}."])
        return
    if not ends:
        return
    _ENDS[axes] = (ends, [])
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # computes the layout, and with it the height of the axes
    box = axes.get_window_extent()
    points = figure.dpi / 72
    low, high = axes.get_ylim()
    heights = [axes.transData.transform((end.x, end.y))[1] for end in ends]
    heights = np.clip((np.array(heights) - box.y0) / box.height, 0, 1)
    size = FontProperties(size=matplotlib.rcParams["xtick.labelsize"]).get_size_in_points()
    positions = spread_apart(heights, 1.25 * size * points / box.height)
    for end, position in zip(ends, positions, strict=True):
        written = axes.annotate(
            plain(end.label),
            xy=(end.x, float(np.clip(end.y, low, high))),
            xytext=(1 + 9 * points / box.width, float(position)),
            textcoords="axes fraction",
            color=legible(end.color),  # text is thinner than lines
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
        _ENDS[axes][1].append(written)


def spread_apart(
    positions: Sequence[float] | NDArray[np.float64], gap: float
) -> NDArray[np.float64]:
    """Moves positions at least `gap` apart, with the smallest sum of squared displacements.

    Their order is preserved, and they stay between 0 and 1; if they do not fit, the gap shrinks
    until they do. After subtraction of the gaps the problem is isotonic regression.
    """
    if not len(positions):
        return np.empty(0)
    order = np.argsort(positions, kind="stable")
    gaps = min(gap, 1 / max(len(positions) - 1, 1)) * np.arange(len(positions))
    pooled = isotonic_regression(np.asarray(positions)[order] - gaps).x
    moved = np.empty(len(positions))
    moved[order] = np.clip(pooled, 0, 1 - gaps[-1]) + gaps
    return moved


@style()
def narrow(figure: Figure) -> bool:
    """Rearranges a figure for a column: its panels below each other, as wide as one column.

    Returns:
        True if the figure is now as narrow as a column. A figure that cannot be rearranged, such as
        one with a color bar, is left unchanged.
    """
    width, height = figure.get_size_inches()
    if width <= COLUMN_WIDTH:
        return True
    grids = {axes.get_gridspec() for axes in figure.axes}
    if len(grids) != 1 or any(axes.name != "rectilinear" for axes in figure.axes):
        return False
    [grid] = grids
    if grid is None or len(figure.axes) > grid.nrows * grid.ncols:
        return False
    count, first = len(figure.axes), figure.axes[0]
    rows = sum(_narrow_legend(figure, legend) for legend in list(figure.legends))
    figure.set_size_inches(COLUMN_WIDTH, count * max(height / grid.nrows, 2.2) + 0.15 * rows)
    column = figure.add_gridspec(count, 1)
    for row, axes in enumerate(figure.axes):
        axes.set_subplotspec(column[row])
        axes.tick_params(labelleft=True, labelbottom=True)
        # `label_outer` removed the labels of the inner panels.
        axes.set_ylabel(axes.get_ylabel() or first.get_ylabel())
        axes.set_xlabel(axes.get_xlabel() or figure.axes[-1].get_xlabel())
        for text in _ENDS.get(axes, ((), []))[1]:
            text.remove()
    for axes in figure.axes:
        label_ends(axes, _ENDS.get(axes, ((), []))[0])
    return True


def _narrow_legend(figure: Figure, legend: Legend) -> int:
    """Replaces a legend of a figure by one that fits into a column; returns its number of rows."""
    handles = [handle for handle in legend.legend_handles if handle is not None]
    entries = [text.get_text() for text in legend.get_texts()]
    columns = 1 if max(map(len, entries), default=0) > LONGEST_ENTRY else 2
    legend.remove()
    figure.legend(handles, entries, loc="outside upper left", ncols=columns)
    return math.ceil(len(entries) / columns)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes `figure` atomically as `stem`.png, .pdf and .svg, and returns the paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, metadata in _METADATA.items():
        content = io.BytesIO()
        with style():
            figure.savefig(content, format=suffix, metadata=metadata)
        paths.append(write_atomically(stem.with_name(f"{stem.name}.{suffix}"), content.getvalue()))
    return paths
