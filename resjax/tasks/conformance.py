"""Checks that a task of your own keeps the contract of `resjax.tasks.Task`.

::

    from resjax.tasks.conformance import check_task
    check_task("my_task:MyTask")
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resjax.config import Task as TaskConfig
from resjax.errors import first_few
from resjax.models.resnet import build
from resjax.tasks import DatasetInfo, make_task
from resjax.tasks.base import Batch, Sums, Task
from resjax.user_code import shows_users_frames
from resjax.xla.compile_options import quick_compile

EXAMPLES = 8

jit = partial(jax.jit, compiler_options=quick_compile())


@shows_users_frames
def check_task(name: str, **options: Any) -> list[str]:
    """Checks a task on random images with the head of a small network, and prints what it checked.

    Args:
      name: of ours, or `package.module:Class`.
      **options: fields of the task.

    Returns:
      The claims that hold, one sentence each.

    Raises:
      AssertionError: the first claim that does not hold; says what happened instead.
      UserError: there is no such task, or it has no such option.
    """
    task = make_task(TaskConfig(name, options), DatasetInfo(tuple("abcdefghij"), (8, 8, 3)))
    claims: list[str] = []

    def claim(text: str) -> None:
        claims.append(text)
        print(f"{name}: {text}")

    model = build("cifar_resnet8", width=4, head=task.head())
    image_key, target_key = jax.random.split(jax.random.key(0))
    images = jax.random.normal(image_key, (EXAMPLES, 8, 8, 3))
    batch = {"image": images} | _targets(target_key, task)
    weighted = {**batch, "weight": jnp.ones(EXAMPLES)}
    variables = jit(model.init)(jax.random.key(1), batch["image"])

    def outputs_of(params: Any) -> Any:
        return model.apply({**variables, "params": params}, batch["image"])

    def loss_of(params: Any) -> Any:
        return task.loss(outputs_of(params), task.encode(batch))

    shape = jax.eval_shape(loss_of, variables["params"]).shape
    assert shape == (), f"loss has the shape {shape}; return the mean, a scalar"
    loss, gradients = jit(jax.value_and_grad(loss_of))(variables["params"])
    assert np.isfinite(loss), f"the loss is {loss}"
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        layer = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(gradient).all(), f"the gradient of {layer} is not finite"
    claim("loss is a finite scalar with finite gradients")

    outputs = jit(outputs_of)(variables["params"])
    trained = _sums(task, outputs, task.encode(batch))
    evaluated = _sums(task, outputs, weighted)
    assert "loss" in evaluated, "sums lacks loss, which the training loop needs"
    only = sorted(trained.keys() - evaluated.keys())
    assert not only, f"training has sums of {first_few(only)}, which evaluation lacks"
    assert "loss" in trained, "sums lacks loss in training"
    claim(f"training and evaluation return sums of {', '.join(sorted(evaluated))}")

    half = EXAMPLES // 2
    first, second = _part(outputs, weighted, 0, half), _part(outputs, weighted, half, EXAMPLES)
    added = jax.tree.map(jnp.add, _sums(task, *first), _sums(task, *second))
    _assert_close(evaluated, added, "the sums of a batch are not the sums over its halves")
    claim("sums add up over batches")

    weights = jnp.arange(EXAMPLES) < half
    broken = jax.tree.map(
        lambda array: jnp.where(weights.reshape(-1, *[1] * (array.ndim - 1)), array, jnp.nan),
        outputs,
    )
    padded = _sums(task, broken, {**batch, "weight": weights.astype(jnp.float32)})
    _assert_close(_sums(task, *first), padded, "examples of weight 0 change the sums")
    claim("examples of weight 0 do not count, even if their outputs are not finite")

    metrics = task.metrics(jax.device_get(evaluated))
    missing = {"loss", task.primary.name} - metrics.keys()
    assert not missing, f"metrics lacks {min(missing)}, which the training loop needs"
    for metric, value in metrics.items():
        assert np.isfinite(float(value)), f"the metric {metric} is {value}"
    direction = "lower" if task.primary.lower_is_better else "higher"
    claim(
        f"metrics are finite numbers; {task.primary.name} is the primary one, {direction} is better"
    )
    return claims


def _targets(key: Any, task: Task) -> Batch:
    """Returns random targets for images of 8 x 8 pixels, those that the task declares."""
    keys = jax.random.split(key, 4)
    sizes = jax.random.uniform(keys[2], (EXAMPLES, 3, 2), minval=2.0, maxval=5.0)
    corners = jax.random.uniform(keys[3], (EXAMPLES, 3, 2), maxval=3.0)
    known = {
        "label": jax.random.randint(keys[0], (EXAMPLES,), 0, 10),
        "mask": jax.random.randint(keys[1], (EXAMPLES, 8, 8), 0, 10).astype(jnp.uint8),
        "boxes": jnp.concatenate([corners, corners + sizes], -1),
        "classes": jax.random.randint(keys[0], (EXAMPLES, 3), 0, 10),
    }
    return {name: known[name] for name in task.targets}


def _sums(task: Task, outputs: Any, batch: Batch) -> Sums:
    return jit(task.sums)(outputs, batch)


def _part(outputs: Any, batch: Batch, start: int, stop: int) -> tuple[Any, Batch]:
    return jax.tree.map(lambda array: array[start:stop], (outputs, batch))


def _assert_close(expected: Sums, found: Sums, message: str) -> None:
    for name, (total, weight) in expected.items():
        for a, b in zip((total, weight), found[name], strict=True):
            assert np.allclose(a, b, rtol=1e-4, atol=1e-5), f"{message}: {name} is {b}, not {a}"
