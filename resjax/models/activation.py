"""The nonlinearity that networks bind, and a way to observe its results from outside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax.numpy as jnp
from jaxtyping import Array

Observer = Callable[[Array], None]

_observer: ContextVar[Observer | None] = ContextVar("_observer", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Calls `observer` with the result of every `relu` that is traced in this context."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def relu(x: Array) -> Array:
    """Returns max(x, 0), and NaN for NaN.

    XLA's CPU compiler fuses the maximum of `jax.nn.relu` with a mean over pixels that follows it,
    to code of YNNPACK that drops NaN (jax 0.10), so a network with NaN weights had a finite loss.
    """
    active = jnp.where(x <= 0, 0, x)
    if observer := _observer.get():
        observer(active)
    return active
