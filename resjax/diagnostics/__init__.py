"""Diagnostics: what is measured inside a training step, one value per layer.

A diagnostic is a function of the step's `Context`. It returns a dict from the path of a layer to a
scalar. It is measured in a program of its own, on the batch and the key of the step that follows,
so recording changes no training result and a run without diagnostics compiles the same step.

In a scanned network the blocks of a stage are stacked along the first axis of one array, whose path
contains `blocks`. `Context.per_array` maps a function over arrays of either layout, and `per_layer`
names the values as in the unrolled network.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from resjax.config import Diagnostics as DiagnosticsConfig
from resjax.diagnostics.forward import FORWARD_DIAGNOSTICS, Values
from resjax.errors import UserError
from resjax.models.layout import STACKED, matches, path_name
from resjax.models.presets import nearest
from resjax.user_code import import_name

__all__ = [
    "DIAGNOSTICS",
    "Context",
    "Diagnostic",
    "find_diagnostics",
    "layer_patterns",
    "measure",
    "needs_forward",
    "per_layer",
    "short_names",
]


class Context(NamedTuple):
    """The quantities of a step that a diagnostic can measure.

    Trees have the layout of the network, scanned or unrolled.

    Attributes:
      params: all parameters before the step.
      gradients: of the mean loss; None for frozen parameters.
      updates: what the optimizer adds to the parameters; None for frozen ones.
      batch_stats: running statistics after the step.
      activation_gradients: norm of the gradient of the mean loss with respect to the output of each
        block, over all examples of the batch, by path.
      forward: values recorded in the forward pass in training mode, by name and by path:
        `response_mean`, `response_std`, `dead_relu_share`, `branch_share`, `input_output_cosine`
        (see the diagnostics of these names).
      loss: mean loss of the batch.
    """

    params: Any
    gradients: Any
    updates: Any
    batch_stats: Any
    activation_gradients: Values
    forward: Mapping[str, Values]
    loss: Float[Array, ""]

    def per_array(self, function: Callable[..., Array], *trees: Any) -> Values:
        """Applies a function to every array of a tree, or to corresponding arrays of several.

        Args:
          function: takes the arrays of one layer and returns a scalar.
          *trees: such as `context.gradients`; arrays that one of them lacks, because they are
            frozen, are left out.
        """
        first, *others = [
            {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
            for tree in trees
        ]
        values = {}
        for path, array in first.items():
            if all(path in other for other in others):
                apply = jax.vmap(function) if STACKED.match(path) else function
                values[path] = apply(array, *(other[path] for other in others))
        return values


Diagnostic = Callable[[Context], Mapping[str, Array]]


def gradient_norm(context: Context) -> Values:
    """Returns the L2 norm of the gradient of every parameter array."""
    return context.per_array(_norm, context.gradients)


def parameter_norm(context: Context) -> Values:
    """Returns the L2 norm of every parameter array, before the step."""
    return context.per_array(_norm, context.params)


def update_ratio(context: Context) -> Values:
    """Returns the L2 norm of a step's update of every trained array over that of the array.

    It is infinite for an array of zeros, such as a bias at step 0.
    """

    def ratio(update: Array, param: Array) -> Array:
        return _norm(update) / _norm(param)

    return context.per_array(ratio, context.updates, context.params)


def activation_gradient_norm(context: Context) -> Values:
    """Returns the L2 norm of the gradient with respect to the output of every block."""
    return context.activation_gradients


def response_mean(context: Context) -> Values:
    """Returns the mean of every layer's response, over images, pixels and channels.

    The response is the output of a norm, before ReLU and addition (He et al. 2015, arXiv
    1512.03385, figure 7), or of a convolution or dense layer whose output goes to no norm.
    """
    return context.forward["response_mean"]


def response_std(context: Context) -> Values:
    """Returns the standard deviation of every layer's response; see `response_mean`."""
    return context.forward["response_std"]


def branch_share(context: Context) -> Values:
    """Returns the branch's share of every block's sum: |branch| / (|branch| + |shortcut|).

    The norms are L2 norms of the two summands, after any scale. A block equal to its shortcut has a
    share of 0, a plain one has 1. Blocks that do not add their shortcut as `y + shortcut(x)` are
    left out.
    """
    return context.forward["branch_share"]


def input_output_cosine(context: Context) -> Values:
    """Returns the cosine between the input and the output of every block, averaged over images.

    If a block changes the shape, its input is first subsampled and padded with zero channels, as in
    option A of He et al. 2015.
    """
    return context.forward["input_output_cosine"]


def dead_relu_share(context: Context) -> Values:
    """Returns the share of channels after every ReLU that are 0 for all images and pixels.

    The ReLUs of a module are called `relu_0`, `relu_1`, ... in the order in which they run.
    """
    return context.forward["dead_relu_share"]


def running_mean(context: Context) -> Values:
    """Returns the root mean square over channels of every BN layer's running means."""
    return _per_norm(context, "mean", lambda means: jnp.sqrt(jnp.mean(means**2)))


def running_var(context: Context) -> Values:
    """Returns the mean over channels of every BN layer's running variances."""
    return _per_norm(context, "var", jnp.mean)


def _per_norm(context: Context, statistic: str, function: Callable[[Array], Array]) -> Values:
    values = context.per_array(function, context.batch_stats)
    split = {tuple(path.rpartition("/")[::2]): value for path, value in values.items()}
    return {layer: value for (layer, name), value in split.items() if name == statistic}


def _norm(array: Array) -> Array:
    return jnp.sqrt((array**2).sum())


