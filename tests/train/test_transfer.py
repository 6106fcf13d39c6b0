"""Training from pretrained weights: what is frozen stays, what thaws trains from its step on."""

import json
import re
import shutil
import signal
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from resjax.config import Config, Optimizer, default_config, override, resolve
from resjax.data.normalization import Statistics
from resjax.errors import UserError
from resjax.models.layout import scanned, unrolled, unrolled_paths
from resjax.models.normalization import BatchNorm
from resjax.models.resnet import build
from resjax.train import optimizer
from resjax.train.checkpoint_reader import named_arrays
from resjax.train.init_from_weights import match_classes
from resjax.train.load_weights import load_weights
from resjax.train.loop import evaluate, restore_run, train
from resjax.train.plan import plan
from resjax.train.signals import Stopped, StopRequest
from resjax.train.trainer import Dispatch, Trainer, trainer_for
from resjax.train.verify import verify
from resjax.transfer import weights
from resjax.transfer.importing import imagenet_classes
from resjax.transfer.surgery import backbone
from resjax.transfer.weights import Preprocessing, Weights, flatten
from resjax.xla.compile_options import quick_compile

STEPS_AN_EPOCH = 1437 / 16  # of the digits
TIMES = ("seconds", "compile_seconds", "images_per_second")
SMALL = {
    "data.batch_size": 16,
    "train.steps": 8,
    "train.log_every": 2,
    "train.eval_every": 4,
    "train.checkpoint_every": 2,
    "optimizer.learning_rate": 0.01,
    "optimizer.schedule": "constant",
    "optimizer.ema_decay": 0.9,
}
jit = partial(jax.jit, compiler_options=quick_compile())
THAW = 5  # the step at which stage 3 thaws


