"""The compiled step: its arithmetic against numpy, and that seeds share one compilation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from resjax.data.augmentation import augment
from resjax.data.datasets import Split
from resjax.models.resnet import build
from resjax.train.step import Program, missed, program
from resjax.xla.compile_options import quick_compile


@pytest.fixture(scope="module")
def compiled(configure) -> Program:
    """The program of the smallest run: a ResNet-8 in which all that can be random is."""
    return program(configure())


def trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def without_key(state):
    return state._replace(key=jax.random.key_data(state.key))


def flat(images, compiled):
    return (images / 255 - compiled.statistics.mean).reshape(len(images), -1)


@pytest.mark.parametrize(
    ("smoothing", "nesterov", "decayed"),
    [(0.0, False, "all"), (0.1, False, "all"), (0.1, True, "kernels")],
)
def test_steps_are_those_of_softmax_regression_in_numpy(regression, smoothing, nesterov, decayed):
    compiled = regression(
        **{
            "train.label_smoothing": smoothing,
            "train.steps": 6,
            "optimizer.nesterov": nesterov,
            "optimizer.weight_decay": 0.1,
            "optimizer.weight_decay_on": decayed,
        }
    )
    split, take_step = jax.device_get(compiled.train_split), jax.jit(compiled.take_step)
    state = compiled.init(0)
    head = state.params["head"]
    kernel, bias = np.float64(head["kernel"]), np.float64(head["bias"])
    velocities = np.zeros_like(kernel), np.zeros_like(bias)
    decay_of_bias = 0.1 if decayed == "all" else 0.0
    for step, rate in enumerate([0.1, 0.1, 0.1, 0.01, 0.001, 0.001]):
        chosen = np.arange(16 * step, 16 * step + 16)
        batch = Split(*(array[chosen] for array in split))
        state, metrics = take_step(state, compiled.train_split, chosen, jax.random.key(0))

        inputs = flat(batch.images, compiled)
        logits = inputs @ kernel + bias
        targets = (1 - smoothing) * np.eye(10)[batch.labels] + smoothing / 10
        loss = -(targets * log_softmax(logits, -1)).sum(-1).mean()
        error = (logits.argmax(-1) != batch.labels).mean()
        slope = (softmax(logits, -1) - targets) / 16
        gradients = inputs.T @ slope + 0.1 * kernel, slope.sum(0) + decay_of_bias * bias
        velocities = tuple(0.9 * v + g for v, g in zip(velocities, gradients, strict=True))
        along = velocities
        if nesterov:
            along = tuple(g + 0.9 * v for g, v in zip(gradients, velocities, strict=True))
        kernel, bias = kernel - rate * along[0], bias - rate * along[1]

        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["error"] == pytest.approx(error)
        assert metrics["learning_rate"] == pytest.approx(rate)
        np.testing.assert_allclose(state.params["head"]["kernel"], kernel, atol=1e-5)
        np.testing.assert_allclose(state.params["head"]["bias"], bias, atol=1e-5)
    assert (state.step, state.batch_stats["batches"]) == (6, 6)


@pytest.mark.parametrize("name", ["data.mixup", "data.cutmix"])
def test_a_mixed_batch_has_the_loss_and_error_of_mixed_images_and_targets(regression, name):
    compiled = regression(**{name: 1.0, "train.label_smoothing": 0.1})
    state, split = compiled.init(0), compiled.train_split
    chosen, key = np.arange(200), jax.random.key(4)
    _, metrics = jax.jit(compiled.take_step)(state, split, chosen, key)

    image_key, _, batch_key = jax.random.split(key, 3)
    targets = np.eye(10, dtype=np.float32)[split.labels[chosen]]
    batch = augment(
        jax.random.split(image_key, 200),
        batch_key,
        {"image": split.images[chosen], "label": targets},
        compiled.statistics,
        compiled.augmentation,
    )
    images, targets = np.asarray(batch["image"]), np.asarray(batch["label"])
    assert 0.01 < targets.max(-1).min() < 0.99
    head = state.params["head"]
    logits = images.reshape(200, -1) @ np.float64(head["kernel"]) + np.float64(head["bias"])
    loss = -((0.9 * targets + 0.01) * log_softmax(logits, -1)).sum(-1).mean()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["error"] == pytest.approx(float(missed(logits, targets).mean()))


def test_what_is_missed_of_a_target_is_its_share_outside_the_likeliest_class():
    logits = np.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [5.0, 0.0, 0.0]])
    targets = np.array([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(missed(logits, targets), [0.25, 1, 0])


EVAL_BATCH_SIZES = (1, 7, 100, 256, 360, 1000)  # of 360 test examples


@pytest.mark.parametrize("size", EVAL_BATCH_SIZES)
def test_evaluation_counts_every_test_example_once_whatever_its_batches(regression, size):
    compiled = regression(**{"data.eval_batch_size": size})
    state, (images, labels) = compiled.init(0), jax.device_get(compiled.test_split)
    head = state.params["head"]
    logits = flat(images, compiled) @ np.float64(head["kernel"]) + np.float64(head["bias"])
    losses = -log_softmax(logits, -1)[np.arange(360), labels]
    metrics = compiled.evaluate(state)
    assert metrics["loss"] == pytest.approx(losses.mean(), rel=2e-6)
    assert metrics["error"] == pytest.approx((logits.argmax(-1) != labels).mean(), rel=1e-6)


def test_evaluation_of_a_resnet_is_that_of_its_logits(compiled):
    state, (images, labels) = compiled.init(0), jax.device_get(compiled.test_split)
    scaled = np.float32(images) / 255 - compiled.statistics.mean
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = np.float64(jax.jit(compiled.model.apply)(variables, scaled))
    metrics = compiled.evaluate(state)
    losses = -log_softmax(logits, -1)[np.arange(360), labels]
    assert metrics["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert metrics["error"] == pytest.approx((logits.argmax(-1) != labels).mean(), rel=1e-6)


def test_an_example_that_fills_the_last_batch_turns_no_infinite_loss_into_nan(regression):
    compiled = regression(**{"data.eval_batch_size": 52})  # 7 batches, the last with 4 to fill it
    state, split = compiled.init(0), compiled.test_split
    bias = jnp.full(10, 3e38).at[split.labels[-1]].set(-3e38)  # no logit above is ever as low
    state.params["head"]["bias"] = bias
    with jax.disable_jit():  # a compiler may mend 0 * inf; none is asked to
        metrics = compiled.evaluate_split(state, split)
    assert metrics["loss"] == np.inf


def test_the_average_of_the_weights_is_the_recursion_and_is_evaluated_beside_them(regression):
    compiled = regression(**{"optimizer.ema_decay": 0.75})
    state = compiled.init(0)
    average = np.float64(state.params["head"]["kernel"])
    for _ in range(3):
        state, _ = compiled.steps(state, 1)
        average = 0.75 * average + 0.25 * np.float64(state.params["head"]["kernel"])
    np.testing.assert_allclose(state.average["params"]["head"]["kernel"], average, atol=1e-6)
    assert state.average["batch_stats"]["batches"] == pytest.approx(1.265625)  # of 0, 1, 2, 3

    metrics = compiled.evaluate(state)
    swapped = compiled.evaluate(state._replace(**state.average))
    for name in ("loss", "error"):
        assert metrics[f"ema_{name}"] == swapped[name] != metrics[name]


def test_without_an_average_none_is_evaluated(regression):
    compiled = regression()
    assert compiled.evaluate(compiled.init(0)).keys() == {"loss", "error"}


def test_a_batch_in_parts_gives_the_gradients_of_the_whole_where_nothing_mixes_images(regression):
    whole, parts = (regression(**{"train.accumulation_steps": count}) for count in (1, 4))
    found = []
    for compiled in (whole, parts):
        state, metrics = compiled.steps(compiled.init(0), 3)
        found.append((state.params, metrics))
        assert state.batch_stats["batches"] == 3 * compiled.config.train.accumulation_steps
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *found)


def test_rematerialised_blocks_give_the_same_gradients(configure, compiled):
    state, chosen, key = compiled.init(0), np.arange(16), jax.random.key(1)
    found = []
    for remat in (False, True):
        made = Program(configure({"model.remat": remat}))
        gradients = jax.jit(made.gradients, compiler_options=quick_compile())
        found.append(gradients(state, made.train_split, chosen, key))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), *found)


def test_rematerialised_blocks_keep_a_third_of_the_bytes_or_less():
    images, kept = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32), []
    for remat in (False, True):
        model = build("cifar_resnet20", remat=remat, loop="unroll")
        variables = jax.eval_shape(model.init, jax.random.key(0), images)

        def backward(variables, images, model=model):
            apply = partial(model.apply, train=True, mutable="batch_stats")
            return jax.vjp(apply, variables, images)[1]

        residuals = jax.tree.leaves(jax.eval_shape(backward, variables, images))
        kept.append(sum(leaf.size * leaf.dtype.itemsize for leaf in residuals))
    assert kept[1] < kept[0] / 3


def test_six_steps_in_one_dispatch_are_those_of_two_dispatches_of_three(compiled):
    at_once, _ = compiled.steps(compiled.init(0), 6)
    half, _ = compiled.steps(compiled.init(0), 3)
    in_turn, _ = compiled.steps(half, 3)
    trees_equal(without_key(at_once), without_key(in_turn))


def test_metrics_of_a_dispatch_are_the_means_of_its_steps(compiled):
    _, together = compiled.steps(compiled.init(0), 3)
    state, alone = compiled.init(0), []
    for _ in range(3):
        state, metrics = compiled.steps(state, 1)
        alone.append(metrics)
    assert len({float(metrics["loss"]) for metrics in alone}) == 3
    for name in ("loss", "error"):
        mean = np.mean([metrics[name] for metrics in alone])
        assert together[name] == pytest.approx(mean, rel=1e-6)


def test_the_rate_of_a_dispatch_is_that_of_its_last_step(regression):
    compiled = regression(**{"train.steps": 6})
    rates, state = [], compiled.init(0)
    for _ in range(2):
        state, metrics = compiled.steps(state, 3)
        rates.append(float(metrics["learning_rate"]))
    assert rates == pytest.approx([0.1, 0.001])


def test_seeds_share_one_compiled_program(configure, compiled):
    taken = []
    for seed in (0, 1):
        shared = program(configure({"seed": seed}))
        assert shared is compiled
        state, _ = shared.steps(shared.init(seed), 3)
        shared.evaluate(state)
        taken.append((shared._init._cache_size(), shared._steps.copy(), shared._evaluation))
    assert taken[0] == taken[1]


def test_configs_that_differ_in_anything_else_share_none(configure, compiled):
    assert program(configure({"optimizer.warmup_steps": 1})) is not compiled


def test_seeds_differ_in_their_weights_and_in_their_batches(compiled):
    first, second = compiled.init(0), compiled.init(1)
    kernels = [np.asarray(state.params["stem"]["Conv_0"]["kernel"]) for state in (first, second)]
    assert not np.array_equal(*kernels)
    same_weights = second._replace(**{**first._asdict(), "key": second.key})
    losses = [
        compiled.steps(state, 3)[1]["loss"]
        for state in (jax.tree.map(jnp.copy, same_weights), compiled.init(0))
    ]
    assert losses[0] != losses[1]


def test_a_seed_gives_the_same_run_again(compiled):
    (first, metrics), (second, again) = (compiled.steps(compiled.init(3), 3) for _ in range(2))
    trees_equal((without_key(first), metrics), (without_key(second), again))


def test_the_old_state_s_memory_is_given_to_the_new_one(compiled):
    old = compiled.init(0)
    compiled.steps(old, 3)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


def test_a_dispatch_moves_nothing_between_host_and_device(compiled):
    state = compiled.init(0)
    with jax.transfer_guard("disallow"):
        state, metrics = compiled.steps(state, 3)
        evaluated = compiled.evaluate(state)
    assert metrics["loss"] > 0
    assert evaluated["loss"] > 0
