"""A linear function whose transpose is given, differentiable in both modes and to any order.

Problem: `jax.custom_vjp` chooses what a gradient stores and how it is computed, but refuses forward
mode: `jvp`, `linearize`, `jacfwd`, and Hessian-vector products by forward over reverse.
`jax.custom_jvp` allows them, but leaves the choice to JAX, which transposes the tangent.

Here the tangent of a `jax.custom_jvp` is one equation. Forward mode computes it, reverse mode calls
the given transpose, and a gradient stores the equation's constants alone. `linear_call` of
`jax.custom_derivatives` is such an equation too, but has no derivatives with respect to constants,
and second derivatives need them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Arrays = tuple[Array, ...]
Linear = Callable[[Arrays, tuple[Array | None, ...]], Arrays]
"""Takes constants and arguments, and is linear in the arguments. An argument of None is zero."""


def linear_call(
    function: Linear,
    transpose: Linear,
    constants: Sequence[Array],
    arguments: Sequence[Array | None],
    results: int,
) -> list[Array]:
    """Returns `function(constants, arguments)`, which reverse mode differentiates by `transpose`.

    Derivatives with respect to constants are JAX's own derivatives of the two functions.

    Args:
      function: has no state but what its equality compares.
      transpose: takes the constants and a cotangent per result, and returns one per argument.
      constants: arrays that both functions take besides.
      arguments: at least one is not None.
      results: the number of results of `function`.
    """
    present = [argument for argument in arguments if argument is not None]
    return _linear.bind(
        *constants,
        *present,
        function=function,
        transpose=transpose,
        given=tuple(argument is not None for argument in arguments),
        wanted=(True,) * results,
    )


_linear = Primitive("linear_call_with_transpose")
_linear.multiple_results = True


@_linear.def_impl
def _call(*operands: Array, function: Linear, given: Any, wanted: Any, **_: Any) -> list[Array]:
    """Calls the function with the arguments that are given, and returns the results wanted."""
    constants, present = _split(operands, given)
    values = iter(present)
    results = function(constants, tuple(next(values) if each else None for each in given))
    return [result for result, each in zip(results, wanted, strict=True) if each]


def _split(operands: Sequence[Any], given: Sequence[bool]) -> tuple[Any, Any]:
    """Splits operands into constants and arguments."""
    count = len(operands) - sum(given)
    return tuple(operands[:count]), tuple(operands[count:])


@_linear.def_abstract_eval
def _abstract(*operands: Any, **options: Any) -> Sequence[Any]:
    return jax.make_jaxpr(partial(_call, **options))(*operands).out_avals


mlir.register_lowering(_linear, mlir.lower_fun(_call, multiple_results=True))


def _jvp(primals: Any, tangents: Any, *, given: Any, **options: Any) -> tuple[Any, Any]:
    constants, arguments = _split(primals, given)
    changes, moves = _split(tangents, given)
    summands = []
    if any(map(_nonzero, moves)):
        present = filter(_nonzero, moves)
        moving = _both(given, map(_nonzero, moves))
        summands.append(_linear.bind(*constants, *present, given=moving, **options))
    if any(map(_nonzero, changes)):
        changing = [i for i, change in enumerate(changes) if _nonzero(change)]

        def call(*values: Array) -> list[Array]:
            now = dict(enumerate(constants)) | dict(zip(changing, values, strict=True))
            return _call(*now.values(), *arguments, given=given, **options)

        at, along = ([each[i] for i in changing] for each in (constants, changes))
        summands.append(jax.jvp(call, at, along)[1])
    results = _linear.bind(*primals, given=given, **options)
    return results, [sum(parts[1:], parts[0]) for parts in zip(*summands, strict=True)]


def _nonzero(tangent: Any) -> bool:
    return not isinstance(tangent, ad.Zero)


def _both(chosen: Iterable[bool], kept: Iterable[bool]) -> tuple[bool, ...]:
    """Returns whether each is chosen and kept; `kept` has one value for each that is chosen."""
    kept = iter(kept)
    return tuple(each and next(kept) for each in chosen)


ad.primitive_jvps[_linear] = _jvp


def _transpose(
    cotangents: Any, *operands: Any, function: Linear, transpose: Linear, given: Any, wanted: Any
) -> list[Any]:
    constants, arguments = _split(operands, given)
    unknown = [ad.is_undefined_primal(argument) for argument in arguments]
    found = iter(
        _linear.bind(
            *constants,
            *filter(_nonzero, cotangents),
            function=transpose,
            transpose=function,
            given=_both(wanted, map(_nonzero, cotangents)),
            wanted=_both(given, unknown),
        )
    )
    return [None] * len(constants) + [next(found) if each else None for each in unknown]


ad.primitive_transposes[_linear] = _transpose


@dataclass(frozen=True)
class _Batched:
    """A linear function of batches, along axis 0 of every argument and result."""

    function: Linear
    axes: tuple[int | None, ...]  # of the constants
    name: Any
    size: int

    def __call__(self, constants: Arrays, arguments: tuple[Array | None, ...]) -> Arrays:
        batched = jax.vmap(self.function, (self.axes, 0), axis_name=self.name, axis_size=self.size)
        return batched(constants, arguments)


def _batch(
    axis: Any, operands: Any, dims: Any, *, function: Linear, transpose: Linear, **options: Any
) -> tuple[list[Array], list[int | None]]:
    if all(dim is None for dim in dims) and not isinstance(axis.name, str):
        found = _linear.bind(*operands, function=function, transpose=transpose, **options)
        return found, [None] * len(found)
    constants, arguments = _split(operands, options["given"])
    axes, own = _split(dims, options["given"])
    wrap = partial(_Batched, axes=axes, name=axis.name, size=axis.size)
    found = _linear.bind(
        *constants,
        *(batching.bdim_at_front(*each, axis.size) for each in zip(arguments, own, strict=True)),
        function=wrap(function),
        transpose=wrap(transpose),
        **options,
    )
    return found, [0] * len(found)


batching.fancy_primitive_batchers[_linear] = _batch
