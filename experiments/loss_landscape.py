"""Loss landscape: depth makes the surface of plain networks chaotic, and shortcuts prevent it

Li et al. 2018 (Visualizing the Loss Landscape of Neural Nets, arXiv 1712.09913, sections 5 and 6)
draw the loss around trained networks, along two random directions whose filters have the norms of
the network's. Around ResNet-20, with or without shortcuts, the surface is smooth and nearly convex.
Without shortcuts it becomes chaotic at 56 layers; with them it stays as it was. They compare the
largest and the smallest eigenvalue of the Hessian to show that convex regions of the surface are
convex in all directions.

The sweep trains plain and residual networks. `measure` computes the training loss on a grid of
points, and extreme eigenvalues and the spectral density of the Hessian at the trained weights by
the Lanczos method, all in evaluation mode: BN has its running statistics. The nonconvexity of a
surface is, averaged over the grid, the size of its negative curvature divided by that of its
largest curvature: 0 if it is convex everywhere, 1 if it curves downwards more than upwards
everywhere.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from resjax.analysis import figures as draw
from resjax.analysis.claims import Claim, compare, trend
from resjax.sweeps import param, product

if TYPE_CHECKING:
    from resjax.measurements import FinishedRun

REACH, POINTS = 1.0, 17
"""The grid reaches from -1 to 1 in units of the weights' own norm, as the paper's figures do."""

EXAMPLES, HESSIAN_EXAMPLES = 400, 200
"""Training examples, spread evenly over the training split, of the loss and of its Hessian."""

LARGEST, LANCZOS_STEPS = 5, 30
"""The largest eigenvalues to compute, beside the smallest, and products with the Hessian."""

LEVELS = 16  # contour lines
HIGHEST = 1e3  # of the losses that are drawn; higher ones have its color


def sweep(
    depths: Iterable[int] = (20, 56, 110),
    shortcuts: Iterable[str] = ("none", "pad"),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run."""
    yield from product(
        param("model.depth", depths), param("model.shortcut", shortcuts), param("seed", seeds)
    )


def measure(run: "FinishedRun") -> list[dict[str, Any]]:
    """Returns the surface and the curvature.

    Returns:
      A row with the metrics for each point of the grid, `x` and `y`; one for each eigenvalue, of
      rank 1, 2, ... from the largest or -1 for the smallest; and one for each point of the spectral
      density, with its weight.
    """
    import jax

    from resjax.measurements import Hessian, grid, loss_surface, random_direction

    *keys, own, other = jax.random.split(jax.random.key(run.config.seed), 4)
    directions = [random_direction(key, run.variables["params"]) for key in keys]
    points, batches = grid(REACH, POINTS), run.batches("train", EXAMPLES)
    surface = loss_surface(run.model, run.task, run.variables, batches, directions, points)
    rows: list[dict[str, Any]] = [
        {"x": x, "y": y, **dict(zip(surface, values, strict=True))}
        for (x, y), *values in zip(points, *surface.values(), strict=True)
    ]
    batches = run.batches("train", HESSIAN_EXAMPLES)
    hessian = Hessian(run.model, run.task, run.variables, batches)
    found = hessian.eigenvalues(own, largest=LARGEST, steps=LANCZOS_STEPS)
    ranks = [*range(1, LARGEST + 1), -1]
    density = hessian.spectral_density(other, probes=1, steps=LANCZOS_STEPS)
    rows += [
        {"rank": rank, "eigenvalue": value, "eigenvalue_error": error}
        for rank, value, error in zip(ranks, found.values, found.errors, strict=True)
    ]
    spectrum = zip(density.values.ravel(), density.weights.ravel(), strict=True)
    return rows + [{"spectrum": value, "weight": weight} for value, weight in spectrum]


@draw.style()
def figures(runs: pd.DataFrame, measurements: pd.DataFrame) -> dict[str, Figure]:
    """Draws the surface of one run of each network as contours and in three dimensions."""
    if "x" not in measurements:
        return {}
    measured = runs[runs["folder"].isin(measurements["folder"])]
    first = measured.sort_values("seed").drop_duplicates(["model.shortcut", "model.depth"])
    first = first.sort_values(["model.shortcut", "model.depth"])
    surfaces = {}
    for row in first.to_dict("records"):
        own = measurements[measurements["folder"] == row["folder"]]
        surfaces[f"{network(row)}, {row['model.depth']} layers"] = as_grid(own, "loss")
    columns = first["model.depth"].nunique()
    drawn = {
        "contours": contours(surfaces, columns),
        "surfaces": three_dimensional(surfaces, columns),
    }
    seeds = " or ".join(map(str, sorted(first["seed"].unique())))
    shown = f"Each surface is that of one run, seed {seeds}; losses above {HIGHEST:g} look alike."
    for figure in drawn.values():
        draw.note(figure.axes[0], "text", [shown])
    if "spectrum" in measurements:
        names = measured.apply(network, axis=1)
        spectra = measured[["folder", "model.depth"]].assign(network=names)
        drawn["spectrum"] = spectrum(spectra.merge(measurements, on="folder"))
    return drawn


