"""The algebra of sweeps: pure functions over iterables of overrides.

A sweep is any iterable of dicts from a config's dotted fields to values, one dict a run. `param`
makes the simplest; `product`, `zipped` and `chain` combine sweeps, lazily and in order, as
their namesakes of itertools do with any iterable::

    product(
        param("model.depth", (20, 56)),
        zipped(param("model.shortcut", ("none", "pad")), param("model.width", (8, 16))),
        param("seed", range(5)),
    )

The product is associative, and its unit is `product()`, one run without overrides; the chain is
associative, and its unit is `chain()`, no run; a product distributes over a chain on its left. The
idea of such an algebra is that of google-deepmind/simply's sweeps.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Overrides = dict[str, Any]


def param(field: str, values: Iterable[Any]) -> Iterator[Overrides]:
    """One run for each value of a field."""
    return ({field: value} for value in values)


def product(*sweeps: Iterable[Mapping[str, Any]]) -> Iterator[Overrides]:
    """Every combination of the sweeps' runs; the last sweep varies fastest.

    Raises:
      ValueError: two sweeps set the same field.
    """
    return map(_united, itertools.product(*sweeps))


def zipped(*sweeps: Iterable[Mapping[str, Any]]) -> Iterator[Overrides]:
    """The sweeps' first runs united, then their second runs, and so on.

    Raises:
      ValueError: two sweeps set the same field, or one is longer than another.
    """
    return map(_united, zip(*sweeps, strict=True))


def chain(*sweeps: Iterable[Mapping[str, Any]]) -> Iterator[Overrides]:
    """The runs of the first sweep, then those of the second, and so on."""
    return map(dict, itertools.chain(*sweeps))


def _united(parts: Iterable[Mapping[str, Any]]) -> Overrides:
    union: Overrides = {}
    for part in parts:
        if twice := union.keys() & part.keys():
            raise ValueError(f"two of the sweeps that are combined set {', '.join(sorted(twice))}")
        union.update(part)
    return union
