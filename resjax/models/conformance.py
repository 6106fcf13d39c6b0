"""What a block must do to serve in every network: a suite to run on a block of one's own.

In a test file::

    import pytest
    from resjax.models import conformance

    @pytest.mark.parametrize("claim", conformance.CLAIMS)
    def test_my_block(claim):
        claim("my_module:MyBlock")

Each claim builds small networks of the block, checks one thing and raises an AssertionError that
says what the block did instead.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resjax.models import layout
from resjax.models.presets import block_layers
from resjax.models.resnet import ResNet, block_class, build
from resjax.xla.compile_options import quick_compile

SIDE = 9  # pixels; odd, so that a stride of 2 has to round
WIDTH = 8


def shape(block: str) -> None:
    """Stages put out expansion · width channels, and half the pixels, rounded up, after each."""
    model = network(block)
    expansion = getattr(block_class(model.block), "expansion", 1)
    variables = jax.eval_shape(model.init, jax.random.key(1), images())
    features = jax.eval_shape(lambda v: model.apply(v, images(), method="features"), variables)
    for stage, side in (("stage1", SIDE), ("stage2", (SIDE + 1) // 2)):
        channels = expansion * WIDTH * 2 ** (int(stage[-1]) - 1)
        expected, got = (len(images()), side, side, channels), features[stage].shape
        assert got == expected, f"{stage} puts out {got}; expected {expected}"


def dtype(block: str) -> None:
    """In bfloat16 every stage computes in bfloat16; all parameters and statistics stay float32."""
    model = network(block, dtype="bfloat16")
    variables = jax.eval_shape(model.init, jax.random.key(1), images())
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == jnp.float32, f"{name} is {leaf.dtype}; create it as float32"
    features = jax.eval_shape(lambda v: model.apply(v, images(), method="features"), variables)
    for stage, output in features.items():
        assert output.dtype == jnp.bfloat16, f"{stage} puts out {output.dtype}, not bfloat16"


def finite_gradients(block: str) -> None:
    """Every parameter's gradient is finite."""
    model = network(block)
    _, gradients = logits_and_gradients(model, variables_of(model))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), (
            f"the gradient of {jax.tree_util.keystr(path)} is not finite"
        )


def scanned_equals_unrolled(block: str) -> None:
    """The same parameters give the same logits and gradients in both layouts."""
    scanned, unrolled = network(block, loop="scan"), network(block, loop="unroll")
    variables = variables_of(scanned)
    logits, gradients = logits_and_gradients(scanned, variables)
    expected, expected_gradients = logits_and_gradients(unrolled, layout.unrolled(variables))
    close(logits, expected, "logits of both layouts")
    gradients = layout.unrolled({"params": gradients})["params"]
    close(gradients, expected_gradients, "gradients of both layouts")


def train_and_eval_modes(block: str) -> None:
    """Training moves BN statistics and evaluation does not; there no image sees another."""
    model = network(block)
    variables = variables_of(model)

    @partial(jit, static_argnames="train")
    def apply(images: jax.Array, train: bool) -> Any:
        return model.apply(variables, images, train=train, mutable=["batch_stats"])

    _, changed = apply(images(), train=True)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), changed, subset(variables))
    for path, moves in jax.tree_util.tree_leaves_with_path(moved):
        name = jax.tree_util.keystr(path)
        assert moves, f"training does not move {name}; use the `norm` that the block is given"
    together, kept = apply(images(), train=False)
    close(kept, subset(variables), "statistics before and after evaluation")
    first = images()[:1]
    twice, _ = apply(jnp.concatenate([first, first]), train=False)
    close(twice[0], together[0], "logits of an image beside itself and beside another")


CLAIMS = (shape, dtype, finite_gradients, scanned_equals_unrolled, train_and_eval_modes)


def check_block(block: str) -> None:
    """Holds a block, by name of ours or as `package.module:Class`, against every claim.

    Raises:
      AssertionError: of the first claim that the block does not keep.
      ValueError: there is no such block.
    """
    for claim in CLAIMS:
        claim(block)


def network(block: str, **fields: Any) -> ResNet:
    """A stage of one block; a stage of one that changes the shape and two equal ones."""
    depth = 3 * block_layers(block) + 2
    return build({}, block=block, depth=depth, width=WIDTH, **fields).clone(stages=(1, 3))


def jit(function: Any, **options: Any) -> Any:
    return jax.jit(function, compiler_options=quick_compile(), **options)


def images() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, SIDE, SIDE, 3))


def variables_of(model: ResNet) -> Any:
    return jit(model.init)(jax.random.key(1), images())


def subset(variables: Any) -> Any:
    return {"batch_stats": variables["batch_stats"]}


def logits_and_gradients(model: ResNet, variables: Any) -> tuple[jax.Array, Any]:
    """In evaluation mode; the gradients are of the sum of squared logits."""

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({**variables, "params": params}, images())
        return (logits**2).sum(), logits

    gradients, logits = jit(jax.grad(loss, has_aux=True))(variables["params"])
    return logits, gradients


def close(these: Any, those: Any, what: str, tolerance: float = 1e-5) -> None:
    """Asserts that two trees differ by at most `tolerance`, relative to each leaf's largest."""

    def difference(a: jax.Array, b: jax.Array) -> float:
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))

    worst = max(jax.tree.leaves(jax.tree.map(difference, these, those)))
    assert worst <= tolerance, f"{what} differ by {worst:.1e}, relative to the largest"
