"""The train step against NumPy, alone and as the trainer composes and compiles it."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from scipy.special import log_softmax, softmax

import resjax
from resjax.data.augmentation import augment
from resjax.models.resnet import build
from resjax.tasks import Classification, DatasetInfo
from resjax.tasks.classification import soft_top1_error
from resjax.train import trainer as trainers
from resjax.train.state import TrainState
from resjax.train.step import (
    accumulate,
    apply_nonfinite_policy,
    compute_gradients,
    eval_step,
    take_steps,
    train_step,
    with_ema,
)
from resjax.train.trainer import Dispatch, Trainer, trainer_for
from resjax.xla.compile_options import quick_compile, step_compile
from resjax.xla.target import Target, compiling_for

close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6))
jit = partial(jax.jit, compiler_options=quick_compile())
equal = partial(jax.tree.map, np.testing.assert_array_equal)
OPTIONS_OF_USERS_RUNS = trainers.step_compile  # which tests replace by quicker ones


@pytest.fixture(scope="module")
def trainer(configure) -> Trainer:
    """The trainer of the smallest run: a ResNet-8 in which everything that can be random is."""
    return trainer_for(configure())


def without_key(state):
    return state._replace(key=jax.random.key_data(state.key))


def flat(images, trainer):
    return (images / 255 - trainer.statistics.mean).reshape(len(images), -1)


def dataset(trainer, split):
    """The images and labels of a split, 0 for training, on the host."""
    return jax.device_get(trainer.source.example_arrays()[split])


def jitted_step(trainer):
    """Returns a function (state, arrays, drawn, key) -> state and metrics by name."""
    step = jit(lambda state, arrays, *rest: trainer.train_step(0, arrays)(state, *rest))

    def call(state, arrays, drawn, key):
        state, output = step(state, arrays, drawn.reshape(1, -1), key)
        metrics = {"sums": output.sums, "learning_rate": output.learning_rate}
        return state, trainer.metric_values(metrics)

    return call


# The pure functions, without a trainer.


class Pair(nn.Module):
    """Logits of two classes, and a running statistic that counts the training batches."""

    @nn.compact
    def __call__(self, images, train=False):
        batches = self.variable("batch_stats", "batches", jnp.zeros, ())
        if train:
            batches.value += 1
        return nn.Dense(2, name="head")(images.reshape(len(images), -1))


def start(model, images, tx, **fields):
    """Returns the state at step 0 of a loop of one's own."""
    variables = jit(model.init)(jax.random.key(0), images)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
        ema=None,
        key=jax.random.key(1),
        diverged=jnp.asarray(False),
    )
    return state._replace(**fields)


TASK = Classification(DatasetInfo(("left", "right"), (4, 4, 1)))
IMAGES = np.random.default_rng(0).normal(size=(8, 4, 4, 1)).astype(np.float32)
BATCH = {"image": IMAGES, "label": np.eye(2, dtype=np.float32)[np.arange(8) % 2]}
SGD = optax.sgd(0.5)


def pair_step(state, batch, key, **options):
    return train_step(state, batch, key, model=Pair(), task=TASK, tx=SGD, **options)


def test_the_train_step_works_in_a_loop_of_ones_own_with_any_network_and_optimizer():
    model = resjax.build({"depth": 8, "width": 4}, classes=2)
    tx = optax.sgd(0.1)
    step = jit(partial(train_step, model=model, task=TASK, tx=tx))
    state = start(model, IMAGES, tx)

    def loss(params):
        logits, _ = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            IMAGES,
            train=True,
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy(logits, BATCH["label"]).mean()

    expected, gradients = jit(jax.value_and_grad(loss))(state.params)
    new, output = step(state, BATCH, jax.random.key(2))
    close(output.gradients.loss, expected)
    close(
        new.params, optax.apply_updates(state.params, jax.tree.map(lambda g: -0.1 * g, gradients))
    )
    assert new.step == 1
    losses = []
    for number in range(30):
        new, output = step(new, BATCH, jax.random.key(number))
        losses.append(float(output.gradients.loss))
    assert losses[-1] < 0.1 * losses[0]
    batch = {"image": IMAGES, "label": np.arange(8) % 2, "weight": np.ones(8, np.float32)}
    sums = jit(partial(eval_step, model=model, task=TASK))(new.variables, batch)
    assert TASK.metrics(jax.device_get(sums)).keys() == {"loss", "error"}


