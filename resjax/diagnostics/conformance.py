"""Checks that a diagnostic of your own works in every network.

::

    from resjax.diagnostics.conformance import check_diagnostic
    check_diagnostic("my_diagnostic:my_diagnostic")
"""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from resjax.config import Diagnostics
from resjax.diagnostics import Context, find_diagnostics, per_layer
from resjax.diagnostics.forward import FORWARD, forward_values
from resjax.diagnostics.taps import PROBES, TappedModel, norms
from resjax.models.layout import scanned, unrolled
from resjax.models.resnet import build
from resjax.user_code import shows_users_frames
from resjax.xla.compile_options import quick_compile

jit = partial(jax.jit, compiler_options=quick_compile())

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


@shows_users_frames
def check_diagnostic(name: str, **options: Any) -> list[str]:
    """Checks a diagnostic on a small residual network, and prints what it checked.

    Args:
      name: of ours, or `package.module:function`.
      **options: keyword arguments of the diagnostic.

    Returns:
      The claims that hold, one sentence each.

    Raises:
      AssertionError: the first claim that does not hold; says what happened instead.
      UserError: there is no such diagnostic.
    """
    short = name.rpartition(":")[2]
    config = Diagnostics(names=(name,), options={short: options} if options else {})
    (diagnostic,) = find_diagnostics(config).values()
    claims: list[str] = []

    def claim(text: str) -> None:
        claims.append(text)
        print(f"{name}: {text}")

    def measure(context: Context) -> dict[str, float]:
        found = jit(lambda context: dict(diagnostic(context)))(context)
        assert found, "it returns no value; return a dict from the path of a layer to a scalar"
        for path, value in found.items():
            expected = (2,) if "/blocks" in path else ()
            assert value.shape == expected, (
                f"the value of {path} has the shape {value.shape}, expected {expected}; map over "
                "arrays by context.per_array"
            )
            assert np.isfinite(value).all(), f"the value of {path} is not finite"
        return per_layer(found)

    model = build("cifar_resnet20", width=4, loop="scan")
    variables = jit(model.init)(jax.random.key(1), IMAGES)
    stacked = _context(model, scanned(variables))
    values = measure(stacked)
    claim("it returns one finite value per layer, inside jit")
    expected = measure(_context(model.clone(loop="unroll"), unrolled(variables)))
    differing = values.keys() ^ expected.keys()
    assert not differing, f"{min(differing)} is a layer in only one of the two layouts"
    for path, value in expected.items():
        other = values[path]
        assert np.isclose(value, other, rtol=1e-4, atol=1e-7), (
            f"the value of {path} is {value:.6g} in the unrolled and {other:.6g} in the scanned "
            "network"
        )
    claim("scanned and unrolled networks give the same values")
    frozen = jax.tree.map(lambda _: None, stacked.gradients["stem"])
    measure(
        stacked._replace(
            gradients={**stacked.gradients, "stem": frozen},
            updates={**stacked.updates, "stem": frozen},
        )
    )
    claim("it works where the stem is frozen")
    return claims


def _context(model: nn.Module, variables: Any) -> Context:
    """Returns the context of a step of SGD on random images."""
    tapped = TappedModel(model, forward=True)
    # Biases start at zero, and the ratio of an update to an array of zeros is not finite.
    variables = {**variables, "params": jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])}
    probes, sums = tapped.zeros(variables, IMAGES.shape[1:])
    given = {**variables, "batch_stats": {**variables["batch_stats"], FORWARD: sums}}

    def loss_fn(params: Any) -> Any:
        logits, updated = tapped.apply(
            {**given, "params": params}, IMAGES, train=True, mutable=["batch_stats"]
        )
        return (logits**2).mean(), updated["batch_stats"]

    compute = jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, batch_stats), gradients = compute({**variables["params"], PROBES: probes})
    squares = gradients.pop(PROBES)
    return Context(
        params=variables["params"],
        gradients=gradients,
        updates=jax.tree.map(lambda gradient: -0.1 * gradient, gradients),
        batch_stats=batch_stats,
        activation_gradients=norms(squares),
        forward=forward_values(batch_stats.pop(FORWARD)),
        loss=loss,
    )
