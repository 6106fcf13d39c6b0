"""Changes of weights: another head, no head, another number of channels, another network."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from resjax.data.normalization import Statistics
from resjax.errors import UserError, first_few
from resjax.models.convolution import he_normal
from resjax.models.layout import Variables
from resjax.transfer.weights import CLASSIFICATION, Weights, flatten, unflatten
from resjax.xla.compile_options import quick_compile

FIRST_KERNEL = "params/stem/Conv_0/kernel"


def backbone(weights: Weights) -> Weights:
    """Returns the weights without a head: the output is then the last stage's mean over h and w."""
    params, statistics = (
        {name: value for name, value in weights.variables[collection].items() if name != "head"}
        for collection in ("params", "batch_stats")
    )
    return replace(
        weights,
        model={**weights.model, "classes": 0},
        variables={**weights.variables, "params": params, "batch_stats": statistics},
        class_names=(),
        task=CLASSIFICATION,
    )


def new_head(
    weights: Weights, classes: int, key: Key[Array, ""] | None = None, *, zero: bool = False
) -> Weights:
    """Returns the backbone with a new head.

    Args:
      weights: with or without a head.
      classes: number of classes of the new head.
      key: for the new kernel, drawn as in He et al. 2015; None is key 0.
      zero: whether the kernel is zero instead, as in BiT (Kolesnikov et al. 2020, arXiv
        1912.11370).
    """
    headless = backbone(weights)
    shape = _output_channels(headless), classes
    draw = jax.nn.initializers.zeros if zero else he_normal
    kernel = np.asarray(draw(jax.random.key(0) if key is None else key, shape, jnp.float32))
    head = {"kernel": kernel, "bias": np.zeros(classes, np.float32)}
    return replace(
        headless,
        model={**weights.model, "classes": classes},
        variables={
            **weights.variables,
            "params": {**headless.variables["params"], "head": head},
        },
    )


def reorder_classes(weights: Weights, names: Sequence[str]) -> Weights:
    """Returns the weights with their classes, whose names are unique, in another order."""
    order = [weights.class_names.index(name) for name in names]
    params = weights.variables["params"]
    head = jax.tree.map(lambda array: array[..., order], params["head"])
    return replace(
        weights,
        variables={**weights.variables, "params": {**params, "head": head}},
        class_names=tuple(names),
    )


def with_channels(weights: Weights, channels: int) -> Weights:
    """Returns the weights for images with another number of channels.

    For one channel, the first convolution's filters are summed over their channels: the output for
    a grayscale image is that for the same image as RGB, if all channels are normalized alike. For
    more channels the filters repeat, scaled so that a constant image keeps its output. The
    statistics are adapted alike.
    """
    arrays = flatten(weights.variables)
    kernel = arrays[FIRST_KERNEL]
    existing = kernel.shape[2]
    if channels == existing:
        return weights
    if channels == 1:
        arrays[FIRST_KERNEL] = kernel.sum(2, keepdims=True)
    else:
        repeated = kernel[:, :, np.arange(channels) % existing]
        arrays[FIRST_KERNEL] = repeated * np.float32(existing / channels)

    def adapt(array: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        if not array.ndim or array.shape[-1] != existing:  # the same for all channels
            return array
        if channels == 1:
            return array.mean(-1, keepdims=True)
        return array[..., np.arange(channels) % existing]

    mean, std = map(adapt, weights.statistics[:2])
    return replace(
        weights,
        variables=unflatten(arrays),
        statistics=Statistics(mean, std),
        preprocessing=replace(weights.preprocessing, channels=channels),
    )


class Merged(NamedTuple):
    """The variables of a network, some of them copied from weights.

    Attributes:
      variables: in the unrolled layout.
      copied: paths of the arrays that come from the weights.
      new: paths that the weights lack or hold in another shape.
      unused: paths of the weights that the network lacks or holds in another shape.
    """

    variables: Variables
    copied: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]

    def report(self) -> str:
        """Returns one line: how many arrays were copied, and which were not."""
        parts = [f"{len(self.copied)} arrays copied"]
        for what, names in (("new", self.new), ("unused", self.unused)):
            if names:
                parts.append(f"{len(names)} {what}: {first_few(sorted(names))}")
        return "; ".join(parts)


def merge(variables: Variables, weights: Weights) -> Merged:
    """Replaces every array of a network that weights hold under the same path in the same shape.

    Args:
      variables: of the network, in the unrolled layout.
      weights: of the same or another network.

    Raises:
      UserError: there is no such array.
    """
    ours, theirs = flatten(variables), flatten(weights.variables)
    copied = tuple(
        path for path in ours if path in theirs and theirs[path].shape == ours[path].shape
    )
    if not copied:
        raise UserError("no array of the weights has the path and shape of one of the network's")
    return Merged(
        variables=unflatten({**ours, **{path: theirs[path] for path in copied}}),
        copied=copied,
        new=tuple(ours.keys() - {*copied}),
        unused=tuple(theirs.keys() - {*copied}),
    )


def for_network(weights: Weights, **fields: Any) -> tuple[Weights, Merged]:
    """Returns weights for another network: arrays that fit are copied, the others are random.

    Args:
      weights: of a similar network.
      **fields: fields of `resjax.build` in which the network differs.

    Raises:
      UserError: nothing fits.
      ValueError: there is no such network.
    """
    changed = replace(weights, model={**weights.model, **fields})
    init = jax.jit(changed.network(loop="unroll").init, compiler_options=quick_compile())
    random = jax.device_get(init(jax.random.key(0), jnp.zeros(_image_shape(weights))))
    merged = merge(random, weights)
    return replace(changed, variables=merged.variables), merged


def _output_channels(headless: Weights) -> int:
    images = jax.ShapeDtypeStruct(_image_shape(headless), jnp.float32)
    init = headless.network().init_with_output
    output, _ = jax.eval_shape(init, jax.random.key(0), images)
    return int(output.shape[-1])


def _image_shape(weights: Weights) -> tuple[int, int, int, int]:
    images = weights.preprocessing
    return 1, images.size, images.size, images.channels
