"""A NaN in an image, a parameter or a running statistic reaches every result that depends on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resjax
from resjax.config import default_config, override, resolve
from resjax.data.normalization import Statistics
from resjax.inference.features import embedding
from resjax.inference.predict import classifier
from resjax.models.activation import relu
from resjax.tasks.classification import soft_top1_error, top1_error
from resjax.train.trainer import Dispatch, Trainer
from resjax.transfer.pixels import Preprocessing
from resjax.transfer.weights import Weights
from resjax.xla.compile_options import quick_compile, step_compile

NETWORKS = {
    "basic": {"family": "cifar", "depth": 8, "width": 4},
    "preactivation": {"family": "cifar", "depth": 8, "width": 4, "block": "preact_basic"},
    "bottleneck with gates": {
        **{"family": "cifar", "depth": 11, "width": 4, "block": "bottleneck", "stem": "deep"},
        **{"block_options": {"se_reduction": 4}, "shortcut": "project_avg"},
    },
    "no norm": {"family": "cifar", "depth": 8, "width": 4, "norm": "none"},
    "group norm": {"family": "cifar", "depth": 8, "width": 32, "norm": "group", "stem": "bit"},
}
IMAGES = np.random.default_rng(0).normal(size=(16, 16, 16, 3)).astype(np.float32)


def paths_and_broken(variables, value=np.nan):
    """Each array's path, and the variables with one element of that array replaced."""
    leaves, structure = jax.tree.flatten(variables)
    for index, (path, _) in enumerate(jax.tree.leaves_with_path(variables)):
        changed = [np.array(leaf) for leaf in leaves]
        changed[index].flat[changed[index].size // 2] = value
        yield jax.tree_util.keystr(path), jax.tree.unflatten(structure, changed)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_pass_on_nan_whatever_compiles_them(name, default_compile):
    model = resjax.build(NETWORKS[name], classes=3)
    variables = jax.jit(model.init, compiler_options=quick_compile())(jax.random.key(0), IMAGES)
    for options in (default_compile, step_compile()):
        logits = jax.jit(model.apply, compiler_options=options)
        assert np.isfinite(logits(variables, IMAGES)).all()
        for path, broken in paths_and_broken(variables):
            assert np.isnan(logits(broken, IMAGES)).any(1).all(), path
        images = IMAGES.copy()
        images[1, 8, 8, 1] = np.nan
        found = logits(variables, images)
        assert np.isfinite(np.delete(found, 1, 0)).all()
        assert np.isnan(found[1]).all()


def test_relu_is_that_of_jax_with_its_gradient():
    values = jnp.asarray([-jnp.inf, -2.0, -0.0, 0.0, 1e-30, 3.0, jnp.inf])
    np.testing.assert_array_equal(relu(values), jax.nn.relu(values))
    for dtype in (jnp.float32, jnp.bfloat16):
        slopes = [
            jax.vjp(f, values.astype(dtype))[1](jnp.ones(7, dtype)) for f in (relu, jax.nn.relu)
        ]
        np.testing.assert_array_equal(*slopes)


@pytest.fixture(scope="module")
def trainer(compile_as_users):  # compile options decide what becomes of NaN
    fields = {
        **{"model.family": "cifar", "model.depth": 8, "model.width": 4, "train.steps": 1},
        **{"data.batch_size": 64, "train.nonfinite": "record", "optimizer.ema_decay": 0.5},
    }
    return Trainer(resolve(override(default_config(), fields)))


@pytest.fixture(scope="module")
def state(trainer):
    return trainer.init(0)


def with_variables(state, variables):
    copied = jax.tree.map(jnp.array, state)  # because a dispatch donates its state
    return copied._replace(**jax.tree.map(jnp.array, variables))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_training_step_has_no_finite_loss_with_a_parameter_that_is_not(trainer, state, value):
    arrays = trainer.source.example_arrays()[0]
    take_step = trainer.compile_dispatch(state, Dispatch(0, 1)).call
    for path, params in paths_and_broken(state.params, value):
        if np.isnan(value) or path.endswith("['kernel']"):  # relu maps a bias of -inf to 0
            _, metrics = take_step(with_variables(state, {"params": params}), arrays)
            assert not np.isfinite(trainer.metric_values(metrics)["loss"]), path
    for path, stats in paths_and_broken(state.batch_stats):
        new, _ = take_step(with_variables(state, {"batch_stats": stats}), arrays)
        assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(new.batch_stats)), path


def test_an_evaluation_has_no_finite_loss_with_an_array_that_is_not(trainer, state):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    for path, broken in paths_and_broken(variables):
        metrics = trainer.metric_values(trainer.evaluate(with_variables(state, broken)))
        assert np.isnan(metrics["loss"]), path
        assert np.isfinite(metrics["ema_loss"])
        assert not metrics["error"] < 1, path


def test_predictions_and_features_are_nan_with_an_array_that_is(state):
    model = {"family": "cifar", "depth": 8, "width": 4, "classes": 10}
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
    weights = Weights(
        model=model,
        variables=resjax.models.layout.unrolled(variables),
        statistics=Statistics(np.float32(0.5), np.float32(1)),
        preprocessing=Preprocessing(size=8, shorter_side=8, channels=1),
        class_names=(),
        source={},
    )
    for program in (classifier(weights), embedding(weights)):
        function, (device_variables,) = program.func, program.args
        for path, broken in paths_and_broken(device_variables):
            if "head" not in path or program.func.__name__ == "probabilities":
                assert np.isnan(function(broken, images)).any(1).all(), path


def test_an_image_with_a_logit_of_nan_is_an_error():
    logits = jnp.asarray([[np.nan] * 3, [0, np.nan, 1], [3, 0, 1]])
    np.testing.assert_array_equal(top1_error(logits, jnp.asarray([0, 1, 0])), [1, 1, 0])
    targets = jnp.asarray([[1.0, 0, 0], [0, 1, 0], [0.75, 0.25, 0]])
    np.testing.assert_array_equal(soft_top1_error(logits, targets), [1, 1, 0.25])
