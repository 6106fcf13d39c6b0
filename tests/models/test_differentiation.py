"""A network's derivatives in forward mode, and of second order, equal finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import resjax
from resjax.models import layout

SHAPE = (4, 6, 6, 3)
LABELS = np.arange(4)
STEP = 1e-5  # of central differences in float64


@pytest.fixture(
    scope="module",
    params=[("scan", True), ("unroll", True), ("scan", False), ("unroll", False)],
    ids=["scan, train", "unroll, train", "scan, eval", "unroll, eval"],
)
def derivatives(draw, request):
    """Derivatives at random weights along a random direction, in several ways, in float64."""
    loop, train = request.param
    with jax.enable_x64(True):
        model = resjax.build("cifar_resnet8", width=2, dtype="float64", loop=loop)
        model = model.clone(stages=(2, 1))
        rng = np.random.default_rng(1)
        images = rng.normal(size=SHAPE)
        variables = jax.tree.map(np.float64, draw(model.clone(loop="unroll"), images))
        if loop == "scan":
            variables = layout.scanned(variables)
        weights, unravel = ravel_pytree(variables["params"])
        directions = rng.normal(size=(2, *weights.shape))
        direction = directions[0]

        def outputs(weights):
            """Returns logits, and running statistics after the step."""
            given = {**variables, "params": unravel(weights)}
            logits, changed = model.apply(given, images, train=train, mutable=["batch_stats"])
            return logits, ravel_pytree(changed)[0]

        def loss(weights):
            logits, statistics = outputs(weights)
            entropy = -jax.nn.log_softmax(logits)[np.arange(4), LABELS].mean()
            return entropy + 0.01 * (statistics**2).sum()

        def tangent(weights):
            return jax.jvp(loss, (weights,), (direction,))[1]

        def slope(weights):
            return jax.grad(loss)(weights) @ direction

        def logits(coordinates):
            """Returns the logits at a point of a space of two dimensions."""
            return outputs(weights + coordinates @ directions)[0]

        @jax.jit
        def measure(weights):
            points = jnp.stack([weights, weights + STEP * direction, weights - STEP * direction])
            found = jax.lax.map(lambda at: (*outputs(at), jax.grad(loss)(at)), points)
            return {
                "slope": found[2][0] @ direction,
                "differences": jax.tree.map(lambda each: (each[1] - each[2]) / (2 * STEP), found),
                "jvp": jax.jvp(outputs, (weights,), (direction,))[1],
                "linearize": jax.linearize(outputs, weights)[1](direction),
                "jacfwd": jax.jacfwd(logits)(jnp.zeros(2)),
                "tangent": tangent(weights),
                "forward over reverse": jax.jvp(jax.grad(loss), (weights,), (direction,))[1],
                "reverse over reverse": jax.grad(slope)(weights),
                "reverse over forward": jax.grad(tangent)(weights),
            }

        return jax.device_get(measure(weights))


def close(found, expected, tolerance):
    for got, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert got.shape == exact.shape
        assert np.abs(got - exact).max(initial=0) <= tolerance * np.abs(exact).max(initial=0)


def test_tangents_of_logits_and_running_statistics_are_finite_differences(derivatives):
    close(derivatives["jvp"], derivatives["differences"][:2], 1e-6)
    close(derivatives["linearize"], derivatives["jvp"], 1e-12)
    close(derivatives["jacfwd"][..., 0], derivatives["jvp"][0], 1e-12)


def test_forward_and_reverse_mode_agree(derivatives):
    close(derivatives["tangent"], derivatives["slope"], 1e-12)


@pytest.mark.parametrize(
    "way", ["forward over reverse", "reverse over reverse", "reverse over forward"]
)
def test_hessian_products_are_finite_differences_of_gradients(derivatives, way):
    close(derivatives[way], derivatives["differences"][2], 1e-6)
    close(derivatives[way], derivatives["forward over reverse"], 1e-12)
