"""SGD against a recursion in numpy; the learning rate against its definition."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from resjax.config import Config, Model, Optimizer
from resjax.train import optimizer
from resjax.train.step import Resident

SHAPES = {"conv": {"kernel": (3, 3, 2, 4)}, "norm": {"scale": (4,), "bias": (4,)}}


def random_tree(random):
    return {
        layer: {name: random.normal(size=shape).astype(np.float32) for name, shape in own.items()}
        for layer, own in SHAPES.items()
    }


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decayed", ["all", "kernels"])
def test_the_direction_is_that_of_the_textbook_recursion(momentum, nesterov, decayed):
    config = Optimizer(
        momentum=momentum, nesterov=nesterov, weight_decay=0.1, weight_decay_on=decayed
    )
    random = np.random.default_rng(0)
    params = random_tree(random)
    velocity = jax.tree.map(np.zeros_like, params)
    decay = jax.tree.map(lambda _: 0.1, params)
    if decayed == "kernels":
        decay["norm"] = {"scale": 0.0, "bias": 0.0}
    transformation = optimizer.direction(config)
    state = transformation.init(params)
    for _ in range(4):
        gradients = random_tree(random)
        along, state = transformation.update(gradients, state, params)

        decayed_gradients = jax.tree.map(lambda g, d, w: g + d * w, gradients, decay, params)
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, decayed_gradients)
        expected = (
            jax.tree.map(lambda v, g: momentum * v + g, velocity, decayed_gradients)
            if nesterov
            else velocity
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), along, expected)
        params = jax.tree.map(lambda w, d: w - 0.1 * np.asarray(d), params, along)


def rates(config, steps):
    """The learning rate at every step of a run."""
    schedule = optimizer.learning_rate(config, steps)
    return [float(schedule(jnp.asarray(step))) for step in range(steps)]


def test_a_constant_rate_never_changes():
    assert rates(Optimizer(learning_rate=0.5, schedule="constant"), 20) == [0.5] * 20


@pytest.mark.parametrize("schedule", ["steps", "he2015"])
def test_the_paper_s_rate_falls_at_32k_and_48k_of_64k_steps(schedule):
    rate = optimizer.learning_rate(Optimizer(schedule=schedule), 64_000)
    steps = (0, 31_999, 32_000, 47_999, 48_000, 63_999)
    expected = [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert [float(rate(jnp.asarray(step))) for step in steps] == pytest.approx(expected)


@given(
    steps=st.integers(1, 40),
    boundaries=st.lists(st.floats(0.01, 0.99), max_size=4, unique=True).map(sorted),
    factor=st.sampled_from([0.5, 0.1, 2.0]),
)
@example(steps=4, boundaries=[0.5, 0.6], factor=0.1)  # both at the second step
def test_the_rate_falls_once_at_every_boundary(steps, boundaries, factor):
    config = Optimizer(boundaries=tuple(boundaries), decay_factor=factor)
    passed = [sum(round(share * steps) <= step for share in boundaries) for step in range(steps)]
    assert rates(config, steps) == pytest.approx([0.1 * factor**count for count in passed])


def test_a_cosine_starts_at_the_rate_is_half_in_the_middle_and_ends_at_nothing():
    found = rates(Optimizer(schedule="cosine"), 1000)
    assert (found[0], found[500]) == pytest.approx((0.1, 0.05))
    assert found[-1] < 1e-6
    assert all(before > after for before, after in pairwise(found))


@pytest.mark.parametrize(
    ("schedule", "then"),
    [("constant", [0.4] * 8), ("steps", [0.4, 0.4, *[0.04] * 3, *[0.004] * 3])],
)
def test_a_warm_up_rises_linearly_and_moves_no_boundary(schedule, then):
    config = Optimizer(learning_rate=0.4, schedule=schedule, warmup_steps=4)
    assert rates(config, 12) == pytest.approx([0, 0.1, 0.2, 0.3, *then])


def test_a_cosine_after_a_warm_up_still_ends_with_the_run():
    found = rates(Optimizer(schedule="cosine", warmup_steps=100), 1000)
    assert max(found) == found[100] == pytest.approx(0.1)
    assert found[-1] < 1e-6


@pytest.mark.parametrize(
    ("schedule", "depth", "needed"),
    [("he2015", 104, False), ("he2015", 110, True), ("he2015", 1202, True), ("steps", 110, False)],
)
def test_only_the_paper_s_schedule_warms_up_and_only_from_depth_110(schedule, depth, needed):
    config = Config(model=Model(depth=depth), optimizer=Optimizer(schedule=schedule))
    assert optimizer.needs_warmup(config) is needed


def course_of_rates(compiled, errors):
    """The rate of every step, where the training error of step i is `errors[i]`."""
    images = compiled.train_split.images[:16]
    take_step = jax.jit(compiled.take_step)
    state, found = compiled.init(0), []
    for error in errors:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        scaled = images / 255 - compiled.statistics.mean
        right = compiled.model.apply(variables, scaled).argmax(-1)
        batch = Resident(images, (right + error) % 10)
        state, metrics = take_step(state, batch, jax.random.key(0))
        assert metrics["error"] == error
        found.append(float(metrics["learning_rate"]))
    return found


# The running error starts at 1 and forgets 2 % a step: 0.98^11 > 0.8 > 0.98^12.
LEARNING, THEN_FORGETTING = [0] * 12, [1] * 30
SLOW, FULL = 1e-7, 1e-6  # so slow that the network answers the same at every step


def test_a_deep_network_starts_at_a_tenth_and_is_at_the_full_rate_for_good(regression):
    compiled = regression(
        **{
            "model.depth": 110,
            "optimizer.schedule": "he2015",
            "optimizer.learning_rate": FULL,
            "train.steps": 1000,
        }
    )
    assert course_of_rates(compiled, [1] * 14) == pytest.approx([SLOW] * 14)
    found = course_of_rates(compiled, LEARNING + THEN_FORGETTING)
    assert found == pytest.approx([SLOW] * 12 + [FULL] * 30)


def test_a_network_below_depth_110_never_starts_slowly(regression):
    compiled = regression(
        **{
            "model.depth": 104,
            "optimizer.schedule": "he2015",
            "optimizer.learning_rate": FULL,
            "train.steps": 1000,
        }
    )
    assert course_of_rates(compiled, [1] * 5) == pytest.approx([FULL] * 5)
