"""A linear call is differentiated in both modes, and reverse mode calls the given transpose."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resjax.xla.linear import linear_call

SIZE = 5
RNG = np.random.default_rng(0)
C, X, Y, DC, DX, DY = RNG.normal(size=(6, SIZE)).astype(np.float32)


@dataclass(frozen=True)
class Forward:
    """Computes (c^2 x + y, sum(c y)), where None is zero."""

    def __call__(self, constants, arguments):
        (c,), (x, y) = constants, arguments
        x, y = (jnp.zeros_like(c) if each is None else each for each in (x, y))
        return c**2 * x + y, (c * y).sum()


@dataclass(frozen=True)
class Transpose:
    factor: float = 1  # another than 1 shows who was called

    def __call__(self, constants, cotangents):
        (c,), (first, second) = constants, cotangents
        first = jnp.zeros_like(c) if first is None else first
        second = 0 if second is None else second
        return self.factor * c**2 * first, self.factor * (first + c * second)


def called(c, x, y, factor=1):
    return tuple(linear_call(Forward(), Transpose(factor), [c], [x, y], results=2))


def written(c, x, y):
    return Forward()((c,), (x, y))


def close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


def loss(function):
    def of(c, x, y):
        vector, number = function(c, x, y)
        return (vector**3).sum() * jnp.cos(number)

    return of


def hessian_product(of):
    return jax.jvp(jax.grad(of, (0, 1, 2)), (C, X, Y), (DC, DX, DY))[1]


WAYS = {
    "values": lambda of: of(C, X, Y),
    "tangents": lambda of: jax.jvp(of, (C, X, Y), (DC, DX, DY)),
    "tangents of one argument": lambda of: jax.jvp(lambda y: of(C, X, y), (Y,), (DY,)),
    "linearized": lambda of: jax.linearize(of, C, X, Y)[1](DC, DX, DY),
    "forward Jacobian": lambda of: jax.jacfwd(of, (0, 1, 2))(C, X, Y),
    "reverse Jacobian": lambda of: jax.jacrev(of, (0, 1, 2))(C, X, Y),
    "forward over reverse": lambda of: hessian_product(loss(of)),
    "reverse over reverse": lambda of: jax.grad(
        lambda *at: jnp.vdot(jax.grad(loss(of))(*at), DC), (0, 1, 2)
    )(C, X, Y),
    "reverse over forward": lambda of: jax.grad(
        lambda *at: jax.jvp(loss(of), at, (DC, DX, DY))[1], (0, 1, 2)
    )(C, X, Y),
    "batches of constants": lambda of: jax.vmap(jax.grad(loss(of), (0, 1, 2)), (0, None, 0))(
        jnp.stack([C, DC]), X, jnp.stack([Y, DY])
    ),
    "gradients of a batch": lambda of: jax.grad(
        lambda x: jax.vmap(loss(of), (None, 0, None))(C, x, Y).sum()
    )(jnp.stack([X, DX])),
    "rematerialized": lambda of: jax.grad(jax.checkpoint(loss(of)), (0, 1, 2))(C, X, Y),
    "compiled": jax.jit(lambda of: hessian_product(loss(of)), static_argnums=0),
}


@pytest.mark.parametrize("way", WAYS)
def test_derivatives_are_those_of_the_function_as_written(way):
    close(WAYS[way](called), WAYS[way](written))


def test_reverse_mode_calls_the_given_transpose_and_forward_mode_does_not():
    def tripled(*at):
        return called(*at, factor=3)

    close(jax.jvp(tripled, (C, X, Y), (DC, DX, DY)), jax.jvp(written, (C, X, Y), (DC, DX, DY)))
    found = jax.grad(lambda x, y: tripled(C, x, y)[0].sum(), (0, 1))(X, Y)
    close(found, (3 * C**2, 3 * jnp.ones(SIZE)))


def test_an_argument_without_a_tangent_is_none():
    def fails(constants, arguments):
        assert arguments[0] is None
        return (arguments[1],)

    def call(y):
        return linear_call(fails, fails, [C], [None, y], results=1)[0]

    close(jax.jvp(call, (Y,), (DY,)), (Y, DY))


def test_a_gradient_stores_the_constants_alone():
    _, pullback = jax.vjp(lambda x, y: called(C, x, y), X, Y)
    assert [leaf.shape for leaf in jax.tree.leaves(pullback)] == [(SIZE,)]