def spectrum(points: pd.DataFrame) -> Figure:
    """Draws the share of the Hessian's eigenvalues above a size, by their sign, over all seeds."""
    depths = sorted(points["model.depth"].unique())
    palette = draw.colors(points["network"])
    figure, grid = draw.panels(len(depths), height=2.6)
    for axes, depth in zip(grid, depths, strict=True):
        axes.set_title(f"{depth} layers")
        for name, color in palette.items():
            own = points[(points["model.depth"] == depth) & (points["network"] == name)]
            own = own.dropna(subset="spectrum")
            for sign, line in ((1, "-"), (-1, ":")):
                chosen = own[sign * own["spectrum"] > 0]
                size = abs(chosen["spectrum"]).sort_values(ascending=False)
                share = chosen["weight"].loc[size.index].cumsum() / own["folder"].nunique()
                label = f"{name}, {'positive' if sign > 0 else 'negative'}"
                axes.step(size, share, line, where="post", color=color, label=label)
        axes.set(xscale="log", yscale="log", xlabel="size of the eigenvalue")
        axes.set_ylabel("share of larger ones")
        axes.label_outer()
        draw.note(axes, "text", ["Shares are means over all runs of a network."])
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def network(run: Any) -> str:
    """Returns "plain", "residual", or the shortcut of a run if it is another one."""
    names = {"none": "plain", "pad": "residual"}
    return names.get(run["model.shortcut"], str(run["model.shortcut"]))


Grid = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def as_grid(points: pd.DataFrame, value: str) -> Grid:
    """Returns x, y and a value of the points of a run as square arrays."""
    table = points.dropna(subset="x").pivot_table(
        index="x", columns="y", values=value, dropna=False
    )
    x, y = np.meshgrid(table.index.to_numpy(), table.columns.to_numpy(), indexing="ij")
    return x, y, table.to_numpy(np.float64)


def limits(surfaces: dict[str, Grid]) -> tuple[float, float]:
    """Returns the lowest and the highest loss of the scale that all surfaces share."""
    losses = np.concatenate([loss[np.isfinite(loss)] for *_, loss in surfaces.values()])
    lowest = max(losses.min(), 1e-6)
    return lowest, min(losses.max(), HIGHEST) * 1.001


