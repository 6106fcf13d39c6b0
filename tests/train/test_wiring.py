"""Every option of a config reaches the step that the trainer composes, and each step draws anew.

The parts are tested elsewhere; here a network records what the step hands to it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import resjax
from resjax.config import to_dict
from resjax.config.schema import FIELDS
from resjax.errors import UserError
from resjax.train.identity import require_compatible
from resjax.train.trainer import Dispatch, StepRunner
from resjax.xla.compile_options import quick_compile

BATCH = 16


class Layers(nn.Module):
    """Dense layers with the names of a network's, so that patterns and rates by stage apply."""

    classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(len(images), -1)
        for name, width in (("stem", 6), ("stage1", 6), ("stage2", 6), ("head", self.classes)):
            x = nn.Dense(width, kernel_init=nn.initializers.normal(0.3), name=name)(x)
        return x


class Recorder(Layers):
    """Keeps the images of the last batch, and a draw per image, as running statistics."""

    @nn.compact
    def __call__(self, images, train=False):
        seen = self.variable("batch_stats", "images", jnp.zeros, (BATCH, *images.shape[1:]))
        drawn = self.variable("batch_stats", "draws", jnp.zeros, BATCH)
        if train and self.has_rng("dropout"):
            seen.value = images
            drawn.value = jax.random.uniform(self.make_rng("dropout"), (BATCH,))
        return Layers(self.classes)(images)