@dataclass(frozen=True)
class ErrorByClass(Classification):
    """Has the error of each class, of which the second one has no examples."""

    def sums(self, outputs, batch):
        sums = super().sums(outputs, batch)
        return sums | {"error": tuple(jnp.stack([value, 0 * value]) for value in sums["error"])}


@pytest.mark.parametrize("cls", [Classification, ErrorByClass])
def test_the_optimizer_receives_the_step_the_loss_and_the_primary_metric(cls):
    received = {}

    def update(updates, state, params=None, **extra):
        received.update(extra)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    state = start(Pair(), IMAGES, tx)._replace(step=3)
    _, output = train_step(
        state, BATCH, jax.random.key(0), model=Pair(), task=cls(TASK.dataset), tx=tx
    )
    assert received["step"] == 3
    assert received["value"] == output.gradients.loss
    total, weight = output.sums["error"]
    assert received["metric"] == total.sum() / weight.sum()


def test_a_frozen_parameter_has_no_gradient_and_stays():
    tx = optax.sgd(0.5)
    state = start(Pair(), IMAGES, tx)
    opt_state = tx.init({"head": {"kernel": None, "bias": state.params["head"]["bias"]}})
    new, output = train_step(
        state._replace(opt_state=opt_state),
        BATCH,
        jax.random.key(0),
        model=Pair(),
        task=TASK,
        tx=tx,
        trainable=lambda path: path.endswith("bias"),
    )
    assert output.gradients.params["head"]["kernel"] is None
    np.testing.assert_array_equal(new.params["head"]["kernel"], state.params["head"]["kernel"])
    assert not np.array_equal(new.params["head"]["bias"], state.params["head"]["bias"])


def test_accumulated_gradients_are_those_of_the_whole_batch_and_statistics_pass_through_the_parts():
    state = start(Pair(), IMAGES, SGD)
    parts = jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), BATCH)
    compute = accumulate(compute_gradients, 4, 2, lambda part, keys, batch_key: part)
    options = {"model": Pair(), "task": TASK, "trainable": lambda path: True}
    whole = compute_gradients(state, BATCH, jax.random.key(0), **options)
    found = compute(state, parts, jax.random.key(0), **options)
    close((found.params, found.loss, found.sums), (whole.params, whole.loss, whole.sums))
    assert found.batch_stats["batches"] == 4


def test_the_ema_moves_towards_the_new_variables_and_fixed_variables_stay_equal():
    state = start(Pair(), IMAGES, SGD)
    state = state._replace(ema=jax.tree.map(lambda leaf: leaf + 1, state.variables))
    step = with_ema(pair_step, 0.75, lambda path: path != "params/head/bias")
    new, _ = step(state, BATCH, jax.random.key(0))
    expected = jax.tree.map(lambda old, now: 0.75 * old + 0.25 * now, state.ema, new.variables)
    expected["params"]["head"]["bias"] = state.ema["params"]["head"]["bias"]
    close(new.ema, expected)
    assert with_ema(pair_step, 0.0, lambda path: True) is pair_step


def broken(what):
    """A step whose loss or gradient is NaN from the third step on."""

    def step(state, batch, key):
        new, output = pair_step(state, batch, key)
        value = jnp.where(state.batch_stats["batches"] >= 2, jnp.nan, 1.0)
        loss, gradients = output.gradients.loss, output.gradients.params
        if what == "loss":
            loss = loss * value
        else:
            gradients = jax.tree.map(lambda leaf: leaf * value, gradients)
        computed = output.gradients._replace(loss=loss, params=gradients)
        sums = jax.tree.map(lambda leaf: leaf * value, output.sums)
        return new, output._replace(gradients=computed, sums=sums)

    return step


def test_joined_vectors_and_results_are_one_array_each_and_change_no_number():
    model, tx = resjax.build({"depth": 8, "width": 4}, classes=2), optax.sgd(0.1, momentum=0.9)
    step = partial(train_step, model=model, task=TASK, tx=tx)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1], 2 * leaf]), BATCH)
    state = start(model, IMAGES, tx)
    found, carried, stacked = [], [], []
    for join in (False, True):
        take = partial(take_steps, step, join_vectors=join)
        found.append(jit(take)(state, batches))
        loop = next(
            each
            for each in jax.make_jaxpr(take)(state, batches).eqns
            if each.primitive.name == "scan"
        )
        carried.append(loop.params["num_carry"])
        stacked.append(len(loop.outvars) - carried[-1])
    equal(*((without_key(state), metrics) for state, metrics in found))
    vectors = sum(leaf.ndim == 1 for leaf in jax.tree.leaves(without_key(state)._replace(key=None)))
    assert carried[0] - carried[1] == vectors - 1 > 20
    assert stacked == [len(jax.tree.leaves(found[0][1])), 1]


