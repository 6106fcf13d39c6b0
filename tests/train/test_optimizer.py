"""Optimizers against recursions in NumPy and against Optax; schedules against definitions."""

import json
import signal
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from resjax.config import Config, Model, Optimizer
from resjax.config.schema import Train
from resjax.errors import UserError
from resjax.train import optimizer
from resjax.train.checkpoint_reader import CheckpointReader
from resjax.train.freezing import Phase
from resjax.train.loop import train
from resjax.train.signals import Stopped, StopRequest
from resjax.xla.compile_options import quick_compile

SHAPES = {"conv": {"kernel": (3, 3, 2, 4)}, "norm": {"scale": (4,), "bias": (4,)}}


def random_tree(random):
    return {
        layer: {name: random.normal(size=shape).astype(np.float32) for name, shape in own.items()}
        for layer, own in SHAPES.items()
    }


RATES = (0.5, 0.25, 1.0, 0.125)


def require_updates(config, textbook):
    """Takes a few steps and compares the updates with those of `textbook`.

    `textbook(gradient, weight, rate, decay, memory)` returns the update of one array; `decay` is
    its weight decay, and `memory` a dict, empty at first, that it may fill from step to step.
    """
    random = np.random.default_rng(0)
    params = random_tree(random)
    memories = jax.tree.map(lambda _: {}, params)
    decay = jax.tree.map(lambda _: config.weight_decay, params)
    if config.weight_decay_on == "kernels":
        decay["norm"] = {"scale": 0.0, "bias": 0.0}
    tx = optimizer.base_optimizer(config, {})
    state = tx.init(params)
    for rate in RATES:
        gradients = random_tree(random)
        added, state = tx.update(gradients, state, params, rate=rate)
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


def adam(gradient, memory, beta1, beta2, epsilon=1e-8):
    memory["step"] = step = memory.get("step", 0) + 1
    memory["mean"] = beta1 * memory.get("mean", 0) + (1 - beta1) * gradient
    memory["square"] = beta2 * memory.get("square", 0) + (1 - beta2) * gradient**2
    mean, square = memory["mean"] / (1 - beta1**step), memory["square"] / (1 - beta2**step)
    return mean / (np.sqrt(square) + epsilon)


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
    require_updates(config, sgd)


@pytest.mark.parametrize("nesterov", [False, True])
@DECAYED
def test_lars_adds_the_norms_of_gradient_and_decay_and_scales_before_the_momentum(
    nesterov, decayed
):
    def lars(gradient, weight, rate, decay, memory):
        step = rate * (gradient + decay * weight)
        if weight.ndim > 1:
            norm = np.linalg.norm(weight)
            step *= 0.001 * norm / (np.linalg.norm(gradient) + decay * norm)
        return -momentum_of(step, 0.9, nesterov, memory)

    config = Optimizer(name="lars", nesterov=nesterov, weight_decay=0.1, weight_decay_on=decayed)
    require_updates(config, lars)


@DECAYED
def test_the_weight_decay_of_adamw_bypasses_the_moments(decayed):
    def adamw(gradient, weight, rate, decay, memory):
        return -rate * (adam(gradient, memory, 0.8, 0.95) + decay * weight)

    config = Optimizer(
        name="adamw", momentum=0.8, beta2=0.95, weight_decay=0.1, weight_decay_on=decayed
    )
    require_updates(config, adamw)


@DECAYED
def test_lamb_scales_the_update_of_adamw_to_the_norm_of_the_kernel(decayed):
    def lamb(gradient, weight, rate, decay, memory):
        update = adam(gradient, memory, 0.8, 0.95, 1e-6) + decay * weight
        return -rate * trust(weight, update) * update

    config = Optimizer(
        name="lamb", momentum=0.8, beta2=0.95, weight_decay=0.1, weight_decay_on=decayed
    )
    require_updates(config, lamb)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_the_update_of_a_kernel_of_zeros_is_finite_and_not_zero(name):
    params = {"conv": {"kernel": np.zeros((3, 3, 2, 4), np.float32)}}
    gradients = jax.tree.map(np.ones_like, params)
    tx = optimizer.base_optimizer(Optimizer(name=name), {})
    added, _ = tx.update(gradients, tx.init(params), params, rate=0.1)
    assert np.isfinite(added["conv"]["kernel"]).all()
    assert (added["conv"]["kernel"] < 0).all()