@pytest.fixture
def equal_images(tmp_path):
    """A dataset of one image, many times, so that only augmentation makes images differ."""
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    images, labels = np.stack([image] * 64), np.arange(64) % 4
    np.savez(tmp_path / "equal.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return f"npz:{tmp_path / 'equal.npz'}"


def steps_of(trainer, count, seed=0):
    """The state after each of some steps, taken one by one."""
    state = trainer.init(seed)
    with StepRunner(trainer, seed, 0) as runner:
        for _ in range(count):
            state, _ = runner.run(state, Dispatch(0, 1))
            yield jax.tree.map(np.asarray, state._replace(key=()))


@pytest.mark.parametrize("feed", ["device", "stream"])
def test_every_image_of_every_step_is_augmented_with_draws_of_its_own(
    with_network, equal_images, feed
):
    fields = {"data.name": equal_images, "data.feed": feed, "data.workers": 0}
    augmented = {"data.crop_padding": 3, "data.flip": True}
    first, second = (
        state.batch_stats for state in steps_of(with_network(Recorder, **fields, **augmented), 2)
    )
    for images in (first["images"], second["images"]):
        assert len({image.tobytes() for image in images}) > BATCH / 2
    assert not np.array_equal(first["images"], second["images"])
    for draws in (first["draws"], second["draws"]):
        assert len(set(draws.tolist())) == BATCH
    assert not set(first["draws"].tolist()) & set(second["draws"].tolist())


def test_a_dispatch_of_three_steps_draws_as_three_dispatches(with_network, equal_images):
    fields = {"data.name": equal_images, "data.crop_padding": 3}
    trainer = with_network(Recorder, **fields)
    *_, one_by_one = steps_of(trainer, 3)
    state = trainer.init(0)
    with StepRunner(trainer, 0, 0) as runner:
        state, _ = runner.run(state, Dispatch(0, 3))
    for name in ("images", "draws"):
        np.testing.assert_allclose(
            state.batch_stats[name], one_by_one.batch_stats[name], rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("feed", ["device", "stream"])
def test_the_order_of_the_images_depends_on_the_seed(with_network, feed):
    trainer = with_network(Recorder, **{"data.feed": feed, "data.workers": 0})
    (first,), (second,), (again,) = (
        [state.batch_stats["images"] for state in steps_of(trainer, 1, seed)] for seed in (3, 4, 3)
    )
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, again)


# By field, a value that changes the parameters after three steps, and what must be set beside it.
CHANGES = {
    "seed": (1, {}),
    "data.classes": ((1, 2, 3), {}),
    "data.per_class": (8, {}),
    "data.subset_seed": (1, {"data.per_class": 8}),
    "data.crop_padding": (2, {}),
    "data.flip": (True, {}),
    "data.color_jitter": ((0.4, 0.4, 0.4), {}),
    "data.pca_lighting": (0.5, {}),
    "data.trivial_augment": (True, {}),
    "data.cutout": (3, {}),
    "data.random_erasing": (0.9, {}),
    "data.mixup": (1.0, {}),
    "data.cutmix": (1.0, {}),
    "data.normalization": ("channel", {}),
    "task.options": ({"label_smoothing": 0.1}, {}),
    "optimizer.name": ("adamw", {}),
    "optimizer.options": ({"b1": 0.5}, {"optimizer.name": "lion"}),
    "optimizer.learning_rate": (0.2, {}),
    "optimizer.momentum": (0.5, {}),
    "optimizer.nesterov": (True, {}),
    "optimizer.beta2": (0.9, {"optimizer.name": "adamw"}),
    "optimizer.weight_decay": (0.1, {}),
    "optimizer.weight_decay_on": ("kernels", {"optimizer.weight_decay": 0.1}),
    "optimizer.schedule": ("cosine", {}),
    "optimizer.boundaries": ((0.3, 0.9), {}),
    "optimizer.decay_factor": (0.5, {}),
    "optimizer.warmup_steps": (2, {}),
    "optimizer.clip_norm": (0.01, {}),
    "transfer.freeze": ("stage1", {}),
    "transfer.thaw": ({"stage1": 100.0}, {}),
    "transfer.layer_decay": (0.5, {}),
    "transfer.first_rate": (0.001, {}),
}
# By field of the model, a value that builds another network, and what must be set beside it.
MODEL = {
    "depth": (20, {}),
    "block": ("preact_basic", {}),
    "block_options": ({"se_reduction": 2}, {}),
    "shortcut": ("project_all", {}),
    "shortcut_options": ({"factor": 0.25}, {"shortcut": "scale"}),
    "width": (8, {}),
    "widen": (2, {}),
    "stem": ("imagenet", {}),
    "stem_pool": ("average", {"stem": "imagenet"}),
    "dilated_stages": (1, {"block": "bottleneck", "depth": 11}),
    "norm": ("group", {}),
    "standardize": (True, {}),
    "loop": ("scan", {}),
    "dtype": ("bfloat16", {}),
    "zero_init_residual": (True, {}),
    "stochastic_depth": (0.3, {}),
    "branch_scale": ("1/L", {}),
    "bn_momentum": (0.5, {}),
    "bn_epsilon": (1e-3, {}),
    "bn_unbiased": (True, {}),
    "remat": (True, {}),
}
# Fields whose effect is tested elsewhere, or that have none on the parameters.
ELSEWHERE = {
    "model": "name family",
    "data": "name train_split test_split batch_size eval_batch_size feed workers image_size "
    "on_bad_image train_crop eval_crop",
    "task": "name",
    "train": "steps log_every eval_every evaluate_train checkpoint_every nonfinite "
    "accumulation_steps",
    "optimizer": "schedule_options ema_decay",
    "transfer": "weights head frozen_norm",
    "diagnostics": "every names layers options",
    "parallel": "backend shard_parameters bn_devices",
}


def test_every_field_of_the_config_is_in_a_table_of_this_file():
    tables = [
        *CHANGES,
        *(f"model.{name}" for name in MODEL),
        *(f"{section}.{name}" for section, names in ELSEWHERE.items() for name in names.split()),
        *("sweep", "track"),
    ]
    assert sorted(tables) == sorted(FIELDS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (96, 8, 8, 3), np.uint8), np.arange(96) % 4
    path = tmp_path_factory.mktemp("data") / "random.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return f"npz:{path}"


@pytest.fixture(scope="module")
def known():
    """The parameters after three steps, by what was set."""
    return {}


@pytest.mark.parametrize("field", CHANGES)
def test_an_option_changes_the_parameters(with_network, dataset, known, field):
    value, beside = CHANGES[field]

    def trained(fields):
        trainer = with_network(Layers, **{"train.steps": 4, "data.name": dataset, **fields})
        take_steps = jax.jit(
            partial(trainer._take_steps, phase=0, steps=3), compiler_options=quick_compile()
        )
        state = trainer.init(trainer.config.seed)
        state, _ = take_steps(state, trainer.source.example_arrays()[0])
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])

    if str(beside) not in known:
        known[str(beside)] = trained(beside)
    changed, usual = trained({**beside, field: value}), known[str(beside)]
    assert changed.shape != usual.shape or not np.allclose(changed, usual, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODEL)
def test_a_field_of_the_model_changes_the_network(configure, name):
    value, beside = MODEL[name]
    fields = {f"model.{other}": given for other, given in beside.items()}
    usual, changed = (
        repr(resjax.build(configure(fields | more).model))
        for more in ({}, {f"model.{name}": value})
    )
    assert usual != changed


def test_a_run_continues_under_no_other_field_that_changes_results(configure, dataset, tmp_path):
    base = {"data.name": dataset, "data.crop_padding": 0, "data.flip": False}
    saved = to_dict(configure(base))
    for field, (value, beside) in CHANGES.items():
        config = configure({**base, **beside, field: value})
        with pytest.raises(UserError, match=field):
            require_compatible(saved, config, tmp_path)
    for name, (value, beside) in MODEL.items():
        fields = {f"model.{other}": given for other, given in {**beside, name: value}.items()}
        with pytest.raises(UserError, match=f"model.{name}"):
            require_compatible(saved, configure(base | fields), tmp_path)