@pytest.mark.parametrize(
    ("policy", "what", "step", "skipped"),
    [
        ("record", "loss", 5, None),
        ("stop", "loss", 2, None),
        ("stop", "gradient", 5, None),
        ("skip", "loss", 5, 0.6),
        ("skip", "gradient", 5, 0.6),
    ],
)
def test_a_policy_for_nonfinite_steps_records_stops_or_skips(policy, what, step, skipped):
    guarded = apply_nonfinite_policy(broken(what), policy)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), BATCH)
    state, metrics = take_steps(guarded, start(Pair(), IMAGES, SGD), batches)
    assert state.step == step
    assert bool(state.diverged) == (policy == "stop" and what == "loss")
    assert metrics.get("skipped") == (None if skipped is None else pytest.approx(skipped))
    two = jax.tree.map(lambda leaf: leaf[:2], batches)
    expected, first = take_steps(pair_step, start(Pair(), IMAGES, SGD), two)
    if skipped or state.diverged:
        equal((state.params, state.batch_stats), (expected.params, expected.batch_stats))
    if skipped:  # the skipped steps count in no metric
        values = TASK.metrics(jax.device_get(metrics["sums"]))
        assert values == pytest.approx(TASK.metrics(jax.device_get(first["sums"])))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_on_a_gpu_all_updates_read_one_array_and_change_no_number(policy):
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), BATCH)
    state = start(Pair(), IMAGES, SGD)

    def take(state):
        new, metrics = take_steps(apply_nonfinite_policy(broken("loss"), policy), state, batches)
        return without_key(new), metrics

    found, has_array = [], []
    for platform in ("cpu", "gpu"):
        with compiling_for(Target([SimpleNamespace(platform=platform)], memory=None)):
            found.append(take(state))
            program = jax.make_jaxpr(lambda state: take(state))(state)  # JAX keeps those of `take`
        has_array.append("optimization_barrier" in str(program))
    equal(*found)
    assert has_array == [False, True]


# The step that a trainer composes.


@pytest.mark.parametrize(
    ("smoothing", "nesterov", "decayed"), [(0.0, False, "all"), (0.1, True, "kernels")]
)
def test_steps_are_those_of_softmax_regression_in_numpy(regression, smoothing, nesterov, decayed):
    trainer = regression(
        **{
            "task.options": {"label_smoothing": smoothing},
            "train.steps": 6,
            "optimizer.nesterov": nesterov,
            "optimizer.weight_decay": 0.1,
            "optimizer.weight_decay_on": decayed,
        }
    )
    arrays, step = dataset(trainer, 0), jitted_step(trainer)
    state = trainer.init(0)
    head = state.params["head"]
    kernel, bias = np.float64(head["kernel"]), np.float64(head["bias"])
    velocities = np.zeros_like(kernel), np.zeros_like(bias)
    decay_of_bias = 0.1 if decayed == "all" else 0.0
    for number, rate in enumerate([0.1, 0.1, 0.1, 0.01, 0.001, 0.001]):
        chosen = np.arange(16 * number, 16 * number + 16)
        state, metrics = step(state, arrays, chosen, jax.random.key(0))

        labels = arrays["label"][chosen]
        inputs = flat(arrays["image"][chosen], trainer)
        logits = inputs @ kernel + bias
        targets = (1 - smoothing) * np.eye(10)[labels] + smoothing / 10
        loss = -(targets * log_softmax(logits, -1)).sum(-1).mean()
        error = (logits.argmax(-1) != labels).mean()
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
    trainer = regression(
        **{name: 1.0, "task.options": {"label_smoothing": 0.1}, "data.batch_size": 200}
    )
    state, arrays = trainer.init(0), dataset(trainer, 0)
    chosen, key = np.arange(200), jax.random.key(4)
    _, metrics = jitted_step(trainer)(state, arrays, chosen, key)

    image_key, _, batch_key = jax.random.split(key, 3)
    targets = np.eye(10, dtype=np.float32)[arrays["label"][chosen]]
    batch = augment(
        jax.random.split(image_key, 200),
        batch_key,
        {"image": arrays["image"][chosen], "label": targets},
        trainer.statistics,
        trainer.augmentation,
    )
    images, targets = np.asarray(batch["image"]), np.asarray(batch["label"])
    assert 0.01 < targets.max(-1).min() < 0.99
    head = state.params["head"]
    logits = images.reshape(200, -1) @ np.float64(head["kernel"]) + np.float64(head["bias"])
    loss = -((0.9 * targets + 0.01) * log_softmax(logits, -1)).sum(-1).mean()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["error"] == pytest.approx(float(soft_top1_error(logits, targets).mean()))