DIAGNOSTICS: dict[str, Diagnostic] = {
    diagnostic.__name__: diagnostic
    for diagnostic in (
        gradient_norm,
        parameter_norm,
        update_ratio,
        activation_gradient_norm,
        response_mean,
        response_std,
        branch_share,
        input_output_cosine,
        dead_relu_share,
        running_mean,
        running_var,
    )
}
ALL = "all"
"""The name that stands for every diagnostic of this package."""


def short_names(config: DiagnosticsConfig) -> list[str]:
    """Returns the names under which the diagnostics of a config are written."""
    return [name.rpartition(":")[2] for name in _names(config)]


def _names(config: DiagnosticsConfig) -> list[str]:
    return [each for name in config.names for each in (DIAGNOSTICS if name == ALL else [name])]


def needs_forward(config: DiagnosticsConfig) -> bool:
    """Returns whether a diagnostic of a config may use `Context.forward`, which costs time."""
    return any(":" in name or name in FORWARD_DIAGNOSTICS for name in _names(config))


def find_diagnostics(config: DiagnosticsConfig) -> dict[str, Diagnostic]:
    """Returns the diagnostics of a config by the names under which their values are written.

    Raises:
      UserError: there is no such diagnostic, or two have the same name.
    """
    found: dict[str, Diagnostic] = {}
    for name in _names(config):
        try:
            diagnostic = import_name(name) if ":" in name else DIAGNOSTICS[name]
        except KeyError:
            raise UserError(
                f"diagnostics.names={name}: no such diagnostic{nearest(name, DIAGNOSTICS)} "
                "(or package.module:function of your own)"
            ) from None
        except ImportError as error:
            raise UserError(f"diagnostics.names={name}: {error}") from error
        short = name.rpartition(":")[2]
        if short in found:
            raise UserError(f"diagnostics.names: two diagnostics are called {short}")
        options = config.options.get(short, {})
        try:
            inspect.signature(diagnostic).bind(None, **options)
        except TypeError as error:
            raise UserError(f"diagnostics.options.{short}: {error}") from error
        found[short] = functools.partial(diagnostic, **options)
    if unknown := sorted(config.options.keys() - found.keys()):
        raise UserError(f"diagnostics.options.{unknown[0]}: no such diagnostic is measured")
    return found


def layer_patterns(config: DiagnosticsConfig) -> tuple[str, ...]:
    """Returns the patterns of the layers that a config records; none means all layers."""
    return tuple(filter(None, (pattern.strip() for pattern in config.layers.split(","))))


def measure(
    diagnostics: Mapping[str, Diagnostic], context: Context, layers: Sequence[str] = ()
) -> dict[str, Values]:
    """Computes diagnostics, by name.

    Args:
      diagnostics: from `find_diagnostics`.
      context: of a step.
      layers: patterns, from `layer_patterns`; arrays without a matching layer are left out.

    Raises:
      UserError: a diagnostic does not return a real number for each layer, or a pattern matches
        none.
    """
    measured: dict[str, Values] = {}
    unmatched = set(layers)
    for name, diagnostic in diagnostics.items():
        values = diagnostic(context)
        if not isinstance(values, Mapping):
            raise UserError(
                f"diagnostics.names={name}: must return a dict from paths of layers to scalars"
            )
        for path, value in values.items():
            if not isinstance(path, str):
                raise UserError(
                    f"diagnostics.names={name}: the key {path!r} is not the path of a layer, such "
                    "as 'stage1/block1'"
                )
            if not _is_real(value):
                kind = getattr(value, "dtype", type(value).__name__)
                raise UserError(
                    f"diagnostics.names={name}: the value of {path} is {kind}, expected a real "
                    "number"
                )
            stacked = bool(STACKED.match(path))
            if np.ndim(value) != stacked:
                expected = "one number per block" if stacked else "a scalar"
                raise UserError(
                    f"diagnostics.names={name}: the value of {path} has the shape "
                    f"{np.shape(value)}, expected {expected}; use context.per_array"
                )
        found = {path: unrolled_layers(path, np.shape(value)) for path, value in values.items()}
        unmatched -= {
            pattern
            for pattern in layers
            if any(matches(pattern, layer) for each in found.values() for layer in each)
        }
        measured[name] = {
            path: values[path]
            for path, each in found.items()
            if any(is_recorded(layer, layers) for layer in each)
        }
    if unmatched:
        raise UserError(
            f"diagnostics.layers={min(unmatched)}: matches no layer that a diagnostic measures; "
            "layers have paths such as stage1/block1 or stem/BatchNorm_0"
        )
    return measured


def _is_real(value: Any) -> bool:
    """Returns whether a value is a real number or an array of real numbers."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, int, float)):
        return False
    kind = getattr(value, "dtype", type(value))
    return any(jnp.issubdtype(kind, each) for each in (jnp.bool_, jnp.integer, jnp.floating))


def is_recorded(layer: str, patterns: Sequence[str]) -> bool:
    """Returns whether a layer matches one of the patterns, or there are none."""
    return not patterns or any(matches(pattern, layer) for pattern in patterns)


def unrolled_layers(path: str, shape: tuple[int, ...]) -> list[str]:
    """Returns the layers of a value, named as in the unrolled network."""
    if not shape:
        return [path]
    return [STACKED.sub(rf"\g<1>block{index + 2}\2", path) for index in range(shape[0])]


def per_layer(values: Mapping[str, Any], layers: Sequence[str] = ()) -> dict[str, float]:
    """Returns values by layer, named as in the unrolled network.

    Args:
      values: scalars by path, or one for each block of a scanned stage.
      layers: patterns of the layers to return; empty for all.
    """
    found: dict[str, float] = {}
    for path, value in values.items():
        array = np.asarray(value)
        for layer, single in zip(unrolled_layers(path, array.shape), array.ravel(), strict=True):
            if is_recorded(layer, layers):
                found[layer] = float(single)
    return found