def contours(surfaces: dict[str, Grid], columns: int) -> Figure:
    """Draws contours at losses with equal ratios, in one color scale; a cross marks the run."""
    low, high = limits(surfaces)
    norm, levels = LogNorm(low, high), np.geomspace(low, high, LEVELS)
    rows = -(-len(surfaces) // columns)
    figure = Figure(figsize=(draw.TEXT_WIDTH, 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (title, (x, y, loss)) in zip(grid.flat, surfaces.items(), strict=False):
        axes.set_title(title)
        filled = np.clip(np.nan_to_num(loss, nan=np.inf), low, high)
        axes.contourf(x, y, filled, levels, norm=norm, cmap="viridis", alpha=0.85)
        axes.contour(x, y, filled, levels, colors="black", linewidths=0.3)
        axes.plot(0, 0, "+", color="white", markersize=6)
        axes.set_aspect("equal")
        axes.set_xlabel("first direction")
        axes.set_ylabel("second direction")
        axes.label_outer()
    _add_scale(figure, grid, norm)
    return figure


def three_dimensional(surfaces: dict[str, Grid], columns: int) -> Figure:
    """Draws the logarithm of the loss as a height."""
    low, high = limits(surfaces)
    norm = LogNorm(low, high)
    rows = -(-len(surfaces) // columns)
    figure = Figure(figsize=(draw.TEXT_WIDTH, 2.7 * rows), layout="constrained")
    shape: dict[str, Any] = {"squeeze": False, "subplot_kw": {"projection": "3d"}}
    grid = figure.subplots(rows, columns, **shape)
    shades = matplotlib.colormaps["viridis"]
    for axes, (title, (x, y, loss)) in zip(grid.flat, surfaces.items(), strict=False):
        axes.set_title(title, pad=0)
        shown = np.clip(np.nan_to_num(loss, nan=np.inf), low, high)
        height, look = np.log10(shown), {"linewidth": 0.1, "edgecolor": "black"}
        axes.plot_surface(
            x, y, height, facecolors=shades(norm(shown)), rstride=1, cstride=1, shade=False, **look
        )
        axes.set_zlim(np.log10(low), np.log10(high))
        axes.zaxis.set_major_formatter(lambda value, _: f"{10**value:.2g}")
        axes.tick_params(labelsize=6, pad=-3)
        axes.locator_params(nbins=5)
        axes.view_init(elev=30, azim=-60)
    _add_scale(figure, grid, norm)
    return figure


def _add_scale(figure: Figure, grid: Any, norm: LogNorm) -> None:
    shades = matplotlib.cm.ScalarMappable(norm, "viridis")
    figure.colorbar(shades, ax=grid, label="training loss", shrink=0.8, format="%.2g")


def claims(runs: pd.DataFrame, measurements: pd.DataFrame) -> list[Claim]:
    """Judges the surfaces by their nonconvexity."""
    if "x" not in measurements:
        return []
    values = [
        {"folder": folder, "nonconvexity": nonconvexity(as_grid(points, "loss"))}
        for folder, points in measurements.groupby("folder", sort=False)
    ]
    runs = runs.merge(pd.DataFrame(values), on="folder")
    runs = runs.merge(saddles(measurements), on="folder", how="left")
    shallow, deep = (
        {"model.depth": depth} for depth in (runs["model.depth"].min(), runs["model.depth"].max())
    )
    plain, residual = {"model.shortcut": "none"}, {"model.shortcut": "pad"}
    li, seen = "Li et al. 2018 (1712.09913), section {}", "figure 5, no numbers"
    return [
        compare(
            runs,
            "The surface of a deep plain network is less convex than that of a residual one",
            li.format("5.1"),
            "figure 1, no numbers",
            value="nonconvexity",
            treatment={**plain, **deep},
            control={**residual, **deep},
            expected="higher",
            names=("plain", "residual"),
        ),
        trend(
            runs,
            "The deeper a plain network, the less convex its surface",
            li.format("5.1"),
            seen,
            value="nonconvexity",
            where=plain,
            expected="higher",
        ),
        trend(
            runs,
            "The surface of a residual network is as convex at any depth",
            li.format("5.1"),
            seen,
            value="nonconvexity",
            where=residual,
            expected="same",
            margin=0.05,
        ),
        compare(
            runs,
            "The surface of a shallow plain network is as convex as that of a residual one",
            li.format("5.1"),
            seen,
            value="nonconvexity",
            treatment={**plain, **shallow},
            control={**residual, **shallow},
            expected="same",
            margin=0.05,
            names=("plain", "residual"),
        ),
        compare(
            runs,
            "At its trained weights a deep plain network curves downwards more, compared with its "
            "largest curvature, than a residual one",
            li.format("6"),
            "figure 7, no numbers",
            value="saddle",
            treatment={**plain, **deep},
            control={**residual, **deep},
            expected="higher",
            names=("plain", "residual"),
        ),
    ]


def saddles(measurements: pd.DataFrame) -> pd.DataFrame:
    """Returns, as `saddle` of each run, minus the smallest eigenvalue over the largest; at least 0.

    The eigenvalues are those of the Hessian of the whole network at its trained weights.
    """
    table = measurements.dropna(subset="rank").pivot_table(
        index="folder", columns="rank", values="eigenvalue"
    )
    return pd.DataFrame({"saddle": (-table[-1] / table[1]).clip(lower=0)}).reset_index()


def nonconvexity(surface: Grid) -> float:
    """Returns the mean over a surface of its negative curvature over its largest curvature.

    The curvatures are the eigenvalues of the Hessian of the surface, from differences of
    neighboring points. Points with a loss that is not finite are left out.
    """
    _, _, loss = surface
    center = loss[1:-1, 1:-1]
    xx = loss[2:, 1:-1] - 2 * center + loss[:-2, 1:-1]
    yy = loss[1:-1, 2:] - 2 * center + loss[1:-1, :-2]
    xy = (loss[2:, 2:] - loss[2:, :-2] - loss[:-2, 2:] + loss[:-2, :-2]) / 4
    mean, radius = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    lowest, highest = mean - radius, mean + radius
    largest = np.maximum(abs(lowest), abs(highest))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.maximum(-lowest, 0) / largest
    return float(np.nanmean(np.where(largest == 0, 0, ratio)))
