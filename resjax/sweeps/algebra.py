"""The algebra of sweeps: pure functions over iterables of overrides.

A sweep is an iterable of dicts, one per run, that map dotted config fields to values. `param`
creates a sweep over one field; `product`, `zipped` and `chain` combine sweeps, lazily and in order,
like `product`, `zip` and `chain` of Python::

    product(
        param("model.depth", (20, 56)),
        zipped(param("model.shortcut", ("none", "pad")), param("model.width", (8, 16))),
        param("seed", range(5)),
    )

`product` is associative with the unit `product()`, one run without overrides. `chain` is
associative with the unit `chain()`, no run. `product` distributes over a `chain` on its left. The
idea of an algebra comes from the sweeps of google-deepmind/simply.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from resjax.errors import UserError
from resjax.models.presets import nearest

Overrides = dict[str, Any]
Choice = TypeVar("Choice")


def param(field: str, values: Iterable[Any]) -> Iterator[Overrides]:
    """Returns a sweep with one run per value of a field."""
    return ({field: value} for value in values)


def choose(choices: Mapping[str, Choice], names: Iterable[str]) -> list[Choice]:
    """Returns the values of `choices` by name, such as overrides that a sweep's keyword selects.

    Raises:
      UserError: there is no choice of that name.
    """
    for name in (names := tuple(names)):
        if name not in choices:
            raise UserError(f"no such choice: {name!r}{nearest(name, choices)}")
    return [choices[name] for name in names]


def product(*sweeps: Iterable[Mapping[str, Any]]) -> Iterator[Overrides]:
    """Returns every combination of the sweeps' runs; the last sweep varies fastest.

    Raises:
      ValueError: two sweeps set the same field.
    """
    return map(_union, itertools.product(*sweeps))


def zipped(*sweeps: Iterable[Mapping[str, Any]]) -> Iterator[Overrides]:
    """Returns the union of the sweeps' first runs, then of their second runs, and so on.

    Raises:
      ValueError: two sweeps set the same field, or one is longer than another.
    """
    return map(_union, zip(*sweeps, strict=True))


def chain(*sweeps: Iterable[Mapping[str, Any]]) -> Iterator[Overrides]:
    """Returns the runs of the first sweep, then those of the second, and so on."""
    return map(dict, itertools.chain(*sweeps))


def _union(parts: Iterable[Mapping[str, Any]]) -> Overrides:
    union: Overrides = {}
    for part in parts:
        if twice := union.keys() & part.keys():
            raise ValueError(f"two of the combined sweeps set {', '.join(sorted(twice))}")
        union.update(part)
    return union