def test_the_epsilon_of_lamb_is_that_of_the_paper():
    """A gradient far below 1e-6 would move as far as any other with the 1e-8 of Adam."""
    params = {"norm": {"scale": np.ones(4, np.float32)}}
    gradients = jax.tree.map(lambda leaf: np.full_like(leaf, 1e-6), params)
    tx = optimizer.base_optimizer(Optimizer(name="lamb", weight_decay=0.0), {})
    added, _ = tx.update(gradients, tx.init(params), params, rate=0.1)
    np.testing.assert_allclose(added["norm"]["scale"], -0.05, rtol=1e-4)


# PyTorch's and timm's numbers, which torch_optimizers.py has written.

TORCH = json.loads(Path(__file__).with_name("torch_optimizers.json").read_text())


@pytest.mark.parametrize("name", TORCH["optimizers"])
def test_steps_are_those_of_pytorch_and_timm(name):
    name, _, nesterov = name.partition(", ")
    config = Optimizer(
        name=name,
        nesterov=bool(nesterov),
        momentum=0.8,
        beta2=0.95,
        weight_decay=0.05,
        weight_decay_on="kernels",
    )
    tx = optimizer.base_optimizer(config, {})
    random = np.random.default_rng(0)
    params = {"kernel": random.normal(size=(3, 2)), "scale": random.normal(size=2)}
    state = tx.init(params)
    for expected in TORCH["optimizers"][", ".join(filter(None, (name, nesterov)))]:
        gradients = {key: random.normal(size=leaf.shape) for key, leaf in params.items()}
        updates, state = tx.update(gradients, state, params, rate=0.1)
        params = jax.tree.map(np.add, params, updates)
        for key, leaf in params.items():
            np.testing.assert_allclose(leaf, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TORCH["schedules"])
def test_the_rate_of_every_step_is_that_of_pytorch_and_timm(name):
    schedule, _, warmup = name.partition(", ")
    config = Optimizer(schedule=schedule, warmup_steps=5 if warmup else 0)
    assert rates(config, 40) == pytest.approx(TORCH["schedules"][name], rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    "name",
    [*optimizer.OURS, *optimizer.ELEMENTWISE, "adafactor", "novograd", "own_training:agc"],
)
def test_scanned_and_unrolled_networks_take_the_same_steps(name):
    random = np.random.default_rng(0)
    blocks = [random_tree(random) for _ in range(2)]
    unrolled = {"stage1": {f"block{2 + i}": block for i, block in enumerate(blocks)}}
    stacked = {"stage1": {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}}
    names = ("stage1/blocks/conv/kernel", "stage1/block2/conv/kernel", "stage1/block3/conv/kernel")
    tx = optimizer.base_optimizer(Optimizer(name=name, weight_decay=0.0), dict.fromkeys(names, 0.5))

    def trained(params):
        state = tx.init(params)
        for power in (3, 2):
            gradients = jax.tree.map(lambda leaf, power=power: leaf**power, params)
            updates, state = tx.update(gradients, state, params, rate=0.1)
            params = jax.tree.map(np.add, params, updates)
        return params["stage1"]

    together = trained(stacked)["blocks"]
    for index, alone in enumerate(trained(unrolled).values()):
        own = jax.tree.map(lambda leaf, i=index: leaf[i], together)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), own, alone)


@pytest.mark.parametrize("name", ["adafactor", "own_training:agc"])
def test_a_scanned_stage_may_be_frozen(name):
    frozen = {"stage1": {"blocks": {"conv": {"kernel": None}}}}
    params = {**frozen, "head": {"kernel": np.ones((2, 2), np.float32)}}
    tx = optimizer.base_optimizer(Optimizer(name=name, weight_decay=0.0), {})
    updates, _ = tx.update(params, tx.init(params), params, rate=0.1)
    assert updates["stage1"] == frozen["stage1"]
    assert (updates["head"]["kernel"] < 0).all()


ALL = frozenset({"conv/kernel", "norm/scale", "norm/bias"})
WHOLE_RUN = (Phase(0, ALL, ALL),)