def test_the_soft_error_is_the_share_of_the_target_outside_the_most_likely_class():
    logits = np.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [5.0, 0.0, 0.0]])
    targets = np.array([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(soft_top1_error(logits, targets), [0.25, 1, 0])


class Layers(nn.Module):
    """A linear network whose parameters have the names of a residual network's."""

    classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(len(images), -1)
        for name in ("stem", "stage1/block1", "stage2/block1"):
            x = nn.Dense(8, name=name)(x)
        return nn.Dense(self.classes, name="head")(x)


PLAIN_SGD = {
    "optimizer.momentum": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.schedule": "constant",
}


def one_update(trainer):
    """What the first step adds to the parameters, and the gradient, by jax.grad, of its loss."""
    arrays, state = dataset(trainer, 0), trainer.init(0)
    chosen = np.arange(16)
    new, _ = jitted_step(trainer)(state, arrays, chosen, jax.random.key(0))

    def loss(params):
        variables = {**state.variables, "params": params}
        images = arrays["image"][chosen] / 255 - trainer.statistics.mean
        logits, _ = trainer.model.apply(variables, images, train=True, mutable=["batch_stats"])
        labels = arrays["label"][chosen]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.tree.map(jnp.subtract, new.params, state.params), jit(jax.grad(loss))(state.params)


def test_the_step_clips_the_global_norm_of_the_gradient(regression):
    update, gradient = one_update(regression(**PLAIN_SGD, **{"optimizer.clip_norm": 0.1}))
    norm = optax.tree.norm(gradient)
    assert norm > 0.5
    close(update, jax.tree.map(lambda leaf: -0.1 * 0.1 / norm * leaf, gradient))


@pytest.mark.parametrize(
    ("transfer", "factors"),
    [
        ({"layer_decay": 0.5}, (1 / 8, 1 / 4, 1 / 2, 1)),
        ({"first_rate": 1e-4}, (1e-3, 1e-2, 1e-1, 1)),
    ],
)
@pytest.mark.parametrize("optimizer", ["sgd", "optax:sgd"])
def test_the_rate_of_each_stage_reaches_the_updates(with_network, transfer, factors, optimizer):
    overrides = {f"transfer.{name}": value for name, value in transfer.items()}
    overrides["optimizer.name"] = optimizer
    update, gradient = one_update(with_network(Layers, **PLAIN_SGD, **overrides))
    modules = ("stem", "stage1/block1", "stage2/block1", "head")
    for module, factor in zip(modules, factors, strict=True):
        expected = jax.tree.map(lambda leaf, f=factor: -0.1 * f * leaf, gradient[module])
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-7), update[module], expected
        )


class Recorder(nn.Module):
    """Keeps the latest training images, and draws of dropout's key, as running statistics."""

    classes: int

    @nn.compact
    def __call__(self, images, train=False):
        seen = self.variable("batch_stats", "images", lambda: jnp.zeros_like(images))
        draws = self.variable("batch_stats", "draws", jnp.zeros, 1)
        if train:
            draw = jax.random.uniform(self.make_rng("dropout"), (1,))
            seen.value = jnp.concatenate([seen.value[len(images) :], images])
            draws.value = jnp.concatenate([draws.value[1:], draw])
        return nn.Dense(self.classes, name="head")(images.reshape(len(images), -1))


