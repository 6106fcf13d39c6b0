"""Optimisers against recursions in numpy; the learning rate against its definition."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from resjax.config import Config, Model, Optimizer
from resjax.data.datasets import Split
from resjax.train import optimizer

SHAPES = {"conv": {"kernel": (3, 3, 2, 4)}, "norm": {"scale": (4,), "bias": (4,)}}


def random_tree(random):
    return {
        layer: {name: random.normal(size=shape).astype(np.float32) for name, shape in own.items()}
        for layer, own in SHAPES.items()
    }


RATES = (0.5, 0.25, 1.0, 0.125)


def updates_against(config, textbook):
    """Takes a few steps and compares what is added to every weight with what `textbook` says.

    `textbook(gradient, weight, rate, decay, memory)` is of one weight array; `decay` is its factor,
    and `memory`, at first empty, is what it remembers from step to step.
    """
    random = np.random.default_rng(0)
    params = random_tree(random)
    memories = jax.tree.map(lambda _: {}, params)
    decay = jax.tree.map(lambda _: config.weight_decay, params)
    if config.weight_decay_on == "kernels":
        decay["norm"] = {"scale": 0.0, "bias": 0.0}
    transformation = optimizer.transformation(config)
    state = transformation.init(params)
    for rate in RATES:
        gradients = random_tree(random)
        added, state = transformation.update(gradients, state, params, rate=rate)
        for layer, name in [("conv", "kernel"), ("norm", "scale"), ("norm", "bias")]:
            expected = textbook(
                gradients[layer][name].astype(np.float64),
                params[layer][name].astype(np.float64),
                rate,
                decay[layer][name],
                memories[layer][name],
            )
            np.testing.assert_allclose(added[layer][name], expected, rtol=2e-5, atol=1e-6)
        params = jax.tree.map(lambda w, d: w + np.asarray(d), params, added)


def momentum_of(gradient, factor, nesterov, memory):
    memory["velocity"] = factor * memory.get("velocity", 0) + gradient
    return gradient + factor * memory["velocity"] if nesterov else memory["velocity"]


def trust(weight, update):
    """Norm over norm for kernels; 1 for biases and scales."""
    return np.linalg.norm(weight) / np.linalg.norm(update) if weight.ndim > 1 else 1.0


def adam(gradient, memory, beta1, beta2):
    memory["step"] = step = memory.get("step", 0) + 1
    memory["mean"] = beta1 * memory.get("mean", 0) + (1 - beta1) * gradient
    memory["square"] = beta2 * memory.get("square", 0) + (1 - beta2) * gradient**2
    mean, square = memory["mean"] / (1 - beta1**step), memory["square"] / (1 - beta2**step)
    return mean / (np.sqrt(square) + 1e-8)


DECAYED = pytest.mark.parametrize("decayed", ["all", "kernels"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@DECAYED
def test_sgd_is_the_textbook_recursion(momentum, nesterov, decayed):
    def sgd(gradient, weight, rate, decay, memory):
        return -rate * momentum_of(gradient + decay * weight, momentum, nesterov, memory)

    config = Optimizer(
        momentum=momentum, nesterov=nesterov, weight_decay=0.1, weight_decay_on=decayed
    )
    updates_against(config, sgd)


@pytest.mark.parametrize("nesterov", [False, True])
@DECAYED
def test_lars_scales_a_kernel_s_step_by_its_norm_before_the_momentum(nesterov, decayed):
    def lars(gradient, weight, rate, decay, memory):
        penalised = gradient + decay * weight
        coefficient = 0.001 if weight.ndim > 1 else 1.0
        step = rate * coefficient * trust(weight, penalised) * penalised
        return -momentum_of(step, 0.9, nesterov, memory)

    config = Optimizer(name="lars", nesterov=nesterov, weight_decay=0.1, weight_decay_on=decayed)
    updates_against(config, lars)


@DECAYED
def test_adamw_s_decay_passes_the_moments_by(decayed):
    def adamw(gradient, weight, rate, decay, memory):
        return -rate * (adam(gradient, memory, 0.8, 0.95) + decay * weight)

    config = Optimizer(
        name="adamw", momentum=0.8, beta2=0.95, weight_decay=0.1, weight_decay_on=decayed
    )
    updates_against(config, adamw)


@DECAYED
def test_lamb_scales_a_kernel_s_adamw_step_to_the_kernel_s_norm(decayed):
    def lamb(gradient, weight, rate, decay, memory):
        update = adam(gradient, memory, 0.8, 0.95) + decay * weight
        return -rate * trust(weight, update) * update

    config = Optimizer(
        name="lamb", momentum=0.8, beta2=0.95, weight_decay=0.1, weight_decay_on=decayed
    )
    updates_against(config, lamb)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_a_kernel_of_zeros_is_given_a_step_that_is_finite_and_not_zero(name):
    params = {"conv": {"kernel": np.zeros((3, 3, 2, 4), np.float32)}}
    gradients = jax.tree.map(np.ones_like, params)
    transformation = optimizer.transformation(Optimizer(name=name))
    added, _ = transformation.update(gradients, transformation.init(params), params, rate=0.1)
    assert np.isfinite(added["conv"]["kernel"]).all()
    assert (added["conv"]["kernel"] < 0).all()


@pytest.mark.parametrize("size", [0.5, 2.0])
def test_a_gradient_is_clipped_to_a_global_norm_before_anything_else_is_done_with_it(size):
    gradients = random_tree(np.random.default_rng(0))
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradients)))
    gradients = jax.tree.map(lambda leaf: leaf * (size / norm), gradients)
    params = random_tree(np.random.default_rng(1))
    config = Optimizer(clip_norm=1.0, weight_decay=0.1)
    transformation = optimizer.transformation(config)
    clipped = optimizer.clipped(config, gradients)
    added, _ = transformation.update(clipped, transformation.init(params), params, rate=1.0)
    expected = jax.tree.map(lambda g, w: -(g / max(size, 1) + 0.1 * w), gradients, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), added, expected
    )


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


def test_one_cycle_rises_from_a_25th_to_the_rate_and_falls_to_next_to_nothing():
    found = rates(Optimizer(learning_rate=0.5, schedule="onecycle"), 100)
    assert (found[0], found[30]) == pytest.approx((0.02, 0.5))
    assert found[-1] < 1e-3
    assert all(before < after for before, after in pairwise(found[:31]))
    assert all(before > after for before, after in pairwise(found[30:]))


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
    images, chosen = compiled.train_split.images[:16], np.arange(16)
    take_step = jax.jit(compiled.take_step)
    state, found = compiled.init(0), []
    for error in errors:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        scaled = images / 255 - compiled.statistics.mean
        right = compiled.model.apply(variables, scaled).argmax(-1)
        labelled = Split(images, (right + error) % 10)
        state, metrics = take_step(state, labelled, chosen, jax.random.key(0))
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
