"""Measures activations in the forward pass from outside a network, without a change to its modules.

Every recorded number is a mean over the images of a batch, so the mean over equal parts of a batch,
or over devices, is the number of the whole batch. `forward_values` computes diagnostics from them.

A response is the output of a norm, or of a convolution or dense layer whose output goes to no norm.
He et al. 2015 (arXiv 1512.03385, figure 7) measure it after BN, before ReLU and addition.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.module import _context  # interceptors see a rematerialized block from outside
from jax import lax
from jaxtyping import Array, Float

from resjax.models.activation import observing
from resjax.models.layout import path_name
from resjax.models.normalization import Bias
from resjax.models.shortcuts import Scaled, pad

FORWARD = "forward"
"""The variable collection of recorded values."""

BLOCK = re.compile(r"stage\d+/(block\d+|blocks)")
SHORTCUT = re.compile(rf"{BLOCK.pattern}/shortcut")
NORMS = (nn.BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm, nn.RMSNorm, Bias)
WEIGHTS = (nn.Conv, nn.Dense)

Values = dict[str, Float[Array, "*blocks"]]
"""By path, a scalar, or one value for each block of a scanned stage."""

FORWARD_DIAGNOSTICS = (
    "response_mean",
    "response_std",
    "dead_relu_share",
    "branch_share",
    "input_output_cosine",
)
"""The names of the diagnostics of the forward pass."""


class Running:
    """A module whose method is running."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.path = "/".join(module.path)
        self.activations = 0
        self.responses: list[tuple[str, Array]] = []  # of convolutions and dense layers inside


class Recorder:
    """Records the forward pass of a network into the collection `forward`.

    Attributes:
      normalized: paths of the layers whose outputs go to a norm, as far as they have run.
    """

    def __init__(self, additions: bool = True):
        """If `additions`, wraps the outputs of shortcuts in an `Addition`, which records them."""
        self.normalized: set[str] = set()
        self._additions = additions
        self._running: list[Running] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records the networks traced in this context, if the collection is mutable."""
        with nn.intercept_methods(self._intercept), observing(self._record_activation):
            yield

    def by_path(self, recorded: Any) -> dict[str, Array]:
        """Returns a collection by path, without the layers whose outputs go to a norm."""
        leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(recorded)}
        return {
            path: leaf
            for path, leaf in leaves.items()
            if path.rpartition("/")[0] not in self.normalized
        }

    def _intercept(self, call: Any, arguments: Any, keywords: Any, context: Any) -> Any:
        module: nn.Module = context.module
        outer = self._running[-1] if self._running else None
        # A method that a module calls on itself belongs to the same call of the module.
        own = Running(module) if not outer or outer.module.path != module.path else outer
        self._running.append(own)
        try:
            output = call(*arguments, **keywords)
        finally:
            self._running.pop()
        if context.method_name != "__call__":
            return output
        if isinstance(module, (*NORMS, *WEIGHTS)):
            _record(module, response_moments(output))
            if outer and isinstance(module, WEIGHTS):
                outer.responses.append((own.path, output))
            elif outer:
                given = (path for path, response in outer.responses if response is arguments[0])
                self.normalized.update(given)
        elif BLOCK.fullmatch(own.path):
            _record(module, cosine(arguments[0], output))
        elif self._additions and SHORTCUT.fullmatch(own.path):
            return observe_addition(output, lambda squares: _record(module, squares))
        return output

    def _record_activation(self, activation: Array) -> None:
        module = _context.module_stack[-1]
        if module is None or not self._running:
            return
        own = self._running[-1]
        name, own.activations = f"relu_{own.activations}", own.activations + 1
        channels = tuple(range(activation.ndim - 1))
        share = (lax.stop_gradient(activation) != 0).mean(channels, dtype=jnp.float32)
        _record(module, {f"{name}/active": share})


def _record(module: nn.Module, values: dict[str, Any]) -> None:
    scope = module.scope
    if scope is not None and scope.is_mutable_collection(FORWARD):
        for name, value in values.items():
            scope.put_variable(FORWARD, name, value)


def response_moments(response: Array) -> dict[str, Array]:
    """Returns the mean of a response over all its values, its variance and its squared mean."""
    response = _single(response)
    mean = response.mean()
    # Each part of a batch has a variance about its own mean; `forward_values` adds that of means.
    variance = jnp.square(response - mean).mean()
    return {"mean": mean, "variance": variance, "squared_mean": jnp.square(mean)}


def cosine(x: Array, output: Array) -> dict[str, Array]:
    """Returns the mean over images of the cosine between a block's input and its output.

    An input of another shape is first subsampled and padded with zero channels, as in option A.
    """
    if x.ndim != 4 or x.shape[-1] > output.shape[-1]:
        return {}
    x = pad(x, output.shape[-1], math.ceil(x.shape[1] / output.shape[1]))
    if x.shape != output.shape:
        return {}
    x, output = _single(x), _single(output)
    pixels = (1, 2, 3)
    lengths = jnp.sqrt((x**2).sum(pixels) * (output**2).sum(pixels))
    return {"cosine": jnp.where(lengths == 0, 0, (x * output).sum(pixels) / lengths).mean()}


class Addition:
    """Wraps the output of a shortcut; its addition to a branch records the mean squares of both."""

    def __init__(self, carried: Any, record: Callable[[dict[str, Array]], None]):
        self._carried, self._record = carried, record

    def __radd__(self, branch: Array) -> Array:
        total = branch + self._carried
        carried = self._carried
        if not isinstance(carried, (jax.Array, int, float)):
            carried = total - branch
        squares = {"branch": branch, "shortcut": jnp.broadcast_to(carried, total.shape)}
        self._record({name: (_single(images) ** 2).mean() for name, images in squares.items()})
        return total

    __add__ = __radd__


def observe_addition(added: Any, record: Callable[[dict[str, Array]], None]) -> Any:
    """Wraps the output of a shortcut, which then records its addition to the scaled branch."""
    if isinstance(added, Scaled):
        return Scaled(Addition(added.carried, record), added.branch_scale)
    return Addition(added, record)


def _single(x: Array) -> Array:
    return lax.stop_gradient(jnp.asarray(x, jnp.float32))


def forward_values(recorded: Mapping[str, Array]) -> dict[str, Values]:
    """Computes the diagnostics of the forward pass, by name and layer, from recorded values."""
    found: dict[str, Values] = defaultdict(dict)
    for path, value in recorded.items():
        layer, _, name = path.rpartition("/")
        found[name][layer] = value
    means = found["mean"]
    spread = {
        layer: found["squared_mean"][layer] - jnp.square(mean) for layer, mean in means.items()
    }
    return {
        "response_mean": means,
        "response_std": {
            layer: jnp.sqrt(variance + jnp.maximum(spread[layer], 0))
            for layer, variance in found["variance"].items()
        },
        "dead_relu_share": {
            layer: (active == 0).mean(-1) for layer, active in found["active"].items()
        },
        "branch_share": {
            layer.removesuffix("/shortcut"): _share(square, found["shortcut"][layer])
            for layer, square in found["branch"].items()
        },
        "input_output_cosine": found["cosine"],
    }


def _share(branch: Array, shortcut: Array) -> Array:
    """Returns the share of the branch in the sum of two norms, from mean squares."""
    branch, shortcut = jnp.sqrt(branch), jnp.sqrt(shortcut)
    total = branch + shortcut
    return jnp.where(total == 0, 0, branch / total)
