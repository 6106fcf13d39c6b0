"""Loss surfaces along filter-normalized directions (Li et al. 2018, arXiv 1712.09913).

A surface is the loss at w + a d + b e, where w are the trained parameters and d, e two random
directions. Each filter of a direction has the norm of the filter of w in its place, so that
two networks that differ in scales of weights only, which BN undoes, have equal surfaces.
Biases, and the scales of norms, have the direction 0, as in the authors' code.

The network is in evaluation mode, as in the authors' code: BN keeps the running statistics of w.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from resjax.models.layout import path_name
from resjax.tasks import Task
from resjax.tasks.base import Batch
from resjax.train.step import eval_step
from resjax.xla.compile_options import quick_compile

AT_ONCE = 8
"""Points that an accelerator evaluates at once. A CPU evaluates one after the other, because there
a convolution with several sets of weights is slower than several convolutions."""


def random_direction(key: Key[Array, ""], params: Any) -> Any:
    """Returns a random direction with the norm of each filter of the parameters.

    Args:
      key: of the Gaussian random numbers.
      params: of a network, unrolled or scanned. A filter is the weights of one output channel of a
        convolution or of a dense layer.
    """
    return _compiled_directions()(key, params)


@cache
def _compiled_directions() -> Any:
    return jax.jit(_directions, compiler_options=quick_compile())


def _directions(key: Key[Array, ""], params: Any) -> Any:
    leaves, structure = jax.tree.flatten_with_path(params)
    keys = jax.random.split(key, len(leaves))
    parts = [_direction(k, path_name(p), leaf) for k, (p, leaf) in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, parts)


def _direction(key: Key[Array, ""], path: str, weights: Array) -> Array:
    stacked = "/blocks/" in f"/{path}"  # along the first axis, by a scan
    inputs = tuple(range(int(stacked), weights.ndim - 1))
    if not inputs:
        return jnp.zeros_like(weights)
    direction = jax.random.normal(key, weights.shape, weights.dtype)
    norm = partial(jnp.linalg.vector_norm, axis=inputs, keepdims=True)
    return direction * (norm(weights) / norm(direction))


def loss_surface(
    model: Any,
    task: Task,
    variables: Mapping[str, Any],
    batches: Iterable[Batch],
    directions: Sequence[Any],
    points: Float[np.ndarray, "points directions"],
    at_once: int | None = None,
) -> dict[str, Float[np.ndarray, "points"]]:
    """Evaluates a network at points of the space that some directions span.

    Args:
      model: has `apply`.
      task: loss and metrics.
      variables: `params` and `batch_stats`, the origin.
      batches: as `FinishedRun.batches` yields them; the same ones for each point.
      directions: like `params`.
      points: coordinates along the directions.
      at_once: points that a device evaluates at once; by default `AT_ONCE`, and 1 on a CPU. All
        devices take part.

    Returns:
      The metrics of the task by name, `loss` among them, at each point; NaN at points with a loss
      that is not finite.
    """
    devices = jax.devices()
    at_once = at_once or (1 if devices[0].platform == "cpu" else AT_ONCE)
    chunk = min(at_once * len(devices), len(points))

    @jax.jit
    def sums(variables: Any, directions: Any, points: Any, batch: Batch) -> Any:
        def at(point: Float[Array, "directions"]) -> Any:
            moved = jax.tree.map(
                lambda w, *d: w + sum(x * each for x, each in zip(point, d, strict=True)),
                variables["params"],
                *directions,
            )
            return eval_step({**variables, "params": moved}, batch, model=model, task=task)

        return at(points[0]) if chunk == 1 else jax.vmap(at)(points)

    spread = NamedSharding(Mesh(np.array(devices), "points"), PartitionSpec("points"))
    batches = list(batches)
    totals = []
    for first in range(0, len(points), chunk):
        # The last chunk repeats points, so that all have one shape.
        part = np.resize(points[first : first + chunk], (chunk, points.shape[1]))
        placed = jnp.asarray(part, jnp.float32)
        if chunk % len(devices) == 0:
            placed = jax.device_put(placed, spread)
        added = [sums(variables, tuple(directions), placed, batch) for batch in batches]
        totals.append(jax.tree.map(lambda *each: sum(each), *added))
    each_point = [
        jax.tree.map(lambda leaf, i=index: leaf if chunk == 1 else leaf[i], total)
        for total in map(jax.device_get, totals)
        for index in range(chunk)
    ]
    metrics = [task.metrics(total) for total in each_point[: len(points)]]
    finite = np.isfinite([each["loss"] for each in metrics])
    return {name: np.where(finite, [each[name] for each in metrics], np.nan) for name in metrics[0]}


def grid(reach: float, points: int) -> Float[np.ndarray, "points*points 2"]:
    """Returns a square grid of points from -reach to reach, with the origin in its middle.

    Args:
      reach: in units of the parameters' own norm.
      points: along each direction, an odd number.
    """
    if points % 2 == 0:
        raise ValueError(f"a grid of {points} points has none in its middle; take {points + 1}")
    along = np.linspace(-reach, reach, points)
    return np.stack(np.meshgrid(along, along, indexing="ij"), -1).reshape(-1, 2)
