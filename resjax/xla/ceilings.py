"""The highest speeds of a device: of a matrix product and of a copy, measured in a second or so."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def product_rate(dtype: str, side: int, repetitions: int = 10) -> float:
    """Returns the FLOP/s of a product of square matrices of this side."""
    matrix = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype) / side**0.5
    return 2 * side**3 / fastest(partial(jax.jit(jnp.matmul), matrix), matrix, repetitions)


def copy_rate(dtype: str, length: int, repetitions: int = 10) -> float:
    """Returns the bytes/s, read and written, of a copy of a vector of this length."""
    vector = jnp.zeros(length, dtype)
    moved = 2 * vector.nbytes
    # In place, because the pages of a new array are slower than memory until the system maps them.
    copy = jax.jit(lambda vector: vector + 1, donate_argnums=0)
    return moved / fastest(copy, vector, repetitions)


def fastest(call: Callable[[Any], Any], value: Any, repetitions: int) -> float:
    """Returns the seconds of the fastest call; each call gets the result of the previous one."""
    seconds = []
    for _ in range(1 + repetitions):
        start = time.monotonic()
        value = call(value).block_until_ready()
        seconds.append(time.monotonic() - start)
    return min(seconds[1:])  # the first call compiles
