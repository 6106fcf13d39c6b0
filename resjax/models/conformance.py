"""Checks what a block or a shortcut must do to serve in every network.

`check_block("my_module:MyBlock")` and `check_shortcut("my_module:MyShortcut")` print one line per
claim that holds. In a test file each claim can be a test::

    import pytest
    from resjax.models import conformance

    @pytest.mark.parametrize("claim", conformance.CLAIMS)
    def test_my_block(claim):
        claim(block="my_module:MyBlock")

A claim raises an AssertionError that says what the block or the shortcut did instead.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from resjax.models import layout
from resjax.models.presets import block_layers
from resjax.models.resnet import ResNet, build, class_of
from resjax.user_code import shows_users_frames
from resjax.xla.compile_options import quick_compile

SIDE = 9  # pixels; odd, so that a stride of 2 has to round
WIDTH = 8
IMAGES = np.random.default_rng(0).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)


def shape(block: str) -> None:
    """Stages return expansion * features channels; a stride of 2 halves height and width."""
    model = network(block)
    expansion = getattr(class_of(model.block), "expansion", 1)
    for stage, side in (("stage1", SIDE), ("stage2", (SIDE + 1) // 2)):
        channels = expansion * WIDTH * 2 ** (int(stage[-1]) - 1)
        expected, returned = (2, side, side, channels), output_shapes(model)[stage].shape
        assert returned == expected, f"{stage} returns {returned}; expected {expected}"


def dtype(block: str = "basic", shortcut: str = "pad") -> None:
    """With dtype bfloat16 all outputs are bfloat16; parameters and statistics stay float32."""
    model = network(block, shortcut, dtype="bfloat16")
    variables = jax.eval_shape(model.init, jax.random.key(1), IMAGES)
    for path, leaf in jax.tree.leaves_with_path(variables):
        name = layout.path_name(path)
        assert leaf.dtype == jnp.float32, f"{name} is {leaf.dtype}; create it as float32"
    for stage, output in output_shapes(model).items():
        assert output.dtype == jnp.bfloat16, f"{stage} returns {output.dtype}, not bfloat16"


def addition(shortcut: str) -> None:
    """The output of the shortcut has the shape and the dtype of the branch, at strides 1 and 2."""
    model = network(shortcut=shortcut, dtype="bfloat16")

    def intercept(call: Any, arguments: Any, keywords: Any, context: Any) -> Any:
        added, module = call(*arguments, **keywords), context.module
        if isinstance(module, class_of(model.shortcut)) and context.method_name == "__call__":
            (x,) = arguments
            height, width = (-(-side // module.strides) for side in x.shape[1:3])
            branch = (len(x), height, width, module.features)
            total = jnp.zeros((), x.dtype) + added
            where = f"with strides={module.strides} the shortcut adds"
            assert total.shape in (branch, ()), f"{where} {total.shape} to a branch of {branch}"
            assert total.dtype == x.dtype, f"{where} {total.dtype} to a branch of {x.dtype}"
        return added

    with nn.intercept_methods(intercept):
        jax.eval_shape(model.init, jax.random.key(1), IMAGES)


def finite_gradients(block: str = "basic", shortcut: str = "pad") -> None:
    """The gradients of all parameters are finite."""
    model = network(block, shortcut)
    _, gradients = logits_and_gradients(model, variables_of(model))
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), f"the gradient of {layout.path_name(path)} is not finite"


def scanned_equals_unrolled(block: str = "basic", shortcut: str = "pad") -> None:
    """Scanned and unrolled, the same parameters give the same logits and gradients in training."""
    scanned, unrolled = (network(block, shortcut, loop=loop) for loop in ("scan", "unroll"))
    variables = variables_of(scanned)
    logits, gradients = logits_and_gradients(scanned, variables)
    expected, expected_gradients = logits_and_gradients(unrolled, layout.unrolled(variables))
    close(logits, expected, "logits of both layouts")
    gradients = layout.unrolled({"params": gradients})["params"]
    close(gradients, expected_gradients, "gradients of both layouts", 1e-4)


def train_and_eval_modes(block: str = "basic", shortcut: str = "pad") -> None:
    """Training updates BN statistics; evaluation does not, and no image affects another there."""
    model = network(block, shortcut)
    variables = variables_of(model)
    statistics = {name: tree for name, tree in variables.items() if name == "batch_stats"}
    train, evaluate = (jit(partial(apply, model, train=train)) for train in (True, False))
    _, trained = train(variables, IMAGES)
    unchanged = jax.tree.map(lambda a, b: bool((a == b).all()), trained, statistics)
    for path, same in jax.tree.leaves_with_path(unchanged):
        name = layout.path_name(path)
        assert not same, f"training does not update {name}; use the bound `norm`"
    together, evaluated = evaluate(variables, IMAGES)
    close(evaluated, statistics, "statistics before and after evaluation")
    twice, _ = evaluate(variables, IMAGES[[0, 0]])
    close(twice[0], together[0], "logits of an image beside itself and beside another")


CLAIMS = (shape, dtype, finite_gradients, scanned_equals_unrolled, train_and_eval_modes)
SHORTCUT_CLAIMS = (addition, *CLAIMS[1:])


@shows_users_frames
def check_block(block: str, report: Callable[[str], Any] = print) -> list[str]:
    """Checks every claim on a block, and reports each in one line as soon as it holds.

    Args:
      block: a name of ours, or `package.module:Class`.
      report: called with each line.

    Returns:
      The claims that hold, one sentence each.

    Raises:
      AssertionError: a claim does not hold; the message says what the block did instead.
      ValueError: the block does not exist.
    """
    return check(CLAIMS, report, block=block)


@shows_users_frames
def check_shortcut(shortcut: str, report: Callable[[str], Any] = print) -> list[str]:
    """Checks every claim on a shortcut, in basic blocks; see `check_block`."""
    return check(SHORTCUT_CLAIMS, report, shortcut=shortcut)


def check(claims: Sequence[Any], report: Callable[[str], Any], **names: str) -> list[str]:
    for claim in claims:
        claim(**names)
        report(f"{', '.join(names.values())}: {claim.__doc__}")
    return [claim.__doc__ for claim in claims]


def network(block: str = "basic", shortcut: str = "pad", **fields: Any) -> ResNet:
    """Returns a network of two stages: one block; one that changes the shape and two equal ones."""
    depth = 3 * block_layers(block) + 2
    model = build({}, block=block, shortcut=shortcut, depth=depth, width=WIDTH, **fields)
    return model.clone(stages=(1, 3))


def jit(function: Any) -> Any:
    return jax.jit(function, compiler_options=quick_compile())


def variables_of(model: ResNet) -> Any:
    return jit(model.init)(jax.random.key(1), IMAGES)


def apply(model: ResNet, variables: Any, images: Any, train: bool) -> tuple[jax.Array, Any]:
    """Returns logits and BN statistics; a dropout key is passed in training only."""
    rngs = {"dropout": jax.random.key(2)} if train else None
    return model.apply(variables, images, train=train, rngs=rngs, mutable=["batch_stats"])


def output_shapes(model: ResNet) -> Any:
    """Returns shapes and dtypes of the outputs of the stem and of the stages."""
    variables = jax.eval_shape(model.init, jax.random.key(1), IMAGES)
    return jax.eval_shape(partial(model.apply, method="features"), variables, IMAGES)


def logits_and_gradients(model: ResNet, variables: Any) -> tuple[jax.Array, Any]:
    """Returns the logits in training, and the gradients of the sum of their squares."""

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits, _ = apply(model, {**variables, "params": params}, IMAGES, train=True)
        return (logits**2).sum(), logits

    gradients, logits = jit(jax.grad(loss, has_aux=True))(variables["params"])
    return logits, gradients


def close(these: Any, those: Any, what: str, tolerance: float = 1e-5) -> None:
    """Asserts that two trees differ by at most `tolerance`, relative to each leaf's largest."""

    def difference(a: jax.Array, b: jax.Array) -> float:
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))

    worst = max(jax.tree.leaves(jax.tree.map(difference, these, those)), default=0.0)
    assert worst <= tolerance, f"{what} differ by {worst:.1e}, relative to the largest"