def random_weights(depth=8, classes=10, channels=1, seed=0, **fields):
    """Of a narrow network, with statistics that are no network's first ones."""
    model = {"family": "cifar", "depth": depth, "width": 4, "classes": classes, **fields}
    images = np.zeros((1, 8, 8, channels), np.float32)
    drawn = jit(build({**model, "loop": "unroll"}).init)(jax.random.key(seed), images)
    random = np.random.default_rng(seed)
    variables = {
        "params": jax.tree.map(np.asarray, drawn["params"]),
        "batch_stats": jax.tree.map(  # zeros are a mean's, ones a variance's
            lambda leaf: (leaf + random.uniform(-0.1, 0.1, leaf.shape)).astype(np.float32),
            drawn["batch_stats"],
        ),
    }
    mean, std = (np.full(channels, value, np.float32) for value in (0.3, 0.4))
    return Weights(
        model, variables, Statistics(mean, std), Preprocessing(8, 8, channels), source={"file": "w"}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w8"
    weights.save(random_weights(), path)
    return path


def configured(folder=None, **fields):
    """The small run from a weights folder; `__` stands for the dot."""
    given = SMALL | {name.replace("__", "."): value for name, value in fields.items()}
    if folder is None:
        given = {"model.depth": 8, "model.width": 4} | given
    else:
        given["transfer.weights"] = str(folder)
    return resolve(override(default_config(), given))


def gradual(folder, **fields):
    thaw = {"head": 0, "stage3": (THAW - 0.5) / STEPS_AN_EPOCH}
    return configured(folder, transfer__freeze="*", transfer__thaw=thaw, **fields)


def refusal(action):
    with pytest.raises(UserError) as refused:
        action()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def arrays(state):
    """Copies, because a state is donated to its step."""
    return {name: np.array(array) for name, array in named_arrays(state).items()}


def changed(before, after):
    """The modules, by collection, some of whose arrays are not the same bit by bit."""
    return {
        re.sub(r"^((ema/)?\w+/\w+)/.*", r"\1", name)
        for name, array in before.items()
        if name.startswith(("params", "batch_stats", "ema"))
        and array.tobytes() != after[name].tobytes()
    }


def states_of(workdir, steps):
    return {step: restore_run(workdir, str(step), print)[1].state for step in steps}


# Start.


@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_training_starts_exactly_from_the_weights(tmp_path, loop):
    given = random_weights(depth=14)
    weights.save(given, tmp_path / "w")
    made = Trainer(configured(tmp_path / "w", model__loop=loop))
    assert made.config.model.depth == 14
    state = made.start(0)
    layout = scanned if loop == "scan" else dict
    expected = flatten(layout(given.variables))
    for variables in (
        state.variables,
        state.ema,
    ):
        found = flatten(variables)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def test_a_new_head_is_drawn_and_a_zero_head_is_zero(folder):
    drawn = trainer_for(configured()).init(1).params["head"]["kernel"]
    new, zero = (
        Trainer(configured(folder, transfer__head=head)).start(1).params for head in ("new", "zero")
    )
    np.testing.assert_array_equal(new["head"]["kernel"], drawn)
    assert not np.asarray(zero["head"]["kernel"]).any()
    stem = random_weights().variables["params"]["stem"]["Conv_0"]["kernel"]
    for params in (new, zero):
        np.testing.assert_array_equal(params["stem"]["Conv_0"]["kernel"], stem)


def test_images_are_normalised_as_the_weights_ask(folder):
    made = Trainer(configured(folder, data__normalization="weights"))
    np.testing.assert_array_equal(made.statistics.mean, np.float32([0.3]))
    np.testing.assert_array_equal(made.statistics.std, np.float32([0.4]))


def test_weights_for_other_channels_are_adapted(tmp_path):
    weights.save(random_weights(channels=3), tmp_path / "w")
    made = Trainer(configured(tmp_path / "w"))
    kernel = random_weights(channels=3).variables["params"]["stem"]["Conv_0"]["kernel"]
    found = made.start(0).params["stem"]["Conv_0"]["kernel"]
    np.testing.assert_allclose(found, kernel.sum(2, keepdims=True), rtol=1e-6)


def wrong(tmp_path, what):
    """A config that cannot start from its weights."""
    folder = tmp_path / "w"
    if what == "classes":
        weights.save(random_weights(classes=1000), folder)
        return configured(folder)
    if what == "no head":
        weights.save(backbone(random_weights()), folder)
        return configured(folder)
    weights.save(random_weights(), folder)
    return configured(folder, model__width=8)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("classes", "have 1,000 classes, the data 10; set transfer.head=new"),
        ("no head", "have no head, the data 10; set transfer.head=new"),
        (
            "network",
            "are those of another network: batch_stats/stage1/block1/BatchNorm_0/mean is (4,)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_one_line_and_nothing_is_written(tmp_path, what, told):
    config = wrong(tmp_path, what)
    assert told in refusal(lambda: train(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


DIGITS = tuple("0123456789")


def test_a_kept_head_of_other_classes_is_refused_with_their_names(tmp_path):
    given = replace(random_weights(), class_names=("cat", *DIGITS[1:]))
    weights.save(given, tmp_path / "w")
    told = refusal(lambda: train(configured(tmp_path / "w"), tmp_path / "run"))
    assert (
        "know other classes than the data: only the weights have cat; only the data have 0. "
        in told
    )
    assert "Set transfer.head=new" in told
    assert "--class-names=FILE" in told
    assert not (tmp_path / "run").exists()
    made = Trainer(configured(tmp_path / "w", transfer__head="new"))
    assert made.start(0).params["head"]["bias"].shape == (10,)


def test_a_kept_head_with_its_classes_in_another_order_is_reordered(tmp_path):
    given = replace(random_weights(), class_names=DIGITS[::-1])
    weights.save(given, tmp_path / "w")
    head = Trainer(configured(tmp_path / "w")).start(0).params["head"]
    expected = given.variables["params"]["head"]["kernel"][:, ::-1]
    np.testing.assert_array_equal(head["kernel"], expected)


def test_the_words_of_imagenet_are_the_classes_of_its_numbered_folders():
    words = replace(random_weights(), class_names=imagenet_classes())
    numbers = [f"n{index:08}" for index in range(1000)]
    assert match_classes(Config(), words, numbers) is words
    refusal(lambda: match_classes(Config(), words, numbers[::-1]))


def test_statistics_of_a_mean_image_need_images_of_its_size(tmp_path):
    given = random_weights()
    mean = np.zeros((9, 9, 1), np.float32)
    weights.save(
        Weights(
            given.model,
            given.variables,
            Statistics(mean, np.ones((), np.float32)),
            Preprocessing(9, 9, 1),
        ),
        tmp_path / "w",
    )
    config = configured(tmp_path / "w", data__normalization="weights")
    assert "a mean image of 9 x 9 pixels" in refusal(lambda: Trainer(config))


# Freezing and thawing.


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folder of a gradual run that nothing interrupted, what it told, and its states."""
    workdir, told = tmp_path_factory.mktemp("gradual") / "run", []
    config = gradual(folder)
    train(config, workdir, announce=told.append)
    return workdir, "".join(told)


def test_a_dispatch_ends_at_a_thaw_and_every_log_at_its_multiple(folder):
    made = trainer_for(gradual(folder))
    frozen, thawed = (2, 2, 1), (1, 2)
    assert plan(made, 0) == [
        *(Dispatch(0, steps) for steps in frozen),
        *(Dispatch(1, steps) for steps in thawed),
    ]
    assert plan(made, THAW) == [Dispatch(1, steps) for steps in thawed]
    assert plan(made, 8) == []


def test_frozen_parameters_do_not_change_and_thaw_at_exactly_their_step(folder, run_steps):
    made = trainer_for(gradual(folder))
    state = made.start(0)
    first = arrays(state)
    for steps in (2, 2, 1):
        state, _ = run_steps(made, state, steps)
    assert changed(first, arrays(state)) == {"params/head", "ema/params/head"}
    state, _ = run_steps(made, made.enter_phase(state, 1), 1, phase=1)
    assert changed(first, arrays(state)) == {
        *("params/head", "params/stage3", "batch_stats/stage3"),
        *("ema/params/head", "ema/params/stage3", "ema/batch_stats/stage3"),
    }


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_thaw_preserves_the_optimizer_state_of_parameters_that_train_already(
    folder, run_steps, name
):
    overrides = {"optimizer__name": name}
    if name == "adam":
        overrides["optimizer__weight_decay"] = 0.0
    made = trainer_for(gradual(folder, **overrides))
    state, _ = run_steps(made, made.start(0), 2)
    thawed = made.enter_phase(state, 1)
    (before,), (existing, fresh) = (each.opt_state[0].inner for each in (state, thawed))
    jax.tree.map(np.testing.assert_array_equal, existing, before)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(existing))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(fresh))


def test_the_lines_of_a_run_say_when_it_thawed(finished):
    workdir, told = finished
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if line["split"] == "train"] == [2, 4, 5, 6, 8]
    assert "from step 0: 170 parameters train" in told
    assert re.search(r"from step 5: [\d,]+ parameters train", told)
    provenance = json.loads((workdir / "provenance.json").read_text())
    assert provenance["weights"]["source"] == {"file": "w"}
    assert len(provenance["weights"]["sha256"]) == 64


def test_of_frozen_parameters_the_optimiser_keeps_nothing(folder):
    made = trainer_for(gradual(folder))
    state = made.init(0)
    for phase, modules in ((0, {"head"}), (1, {"head", "stage3"})):
        now = made.enter_phase(state, phase)
        trained = {name: now.params[name] for name in modules}
        assert (
            sum(leaf.size for leaf in jax.tree.leaves(now.opt_state[0].inner))
            == sum(leaf.size for leaf in jax.tree.leaves(trained))
            == made.trainable_parameters(phase)
        )


def lowered(config):
    """The program of a step, not compiled."""
    made = trainer_for(config)
    arrays, _ = made.source.example_arrays()
    step = jax.jit(lambda state, arrays, *rest: made.train_step(0, arrays)(state, *rest))
    return step.lower(made.init(0), arrays, np.zeros((1, 16), np.int32), jax.random.key(0))


def convolutions(config):
    return len(re.findall("stablehlo.convolution", lowered(config).as_text()))


def test_of_frozen_parameters_no_gradient_is_computed(folder):
    forward = 7  # those of a ResNet-8 with shortcut A
    assert convolutions(gradual(folder)) == forward
    full = convolutions(configured(folder))
    last = convolutions(configured(folder, transfer__freeze="stem,stage1,stage2"))
    assert full == 3 * forward - 1  # that of the images
    assert last == forward + 2 * 2 - 1


def test_a_compiled_step_of_the_head_alone_takes_less_arithmetic_than_a_full_one(folder):
    def flops(config):
        return lowered(config).cost_analysis()["flops"]

    assert flops(gradual(folder)) < 0.45 * flops(configured(folder))


def test_batch_norm_of_frozen_layers_goes_on_if_it_is_asked_to(folder, run_steps):
    made = trainer_for(
        configured(folder, transfer__freeze="stem,stage1", transfer__frozen_norm="train")
    )
    before = made.start(0)
    first = arrays(before)
    moved = changed(first, arrays(run_steps(made, before, 1)[0]))
    assert {"batch_stats/stem", "batch_stats/stage1"} < moved
    assert not {"params/stem", "params/stage1"} & moved


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_a_layer_at_rest_normalises_as_in_evaluation_in_either_layout(loop, remat):
    fields = {"depth": 14, "width": 4, "loop": loop, "remat": remat}
    given = random_weights(depth=14)
    variables = scanned(given.variables) if loop == "scan" else given.variables
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    everywhere = build(fields, norm_options={"frozen": lambda path: True})
    training = {"train": True, "mutable": ["batch_stats"]}
    logits, moved = jit(partial(everywhere.apply, **training))(variables, images)
    evaluated = jit(build(fields).apply)(variables, images)
    np.testing.assert_allclose(logits, evaluated, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, moved["batch_stats"], variables["batch_stats"])
    seen = []
    seeing = build(fields, norm_options={"frozen": lambda path: bool(seen.append("/".join(path)))})
    jax.eval_shape(partial(seeing.apply, **training), variables, images)
    own = unrolled_paths(variables["batch_stats"])
    assert set(seen) == {path.rpartition("/")[0] for path in own}


@pytest.mark.parametrize("groups", [1, 2])
def test_a_frozen_layer_is_flax_s_in_evaluation_whatever_its_groups(groups):
    images = np.random.default_rng(0).normal(3, 2, (4, 2, 3, 5)).astype(np.float32)
    layer = BatchNorm(groups=groups, frozen=lambda path: True)
    variables = layer.clone(use_running_average=True).init(jax.random.key(0), images)
    variables["batch_stats"]["mean"] += 2
    trained, _ = layer.clone(use_running_average=False).apply(
        variables, images, mutable=["batch_stats"]
    )
    evaluated = layer.clone(use_running_average=True).apply(variables, images)
    np.testing.assert_allclose(trained, evaluated, rtol=1e-5, atol=1e-6)


def test_scanned_and_unrolled_networks_train_alike(tmp_path, run_steps):
    weights.save(random_weights(depth=14), tmp_path / "w")
    ends = {}
    for loop in ("unroll", "scan"):
        made = Trainer(configured(tmp_path / "w", transfer__freeze="stem,stage1", model__loop=loop))
        state, _ = run_steps(made, made.start(0), 3)
        ends[loop] = flatten(unrolled({"params": state.params, "batch_stats": state.batch_stats}))
    start = flatten(random_weights(depth=14).variables)
    for name, array in ends["scan"].items():
        np.testing.assert_allclose(array, ends["unroll"][name], rtol=1e-3, atol=1e-4)
        frozen = name.split("/")[1] in ("stem", "stage1")
        assert np.array_equal(array, start[name]) == frozen, name


# Going on.


class StopAfter(StopRequest):
    """Asks to stop after so many dispatches."""

    def __init__(self, dispatches):
        super().__init__()
        self._left = dispatches

    def requested(self):
        self._left -= 1
        if self._left == 0:
            self.signal = signal.SIGTERM
        return self._left <= 0


def found(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    state = states_of(workdir, [8])[8]
    return (
        {name: value for name, value in summary.items() if name not in TIMES},
        (workdir / "metrics.jsonl").read_bytes(),
        {name: array.tobytes() for name, array in arrays(state).items()},
    )


@pytest.mark.parametrize(("dispatches", "step"), [(2, 4), (3, THAW), (4, 6)])
def test_a_run_stopped_before_at_or_after_a_thaw_goes_on_bit_by_bit(
    folder, finished, tmp_path, dispatches, step
):
    config, workdir = gradual(folder), tmp_path / "run"
    with pytest.raises(Stopped):
        train(config, workdir, stop=StopAfter(dispatches))
    assert max(int(path.name) for path in (workdir / "checkpoints").iterdir()) == step
    assert not any(finding.damaged for finding in verify(workdir))
    assert evaluate(workdir)["step"] == step
    train(config, workdir)
    assert found(workdir) == found(finished[0])


def test_a_run_goes_on_from_a_checkpoint_of_another_phase_than_the_newest(
    folder, finished, tmp_path
):
    config, workdir = gradual(folder), tmp_path / "run"
    with pytest.raises(Stopped):
        train(config, workdir, stop=StopAfter(4))
    shutil.rmtree(workdir / "checkpoints" / "6")
    train(config, workdir)
    assert found(workdir) == found(finished[0])


def test_a_run_is_the_weights_of_another(finished):
    config = configured(finished[0], transfer__head="keep")
    state = states_of(finished[0], [8])[8]
    assert (config.model.depth, config.model.width) == (8, 4)
    start = Trainer(config).start(0)
    for own, averaged in ((start.params, "params"), (start.batch_stats, "batch_stats")):
        jax.tree.map(np.testing.assert_array_equal, own, state.ema[averaged])


def test_a_run_normalizes_images_with_the_statistics_of_the_run_it_starts_from(finished):
    first = Trainer(configured(None, data__normalization="pixel_mean")).statistics
    second = Trainer(configured(finished[0], data__normalization="weights")).statistics
    assert first.mean.shape == (8, 8, 1)
    np.testing.assert_array_equal(second.mean, first.mean)
    np.testing.assert_array_equal(second.std, first.std)


def test_a_run_may_be_named_by_a_relative_path(finished, monkeypatch):
    monkeypatch.chdir(finished[0].parent)
    near, far = load_weights(finished[0].name), load_weights(finished[0])
    jax.tree.map(np.testing.assert_array_equal, near.variables, far.variables)


# Rates.


@pytest.mark.parametrize("name", ["sgd", "lars", "lamb", "adamw"])
def test_every_stage_trains_at_its_factor_of_the_rate(name):
    random = np.random.default_rng(0)
    tree = {
        module: {"Conv_0": {"kernel": random.normal(size=(3, 3, 2, 2)).astype(np.float32)}}
        for module in ("stem", "stage1", "head")
    }
    gradients = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), tree)
    factors = {"stem/Conv_0/kernel": 0.01, "stage1/Conv_0/kernel": 0.1}

    def added(factors):
        made = optimizer.base_optimizer(Optimizer(name=name), factors)
        return made.update(gradients, made.init(tree), tree, rate=0.5)[0]

    plain, own = added({}), added(factors)
    for module, factor in (("stem", 0.01), ("stage1", 0.1), ("head", 1)):
        expected = factor * np.asarray(plain[module]["Conv_0"]["kernel"])
        np.testing.assert_allclose(own[module]["Conv_0"]["kernel"], expected, rtol=1e-5)