@pytest.mark.parametrize("size", [0.5, 2.0])
def test_the_global_norm_of_the_gradient_is_clipped_before_anything_else(size):
    gradients = random_tree(np.random.default_rng(0))
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradients)))
    gradients = jax.tree.map(lambda leaf: leaf * (size / norm), gradients)
    params = random_tree(np.random.default_rng(1))
    config = Config(optimizer=Optimizer(clip_norm=1.0, weight_decay=0.1, learning_rate=1.0))
    tx = optimizer.make_optimizer(config, WHOLE_RUN, {})
    added, _ = tx.update(gradients, tx.init(params), params, step=0, value=1.0)
    expected = jax.tree.map(lambda g, w: -(g / max(size, 1) + 0.1 * w), gradients, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), added, expected
    )


# Optimizers and schedules of Optax and of the user.


def sign_descent(learning_rate, shrink=1.0):
    return optax.chain(
        optax.scale_by_sign(), optax.scale(shrink), optax.scale_by_learning_rate(learning_rate)
    )


def agc(learning_rate):
    return optax.chain(optax.adaptive_grad_clip(0.5), optax.sgd(learning_rate))


def saw(learning_rate, steps, teeth=1):
    return lambda step: learning_rate * (1 - (step * teeth % steps) / steps)


@pytest.fixture(scope="module", autouse=True)
def own_module():
    """A module of the user, with an optimizer and a schedule."""
    module = ModuleType("own_training")
    module.sign_descent, module.agc = sign_descent, agc
    module.saw, module.number = saw, 3
    module.injected_sgd = optax.inject_hyperparams(optax.sgd)
    module.bad_schedule = lambda learning_rate, steps: lambda step: float("nan")
    sys.modules[module.__name__] = module
    yield
    del sys.modules[module.__name__]


@pytest.mark.parametrize(
    ("name", "fields", "optax_optimizer"),
    [
        ("adafactor", {"weight_decay": 0.0}, optax.adafactor),
        ("lion", {"weight_decay": 0.01}, lambda rate: optax.lion(rate, weight_decay=0.01)),
        (
            "lion",
            {"weight_decay": 0.01, "weight_decay_on": "kernels", "options": {"b1": 0.5}},
            lambda rate: optax.lion(rate, b1=0.5, weight_decay=0.01, mask=optimizer.kernels),
        ),
        ("adam", {"weight_decay": 0.0}, optax.adam),
        (
            "rmsprop",
            {"weight_decay": 0.0, "options": {"decay": 0.8, "momentum": 0.5}},
            lambda rate: optax.rmsprop(rate, decay=0.8, momentum=0.5),
        ),
        ("nadamw", {"weight_decay": 0.01}, partial(optax.nadamw, weight_decay=0.01)),
        (
            "optax:nadam",
            {"weight_decay": 0.0, "options": {"b2": 0.9}},
            partial(optax.nadam, b2=0.9),
        ),
        (
            "own_training:sign_descent",
            {"weight_decay": 0.0, "options": {"shrink": 0.5}},
            lambda rate: sign_descent(rate, 0.5),
        ),
        (
            "own_training:injected_sgd",  # has the rate in its state too
            {"weight_decay": 0.0},
            partial(optax.sgd, momentum=0.9),
        ),
    ],
)
def test_an_optimizer_by_name_or_path_takes_the_steps_of_optax(name, fields, optax_optimizer):
    """The learning rate changes from step to step, as in a run."""
    config = Optimizer(name=name, schedule="own_training:saw", **fields)
    run = Config(optimizer=config, train=Train(steps=4))
    tx = optimizer.make_optimizer(run, WHOLE_RUN, {})
    reference = optax_optimizer(saw(0.1, 4))
    random = np.random.default_rng(0)
    params = random_tree(random)
    state, expected_state = tx.init(params), reference.init(params)
    for step in range(4):
        gradients = random_tree(random)
        updates, state = tx.update(gradients, state, params, step=step, value=1.0)
        expected, expected_state = reference.update(gradients, expected_state, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), updates, expected
        )
        assert state[0].learning_rate == pytest.approx(0.1 * (1 - step / 4))
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "adamm"},
            r"optimizer\.name=adamm: Optax has no such optimizer; did you mean 'adam'\?",
        ),
        ({"name": "scale_by_adam"}, r"optimizer\.name=scale_by_adam: Optax has no such optimizer"),
        (
            {"name": "lbfgs", "weight_decay": 0.0},
            r"optimizer\.name=lbfgs: needs more than gradients: .*'value_fn'",
        ),
        ({"name": "nowhere:f"}, r"optimizer\.name=nowhere:f: no module named 'nowhere' here"),
        ({"name": "own_training:f"}, r"optimizer\.name=own_training:f: .* has no attribute 'f'"),
        ({"name": "own_training:number"}, r"optimizer\.name=own_training:number: "),
        (
            {"name": "adam"},
            r"optimizer\.weight_decay=0\.0001: adam has no weight decay; "
            r"set optimizer\.weight_decay=0",
        ),
        (
            {"name": "lion", "options": {"b3": 0.5}},
            r"optimizer\.options: lion: .* unexpected keyword argument 'b3'",
        ),
        ({"name": "sgd", "options": {"b1": 0.5}}, r"optimizer\.options: sgd has none"),
        (
            {"schedule": "nowhere:f"},
            r"optimizer\.schedule=nowhere:f: no module named 'nowhere' here",
        ),
        (
            {"schedule": "own_training:saw", "schedule_options": {"tooth": 2}},
            r"optimizer\.schedule=own_training:saw: .* unexpected keyword argument 'tooth'",
        ),
        ({"schedule": "own_training:bad_schedule"}, r"its first rate is nan"),
        (
            {"schedule": "cosine", "schedule_options": {"alpha": 0.1}},
            r"optimizer\.schedule_options: cosine has none",
        ),
    ],
)
def test_a_mistake_in_the_choice_of_optimizer_or_schedule_is_one_line(fields, message):
    with pytest.raises(UserError, match=message) as refusal:
        optimizer.make_optimizer(Config(optimizer=Optimizer(**fields)), WHOLE_RUN, {})
    assert "\n" not in str(refusal.value)