def test_no_draw_of_augmentation_or_dropout_repeats_in_a_batch_or_between_steps(with_network):
    trainer = with_network(Recorder, **{"data.random_erasing": 1.0, "train.accumulation_steps": 2})
    arrays = dataset(trainer, 0)
    same = np.zeros((3, 2, 8), np.int32)  # one image over and over
    empty = {"images": jnp.zeros((48, *trainer.image_shape)), "draws": jnp.zeros(6)}
    state = trainer.init(0)._replace(batch_stats=empty)
    state, _ = jit(lambda state: take_steps(trainer.train_step(0, arrays), state, same))(state)
    images = [image.tobytes() for image in np.asarray(state.batch_stats["images"])]
    assert len({arrays["image"][0].tobytes(), *images}) == 49
    assert len(set(state.batch_stats["draws"].tolist())) == 6


# Evaluation.

EVAL_BATCH_SIZES = (1, 7, 256, 360, 1000)  # of 360 test examples


@pytest.mark.parametrize("size", EVAL_BATCH_SIZES)
def test_evaluation_counts_every_test_example_once_for_any_batch_size(regression, size):
    trainer = regression(**{"data.eval_batch_size": size})
    state, arrays = trainer.init(0), dataset(trainer, 1)
    head, labels = state.params["head"], arrays["label"]
    logits = flat(arrays["image"], trainer) @ np.float64(head["kernel"]) + np.float64(head["bias"])
    losses = -log_softmax(logits, -1)[np.arange(360), labels]
    metrics = trainer.metric_values(trainer.evaluate(state))
    assert metrics.keys() == {"loss", "error"}
    assert metrics["loss"] == pytest.approx(losses.mean(), rel=2e-6)
    assert metrics["error"] == pytest.approx((logits.argmax(-1) != labels).mean(), rel=1e-6)


def test_the_evaluation_of_a_resnet_is_that_of_its_logits(trainer):
    state, arrays = trainer.init(0), dataset(trainer, 1)
    scaled = np.float32(arrays["image"]) / 255 - trainer.statistics.mean
    labels = arrays["label"]
    logits = np.float64(jit(trainer.model.apply)(state.variables, scaled))
    metrics = trainer.metric_values(trainer.evaluate(state))
    losses = -log_softmax(logits, -1)[np.arange(360), labels]
    assert metrics["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert metrics["error"] == pytest.approx((logits.argmax(-1) != labels).mean(), rel=1e-6)


def test_an_example_that_fills_the_last_batch_does_not_turn_an_infinite_loss_into_nan(regression):
    trainer = regression(**{"data.eval_batch_size": 52})  # 7 batches, the last with 4 to fill it
    state, arrays = trainer.init(0), dataset(trainer, 1)
    bias = jnp.full(10, 3e38).at[arrays["label"][-1]].set(-3e38)  # no logit above is ever as low
    state.params["head"]["bias"] = bias
    with jax.disable_jit():  # a compiler may turn 0 * inf into 0
        draw = trainer.source.eval_draws(arrays)[-1]
        batch = trainer.source.eval_batch(jax.tree.map(jnp.asarray, arrays), draw)
        images = batch["image"] / 255 - trainer.statistics.mean
        sums = eval_step(
            state.variables, {**batch, "image": images}, model=trainer.model, task=trainer.task
        )
    assert sums["loss"][0] == np.inf
    assert sums["loss"][1] == 48


def test_the_ema_is_the_recursion_and_is_evaluated_beside_the_parameters(regression, run_steps):
    trainer = regression(**{"optimizer.ema_decay": 0.75})
    state = trainer.init(0)
    average = np.float64(state.params["head"]["kernel"])
    for _ in range(3):
        state, _ = run_steps(trainer, state, 1)
        average = 0.75 * average + 0.25 * np.float64(state.params["head"]["kernel"])
    np.testing.assert_allclose(state.ema["params"]["head"]["kernel"], average, atol=1e-6)
    assert state.ema["batch_stats"]["batches"] == pytest.approx(1.265625)  # of 0, 1, 2, 3

    metrics = trainer.metric_values(trainer.evaluate(state))
    swapped = trainer.metric_values(trainer.evaluate(state._replace(**state.ema)))
    for name in ("loss", "error"):
        assert metrics[f"ema_{name}"] == swapped[name] != metrics[name]


# Memory.


def test_rematerialized_blocks_give_the_same_gradients(configure, trainer):
    state = trainer.init(0)
    found = []
    for made in (trainer, Trainer(configure({"model.remat": True}))):

        def gradients(state, arrays, made=made):
            drawn = jnp.arange(16).reshape(1, 16)
            return made.train_step(0, arrays)(state, drawn, jax.random.key(1))[1].gradients

        arrays, _ = made.source.example_arrays()
        found.append(jit(gradients)(state, arrays))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), *found)


