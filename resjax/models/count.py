"""Counts parameters and multiply-adds from the traced program, not from a formula."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import jaxprs_in_params

from resjax.models.normalization import Bias
from resjax.models.resnet import ResNet
from resjax.xla.convolution import as_written


class Counts(NamedTuple):
    """Parameters, without running statistics, and multiply-adds for one image.

    `macs` counts convolutions and matrix products.
    """

    parameters: int
    macs: int


def count(model: nn.Module, image_shape: Sequence[int], variables: Any = None) -> Counts:
    """Counts a network's parameters, and its multiply-adds for one image, by tracing shapes.

    Args:
      model: takes images (n, h, w, c).
      image_shape: (h, w, c), pixels and channels.
      variables: the network's, or their shapes, which spare a second trace.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = variables or jax.eval_shape(model.init, jax.random.key(0), images)
    with as_written():
        program = jax.make_jaxpr(model.apply)(variables, images)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    return Counts(parameters, multiply_adds(program.jaxpr))


class Layer(NamedTuple):
    """A convolution, norm or classifier of a network, for one image."""

    path: str  # of the module, as in the parameters
    kind: str
    output: tuple[int, ...]  # height, width, channels; for the classifier, classes
    parameters: int
    macs: int


KINDS = (nn.Conv, nn.Dense, nn.BatchNorm, nn.GroupNorm, Bias)


def layers(model: ResNet, image_shape: Sequence[int]) -> list[Layer]:
    """Returns the layers of a network in the order in which they run."""
    table: dict[str, Layer] = {}  # by path, because a subclass calls the method of Flax's class

    def record(call: Any, arguments: Any, keywords: Any, context: Any) -> Any:
        output = call(*arguments, **keywords)
        module = context.module
        kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
        if kind is not None:
            parameters = module.variables.get("params", {})
            weights = math.prod(parameters["kernel"].shape) if "kernel" in parameters else 0
            path = "/".join(module.path)
            table[path] = Layer(
                path=path,
                kind=kind.__name__,
                output=output.shape[1:],
                parameters=sum(math.prod(leaf.shape) for leaf in parameters.values()),
                macs=math.prod(output.shape) * weights // output.shape[-1],
            )
        return output

    unrolled = model.clone(loop="unroll")  # a scan would show its body once
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(unrolled.init, jax.random.key(0), images)
    with nn.intercept_methods(record):
        jax.eval_shape(unrolled.apply, variables, images)
    return list(table.values())


def multiply_adds(program: Any) -> int:
    """Returns the multiply-adds of a jaxpr on all devices.

    A scan's body counts once per iteration, and that of a `shard_map` once per device. Zeros that
    dilate an input, as in the gradient of a strided convolution, are not multiplied.
    """
    total = 0
    for equation in program.eqns:
        kind = equation.primitive.name
        if kind == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out = equation.params["dimension_numbers"].rhs_spec[0]  # the kernel's output axis
            products = equation.outvars[0].aval.size * math.prod(kernel) // kernel[out]
            total += products // math.prod(equation.params["lhs_dilation"])
        elif kind == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += equation.outvars[0].aval.size * summed
        times = 1
        if kind == "scan":
            times = equation.params["length"]
        elif kind == "shard_map":
            times = equation.params["mesh"].size
        total += times * sum(map(multiply_adds, jaxprs_in_params(equation.params)))
    return total