def test_an_own_schedule_receives_rate_steps_and_options_and_starts_after_the_warm_up():
    config = Optimizer(schedule="own_training:saw", schedule_options={"teeth": 2}, warmup_steps=2)
    expected = [0, 0.05, *(0.1 * (1 - (2 * step % 8) / 8) for step in range(8))]
    assert rates(config, 10) == pytest.approx(expected)


class StopAfter(StopRequest):
    """Requests a stop after so many dispatches."""

    def __init__(self, dispatches):
        super().__init__()
        self._left = dispatches

    def requested(self):
        self._left -= 1
        if self._left == 0:
            self.signal = signal.SIGTERM
        return self._left <= 0


@pytest.mark.usefixtures("regression")
@pytest.mark.parametrize("name", ["adafactor", "own_training:sign_descent"])
def test_a_run_with_an_optax_optimizer_and_an_own_schedule_resumes_bit_for_bit(
    configure, tmp_path, name
):
    config = configure(
        {
            "optimizer.name": name,
            "optimizer.weight_decay": 0.0,
            "optimizer.schedule": "own_training:saw",
            "train.log_every": 1,
            "train.eval_every": 5,
            "train.steps": 5,
        }
    )
    train(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, tmp_path / "parts", stop=StopAfter(2))
    assert {path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()} == {"2"}
    train(config, tmp_path / "parts")
    texts = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "parts")]
    assert texts[0] == texts[1]
    lines = map(json.loads, texts[1].splitlines())
    logged = [line["learning_rate"] for line in lines if line["split"] == "train"]
    assert logged == pytest.approx([0.1 * (1 - step / 5) for step in range(5)])
    whole, parts = (
        CheckpointReader(tmp_path / run / "checkpoints").restore_latest(None).state
        for run in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert any(name.startswith("opt_state") for name in whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=name)


# Schedules.


def rates(config, steps):
    """Returns the learning rate of each step of a run."""
    schedule = optimizer.learning_rate(config, steps)
    return [float(schedule(jnp.asarray(step))) for step in range(steps)]


def test_a_constant_rate_does_not_change():
    assert rates(Optimizer(learning_rate=0.5, schedule="constant"), 20) == [0.5] * 20


@pytest.mark.parametrize("schedule", ["steps", "he2015"])
def test_the_rate_of_the_paper_falls_at_32k_and_48k_of_64k_steps(schedule):
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
def test_the_rate_falls_once_at_each_boundary(steps, boundaries, factor):
    config = Optimizer(boundaries=tuple(boundaries), decay_factor=factor)
    passed = [sum(round(share * steps) <= step for share in boundaries) for step in range(steps)]
    assert rates(config, steps) == pytest.approx([0.1 * factor**count for count in passed])


def test_a_cosine_falls_from_the_rate_through_its_half_in_the_middle_to_zero():
    found = rates(Optimizer(schedule="cosine"), 1000)
    assert (found[0], found[500]) == pytest.approx((0.1, 0.05))
    assert found[-1] < 1e-6
    assert all(before > after for before, after in pairwise(found))


@pytest.mark.parametrize(
    ("schedule", "then"),
    [("constant", [0.4] * 8), ("steps", [0.4, 0.4, *[0.04] * 3, *[0.004] * 3])],
)
def test_a_warm_up_rises_linearly_and_does_not_move_boundaries(schedule, then):
    config = Optimizer(learning_rate=0.4, schedule=schedule, warmup_steps=4)
    assert rates(config, 12) == pytest.approx([0, 0.1, 0.2, 0.3, *then])


def test_a_cosine_after_a_warm_up_ends_with_the_run():
    found = rates(Optimizer(schedule="cosine", warmup_steps=100), 1000)
    assert max(found) == found[100] == pytest.approx(0.1)
    assert found[-1] < 1e-6


@pytest.mark.parametrize(
    ("schedule", "depth", "needed"),
    [("he2015", 104, False), ("he2015", 110, True), ("he2015", 1202, True), ("steps", 110, False)],
)
def test_only_the_schedule_of_the_paper_warms_up_and_only_from_depth_110(schedule, depth, needed):
    config = Config(model=Model(depth=depth), optimizer=Optimizer(schedule=schedule))
    assert optimizer.needs_warmup(config) is needed


def rates_by_errors(trainer, errors):
    """Returns the rate of each step if the training error of step i is `errors[i]`."""
    arrays, _ = trainer.source.example_arrays()
    images, chosen = arrays["image"][:16], np.arange(16).reshape(1, 16)
    jit = partial(jax.jit, compiler_options=quick_compile())
    step = jit(lambda state, arrays, *rest: trainer.train_step(0, arrays)(state, *rest))
    apply = jit(trainer.model.apply)
    state, found = trainer.init(0), []
    for error in errors:
        scaled = images / 255 - trainer.statistics.mean
        right = apply(state.variables, scaled).argmax(-1)
        labeled = {"image": images, "label": (right + error) % 10}
        state, output = step(state, labeled, chosen, jax.random.key(0))
        assert trainer.metric_values({"sums": output.sums})["error"] == error
        found.append(float(output.learning_rate))
    return found


# The running error is a weighted mean of the errors so far and forgets 2 % per step.
BEFORE, LEARNING, THEN_FORGETTING = [1] * 20, [0] * 4, [1] * 30
SLOW, FULL = 1e-7, 1e-6  # so slow that the network's outputs do not change


def test_a_deep_network_starts_at_a_tenth_of_the_rate_and_never_returns_to_it(regression):
    trainer = regression(
        **{
            "model.depth": 110,
            "optimizer.schedule": "he2015",
            "optimizer.learning_rate": FULL,
            "train.steps": 1000,
        }
    )
    assert rates_by_errors(trainer, [1] * 14) == pytest.approx([SLOW] * 14)
    means = [
        np.average(errors, weights=0.98 ** np.arange(len(errors))[::-1])
        for errors in (BEFORE + LEARNING[:3], BEFORE + LEARNING)
    ]
    assert means[0] > 0.8 > means[1]
    found = rates_by_errors(trainer, BEFORE + LEARNING + THEN_FORGETTING)
    assert found == pytest.approx([SLOW] * 24 + [FULL] * 30)
    assert rates_by_errors(trainer, [0, 1, 1]) == pytest.approx([SLOW, FULL, FULL])


def test_a_network_below_depth_110_starts_at_the_full_rate(regression):
    trainer = regression(
        **{
            "model.depth": 104,
            "optimizer.schedule": "he2015",
            "optimizer.learning_rate": FULL,
            "train.steps": 1000,
        }
    )
    assert rates_by_errors(trainer, [1] * 5) == pytest.approx([FULL] * 5)