def test_rematerialized_blocks_store_half_of_the_bytes():
    images, stored = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32), []
    for remat in (False, True):
        model = build("cifar_resnet20", remat=remat, loop="unroll")
        variables = jax.eval_shape(model.init, jax.random.key(0), images)

        def backward(variables, images, model=model):
            apply = partial(model.apply, train=True, mutable="batch_stats")
            return jax.vjp(apply, variables, images)[1]

        residuals = jax.tree.leaves(jax.eval_shape(backward, variables, images))
        stored.append(sum(leaf.size * leaf.dtype.itemsize for leaf in residuals))
    assert 0.45 < stored[1] / stored[0] < 0.55


# Dispatches.


def test_steps_and_evaluations_are_compiled_with_the_options_of_steps(regression, monkeypatch):
    assert OPTIONS_OF_USERS_RUNS is step_compile
    given = []
    monkeypatch.setattr(trainers, "step_compile", lambda: given.append("asked") or quick_compile())
    made = regression()
    state = made.init(0)
    made.compile_dispatch(state, Dispatch(0, 3))
    made.compile_evaluation(state)
    assert given == ["asked", "asked"]


def test_a_dispatch_of_six_steps_equals_two_of_three_and_moves_nothing_to_or_from_the_host(
    trainer, run_steps
):
    at_once, _ = run_steps(trainer, trainer.init(0), 6)
    half, _ = run_steps(trainer, trainer.init(0), 3)
    call = trainer.compile_dispatch(half, Dispatch(0, 3)).call
    arrays, _ = trainer.source.example_arrays()
    with jax.transfer_guard("disallow"):
        in_turn, _ = call(half, arrays)
        trainer.evaluate(in_turn)
    equal(without_key(at_once), without_key(in_turn))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(half))  # its memory is reused


def test_the_metrics_of_a_dispatch_are_the_means_of_its_steps(trainer, run_steps):
    _, together = run_steps(trainer, trainer.init(0), 3)
    state, alone = trainer.init(0), []
    for _ in range(3):
        state, metrics = run_steps(trainer, state, 1)
        alone.append(metrics)
    assert len({metrics["loss"] for metrics in alone}) == 3
    for name in ("loss", "error"):
        mean = np.mean([metrics[name] for metrics in alone])
        assert together[name] == pytest.approx(mean, rel=1e-6)


def test_the_learning_rate_of_a_dispatch_is_that_of_its_last_step(regression, run_steps):
    trainer = regression(**{"train.steps": 6})
    rates, state = [], trainer.init(0)
    for _ in range(2):
        state, metrics = run_steps(trainer, state, 3)
        rates.append(metrics["learning_rate"])
    assert rates == pytest.approx([0.1, 0.001])


# Seeds.


def test_configs_that_differ_in_the_seed_alone_share_a_trainer(configure):
    first = trainer_for(configure())
    assert trainer_for(configure({"seed": 1})) is first
    assert trainer_for(configure({"optimizer.warmup_steps": 1})) is not first


def test_a_trainer_compiles_once_for_all_seeds(trainer, run_steps):
    compiled = []
    for seed in (0, 1):
        state, _ = run_steps(trainer, trainer.init(seed), 3)
        trainer.evaluate(state)
        compiled.append((trainer._init._cache_size(), dict(trainer._executables)))
    assert compiled[0] == compiled[1]


def test_seeds_differ_in_their_parameters_and_in_their_batches(trainer, run_steps):
    first, second = trainer.init(0), trainer.init(1)
    kernels = [np.asarray(state.params["stem"]["Conv_0"]["kernel"]) for state in (first, second)]
    assert not np.array_equal(*kernels)
    same_parameters = jax.tree.map(jnp.copy, first._replace(key=second.key))
    losses = [run_steps(trainer, state, 3)[1]["loss"] for state in (same_parameters, first)]
    assert losses[0] != losses[1]


def test_the_same_seed_gives_the_same_run(trainer, run_steps):
    (first, metrics), (second, again) = (run_steps(trainer, trainer.init(3), 3) for _ in range(2))
    equal((without_key(first), metrics), (without_key(second), again))
