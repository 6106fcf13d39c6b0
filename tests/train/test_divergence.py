"""A loss or a gradient that is not finite: the run stops and names the layer, or skips the step."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resjax.errors import UserError
from resjax.train.divergence import locate_nonfinite
from resjax.train.loop import evaluate, train
from resjax.train.trainer import Trainer


class Fragile(nn.Module):
    """Two layers; `batches` counts what was trained on, and at the third batch one breaks."""

    classes: int
    breaks: str

    @nn.compact
    def __call__(self, images, train=False):
        batches = self.variable("batch_stats", "batches", jnp.zeros, ())
        if train:
            batches.value += 1
        third = jnp.where(batches.value == 3, jnp.inf, 1.0) if train else 1.0
        x = nn.Dense(4, name="first")(images.reshape(len(images), -1))
        if self.breaks == "output":
            x = x * third
        if self.breaks == "gradient":  # of sqrt at 0, which the loss does not see
            zero = jnp.where(third > 1, 0.0, 1.0) * x
            x = x + (jnp.sqrt(jnp.square(zero)) - jnp.abs(zero))
        return nn.Dense(self.classes, name="head")(x)


@pytest.fixture
def fragile(with_network):
    """A function from how the third step breaks, and overrides, to a trainer."""
    return lambda breaks, **overrides: with_network(partial(Fragile, breaks=breaks), **overrides)


def is_finite(state):
    arrays = jax.tree.leaves((state.params, state.opt_state, state.batch_stats))
    return all(np.isfinite(array).all() for array in arrays)


@pytest.mark.parametrize("breaks", ["output", "gradient"])
def test_stop_preserves_the_state_in_which_the_loss_was_first_not_finite(
    fragile, run_steps, breaks
):
    trainer = fragile(breaks)
    state, _ = run_steps(trainer, trainer.init(0), 2)
    assert not state.diverged
    before = jax.device_get(state.params)
    state, metrics = run_steps(trainer, state, 8)
    assert state.diverged
    assert not np.isfinite(metrics["loss"])
    if breaks == "output":
        assert state.step == 2
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))
    else:  # the loss of step 3 was still finite, and its update is in the parameters
        assert state.step == 3
        assert not is_finite(state)


@pytest.mark.parametrize("breaks", ["output", "gradient"])
def test_skip_leaves_out_the_step_and_counts_it(fragile, run_steps, breaks):
    trainer = fragile(breaks, **{"train.nonfinite": "skip"})
    state, metrics = run_steps(trainer, trainer.init(0), 10)
    assert (int(state.step), is_finite(state)) == (10, True)
    # The count of batches stays at two, so every step from the third on is the third.
    assert metrics["skipped"] == pytest.approx(0.8)
    trainer = fragile(breaks)
    alone, two = run_steps(trainer, trainer.init(0), 2)
    jax.tree.map(np.testing.assert_array_equal, alone.params, state.params)
    assert metrics["loss"] == pytest.approx(two["loss"], rel=1e-6)


def test_record_continues_whatever_the_loss_is(fragile, run_steps):
    trainer = fragile("output", **{"train.nonfinite": "record"})
    state, metrics = run_steps(trainer, trainer.init(0), 10)
    assert state.step == 10
    assert math.isnan(metrics["loss"])


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_the_step_and_the_layer_are_named(fragile, run_steps, backend):
    trainer = fragile("output", **{"parallel.backend": backend})
    state, _ = run_steps(trainer, trainer.init(0), 10)
    assert locate_nonfinite(trainer, state, 0).startswith("first in step 3")
    trainer = fragile("gradient", **{"parallel.backend": backend})
    state, _ = run_steps(trainer, trainer.init(0), 10)
    assert locate_nonfinite(trainer, state, 0) == (
        "the gradient of first was the first that was not, in step 3"
    )


@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_layers_are_named_in_the_order_of_the_network(configure, loop):
    """Layers after an infinite kernel of the second stage are not finite, those before it are."""
    trainer = Trainer(configure({"model.loop": loop, "model.depth": 14, "model.block": "basic"}))
    state = trainer.init(0)
    params = jax.tree.map(lambda leaf: leaf, state.params)  # a copy of the dicts
    params["stage2"]["block1"]["Conv_0"]["kernel"] *= 1e30
    found = locate_nonfinite(trainer, state._replace(params=params), 0)
    assert found.startswith("first in step 1, forward from stage2/block1/BatchNorm_0")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_stops_and_names_the_place_and_the_last_good_checkpoint(fragile, tmp_path):
    config = fragile("output", **{"train.log_every": 2, "train.checkpoint_every": 2}).config
    with pytest.raises(UserError) as raised:
        train(config, tmp_path)
    message = str(raised.value)
    assert "the loss is not finite in steps 3 to 4: first in step 3" in message
    assert "last good checkpoint: step 2." in message
    assert "train.nonfinite=skip" in message
    assert not (tmp_path / "summary.json").exists()
    assert [(line["step"], line["loss"], line["error"]) for line in lines(tmp_path)][1:] == [
        (4, None, None)
    ]
    assert json.loads((tmp_path / "diverged.json").read_text()) == {
        "step": 4,
        "reason": message.partition("; last good")[0],
    }


class Broken(nn.Module):
    """A layer that is not finite from the start, or whose output is not in evaluation mode."""

    classes: int
    part: str

    @nn.compact
    def __call__(self, images, train=False):
        start = jnp.nan if self.part == "kernel" else 0.1
        normal = nn.initializers.normal(start)
        x = nn.Dense(self.classes, kernel_init=normal, name="head")(images.reshape(len(images), -1))
        broken = self.part == "evaluation" and not train
        return x * jnp.where(broken, jnp.nan, 1.0)


SHORT = {"train.log_every": 2, "train.eval_every": 4, "train.checkpoint_every": 2}


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize(
    ("part", "step", "reason"),
    [
        ("kernel", 0, "params/head/kernel is not finite at step 0: training has not changed it"),
        (
            "evaluation",
            4,
            "the test loss is not finite at step 4: step 5 would be finite in training mode",
        ),
    ],
)
def test_what_is_not_finite_beside_the_training_loss_ends_the_run_too(
    with_network, tmp_path, part, step, reason, policy
):
    network = partial(Broken, part=part)
    config = with_network(network, **SHORT, **{"train.nonfinite": policy}).config
    with pytest.raises(UserError, match=reason):
        train(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    diverged = json.loads((tmp_path / "diverged.json").read_text())
    assert diverged["step"] == step
    assert diverged["reason"].startswith(reason)


def test_under_record_a_test_loss_that_is_not_finite_has_no_error_either(with_network, tmp_path):
    fields = SHORT | {"train.nonfinite": "record"}
    summary = train(with_network(partial(Broken, part="evaluation"), **fields).config, tmp_path)
    assert math.isnan(summary["test_loss"])
    assert math.isnan(summary["test_error"])
    assert summary["train_error"] < 1
    assert not (tmp_path / "diverged.json").exists()
    with pytest.raises(UserError, match="the test loss is not finite at step 10"):
        evaluate(tmp_path)


def test_evaluate_names_the_first_array_that_is_not_finite(with_network, tmp_path):
    fields = SHORT | {"train.nonfinite": "record"}
    train(with_network(partial(Broken, part="kernel"), **fields).config, tmp_path)
    with pytest.raises(UserError, match="params/head/bias is not finite at step 10"):
        evaluate(tmp_path)


def test_a_run_that_goes_on_is_no_longer_called_diverged(regression, tmp_path):
    config = regression(**SHORT).config
    (tmp_path / "diverged.json").write_text('{"step": 2, "reason": "the loss is not finite"}')
    train(config, tmp_path)
    assert not (tmp_path / "diverged.json").exists()


def test_the_steps_of_a_shorter_dispatch_are_named_alone(fragile, tmp_path):
    fields = {"train.steps": 3, "train.log_every": 2, "train.eval_every": 2}
    config = fragile("output", **fields, **{"train.checkpoint_every": 2}).config
    with pytest.raises(UserError, match="the loss is not finite in step 3: first in step 3"):
        train(config, tmp_path)


def test_a_dispatch_that_skips_all_its_steps_has_no_metrics_and_the_run_continues(
    fragile, tmp_path
):
    config = fragile("output", **{"train.log_every": 2, "train.nonfinite": "skip"}).config
    summary = train(config, tmp_path)
    found = {line["step"]: line for line in lines(tmp_path) if line["split"] == "train"}
    assert list(found) == [2, 4, 6, 8, 10]
    assert found[2]["skipped"] == 0
    assert found[2]["loss"] > 0
    for step in (4, 6, 8, 10):
        assert (found[step]["loss"], found[step]["error"], found[step]["skipped"]) == (
            None,
            None,
            1,
        )
    assert math.isnan(summary["train_loss"])
    assert json.loads((tmp_path / "summary.json").read_text())["train_loss"] is None
