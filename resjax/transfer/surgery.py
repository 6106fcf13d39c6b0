"""Weights changed for another task: another head, other channels, a part of them."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from resjax.data.normalization import Statistics
from resjax.errors import UserError
from resjax.models.convolution import he_normal
from resjax.models.layout import Variables
from resjax.transfer.weights import Weights, flat, nested
from resjax.xla.compile_options import quick_compile

FIRST = "params/stem/Conv_0/kernel"


def new_head(
    weights: Weights, classes: int, key: Key[Array, ""] | None = None, *, zero: bool = False
) -> Weights:
    """The backbone with a head for other classes.

    Args:
      weights: with a head, which is dropped, or without.
      classes: of the new task.
      key: of the new head's kernel (He et al. 2015's initialisation); None is key 0.
      zero: start from a kernel of zeros, as BiT does (Kolesnikov et al. 2020, arXiv 1912.11370).
    """
    params = {name: value for name, value in weights.variables["params"].items() if name != "head"}
    shape = _channels_out(weights), classes
    draw = jax.nn.initializers.zeros if zero else he_normal
    kernel = np.asarray(draw(jax.random.key(0) if key is None else key, shape, jnp.float32))
    head = {"kernel": kernel, "bias": np.zeros(classes, np.float32)}
    return replace(
        weights,
        model={**weights.model, "classes": classes},
        variables={**weights.variables, "params": {**params, "head": head}},
        class_names=(),
    )


def backbone(weights: Weights) -> Weights:
    """Without the head: the network then puts out the mean of its last stage over the image."""
    params = {name: value for name, value in weights.variables["params"].items() if name != "head"}
    return replace(
        weights,
        model={**weights.model, "classes": 0},
        variables={**weights.variables, "params": params},
        class_names=(),
    )


def with_channels(weights: Weights, channels: int) -> Weights:
    """For images of another number of channels.

    For one channel the first convolution's filters are summed over theirs, so a grey image gives
    what it gave as RGB, if all channels are normalised alike. For more than there are the filters
    repeat, scaled so that a constant image gives as much as before. The normalisation follows.
    """
    arrays = flat(weights.variables)
    first = arrays[FIRST]
    there = first.shape[2]
    if channels == there:
        return weights
    if channels == 1:
        arrays[FIRST] = first.sum(2, keepdims=True)
    else:
        arrays[FIRST] = first[:, :, np.arange(channels) % there] * np.float32(there / channels)
    mean, std = (_for_channels(array, there, channels) for array in weights.statistics[:2])
    return replace(
        weights,
        variables=nested(arrays),
        statistics=Statistics(mean, std),
        preprocessing=replace(weights.preprocessing, channels=channels),
    )


class Fitted(NamedTuple):
    """A network's variables, some of them taken from weights.

    Attributes:
      variables: in the unrolled layout.
      taken: paths whose arrays come from the weights.
      new: paths that the weights lack, or have in another shape.
      left: paths of the weights that the network lacks, or has in another shape.
    """

    variables: Variables
    taken: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]

    def report(self) -> str:
        """In one line: how many arrays were taken, and which were not."""
        told = f"{len(self.taken)} arrays taken"
        for what, names in (("new", self.new), ("left", self.left)):
            if names:
                told += f"; {len(names)} {what}: {_some(names)}"
        return told


def fitted(variables: Variables, weights: Weights) -> Fitted:
    """Takes from weights every array that a network has under the same path in the same shape.

    Args:
      variables: of the network, in the unrolled layout.
      weights: of perhaps another one.

    Raises:
      UserError: there is not one such array.
    """
    own, given = flat(variables), flat(weights.variables)
    taken = tuple(path for path in own if path in given and given[path].shape == own[path].shape)
    if not taken:
        raise UserError("not one array of the weights has the name and shape of one of the network")
    return Fitted(
        variables=nested({**own, **{path: given[path] for path in taken}}),
        taken=taken,
        new=tuple(own.keys() - {*taken}),
        left=tuple(given.keys() - {*taken}),
    )


def refitted(weights: Weights, **fields: Any) -> tuple[Weights, Fitted]:
    """Weights for another network: what fits is taken, the rest is drawn.

    Args:
      weights: of a network that is like it.
      **fields: of `resjax.build`, in which the other network differs.

    Raises:
      UserError: nothing fits.
      ValueError: there is no such network.
    """
    changed = replace(weights, model={**weights.model, **fields})
    network = changed.network(loop="unroll")
    side = weights.preprocessing.size
    images = jnp.zeros((1, side, side, weights.preprocessing.channels))
    drawn = jax.jit(network.init, compiler_options=quick_compile())(jax.random.key(0), images)
    found = fitted(jax.device_get(drawn), weights)
    return replace(changed, variables=found.variables), found


def _some(names: Any, shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(sorted(names)[:shown]) + more


def _channels_out(weights: Weights) -> int:
    """Of the backbone."""
    headless = weights.network(classes=0)
    side = weights.preprocessing.size
    images = jax.ShapeDtypeStruct((1, side, side, weights.preprocessing.channels), jnp.float32)
    shapes = jax.eval_shape(headless.init_with_output, jax.random.key(0), images)
    return int(shapes[0].shape[-1])


def _for_channels(
    array: Float[np.ndarray, "..."], there: int, channels: int
) -> Float[np.ndarray, "..."]:
    """A mean or deviation, of every channel or of all."""
    if not array.ndim or array.shape[-1] != there:
        return array
    if channels == 1:
        return array.mean(-1, keepdims=True)
    return array[..., np.arange(channels) % there]
