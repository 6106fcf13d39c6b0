"""A loss or a gradient that is not finite: where it began is said, or the step is left out."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resjax.errors import UserError
from resjax.train import step
from resjax.train.divergence import origin
from resjax.train.loop import train
from resjax.train.step import Program, State


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
def fragile(configure, monkeypatch):
    """A function from how the third step breaks, and overrides, to a program and its config."""

    def made(breaks, **overrides):
        monkeypatch.setattr(
            step, "build", lambda model, classes, **_: Fragile(classes=classes, breaks=breaks)
        )
        step._program.cache_clear()
        plain = {"data.crop_padding": 0, "data.flip": False}
        config = configure(plain | overrides)
        return Program(config), config

    return made


def finite(state):
    arrays = jax.tree.leaves((state.params, state.optimizer, state.batch_stats))
    return all(np.isfinite(array).all() for array in arrays)


@pytest.mark.parametrize("breaks", ["output", "gradient"])
def test_stop_leaves_the_state_in_which_the_loss_was_first_not_finite(fragile, breaks):
    program, _ = fragile(breaks)
    state, _ = program.steps(program.init(0), 2)
    assert not state.diverged
    before = jax.device_get(state.params)
    state, metrics = program.steps(state, 8)
    assert state.diverged
    assert not np.isfinite(metrics["loss"])
    if breaks == "output":
        assert state.step == 2
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))
    else:  # the loss of step 3 was still finite, and its update is in the weights
        assert state.step == 3
        assert not finite(state)


@pytest.mark.parametrize("breaks", ["output", "gradient"])
def test_skip_leaves_the_step_out_and_counts_it(fragile, breaks):
    program, _ = fragile(breaks, **{"train.nonfinite": "skip"})
    state, metrics = program.steps(program.init(0), 10)
    assert (int(state.step), finite(state)) == (10, True)
    # The count of batches stays at two, so every step from the third on is the third.
    assert float(metrics["skipped"]) == pytest.approx(0.8)
    alone, two = fragile(breaks)[0].steps(program.init(0), 2)
    jax.tree.map(np.testing.assert_array_equal, alone.params, state.params)
    assert float(metrics["loss"]) == pytest.approx(float(two["loss"]), rel=1e-6)


def test_record_goes_on_whatever_the_loss_is(fragile):
    program, _ = fragile("output", **{"train.nonfinite": "record"})
    state, metrics = program.steps(program.init(0), 10)
    assert state.step == 10
    assert math.isnan(metrics["loss"])


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_what_is_said_names_the_step_and_the_layer(fragile, backend):
    program, _ = fragile("output", **{"parallel.backend": backend})
    state, _ = program.steps(program.init(0), 10)
    assert origin(program, state, 0).startswith("first in step 3")
    program, _ = fragile("gradient", **{"parallel.backend": backend})
    state, _ = program.steps(program.init(0), 10)
    assert origin(program, state, 0) == (
        "the gradient of first was the first that was not, in step 3"
    )


@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_of_a_network_the_layers_are_named_in_its_order(configure, loop):
    """A weight of the second stage is made infinite; what lies below feels it, not what is above"""
    program = Program(configure({"model.loop": loop, "model.depth": 14, "model.block": "basic"}))
    state: State = program.init(0)
    stage = dict(state.batch_stats["stage2"])
    broken = jax.tree.map(lambda leaf: leaf, state.params)
    kernel = broken["stage2"]["block1"]["Conv_0"]["kernel"]
    broken["stage2"]["block1"]["Conv_0"]["kernel"] = kernel * 1e30
    del stage
    said = origin(program, state._replace(params=broken), 0)
    assert said.startswith("first in step 1, forward from stage2/block1/BatchNorm_0")


def test_a_run_stops_and_says_where_and_what_is_good(fragile, tmp_path):
    _, config = fragile("output", **{"train.log_every": 2, "train.checkpoint_every": 2})
    with pytest.raises(UserError) as raised:
        train(config, tmp_path)
    told = str(raised.value)
    assert "the loss is not finite in steps 3 to 4: first in step 3" in told
    assert "last good checkpoint: that of step 2" in told
    assert "train.nonfinite=skip" in told
    assert not (tmp_path / "summary.json").exists()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"] is None) for line in lines] == [(2, False), (4, True)]


def test_a_dispatch_in_which_every_step_is_skipped_ends_the_run(fragile, tmp_path):
    _, config = fragile("output", **{"train.log_every": 2, "train.nonfinite": "skip"})
    with pytest.raises(UserError, match="the loss is not finite in steps 3 to 4"):
        train(config, tmp_path)
