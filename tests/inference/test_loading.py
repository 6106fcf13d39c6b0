"""Weights from whatever holds them, and networks that are ready to use."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

import resjax
from resjax.cli import main
from resjax.data import datasets
from resjax.data.normalization import normalize
from resjax.errors import UserError
from resjax.inference.predict import classifier
from resjax.models.layout import unrolled
from resjax.run_files import is_run_folder
from resjax.train.checkpoint_reader import CheckpointReader
from resjax.train.load_weights import load_weights
from resjax.transfer.weights import flatten, save, unflatten
from resjax.xla.compile_options import quick_compile


def test_a_run_and_its_weights_folder_are_the_same_bit_for_bit(run, weights, tmp_path):
    save(weights, tmp_path)
    for source in (run, tmp_path, str(tmp_path)):
        found = load_weights(source)
        arrays, expected = flatten(found.variables), flatten(weights.variables)
        assert arrays.keys() == expected.keys()
        assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
        for name in ("model", "preprocessing", "class_names", "source"):
            assert getattr(found, name) == getattr(weights, name)


def test_a_run_is_read_without_its_dataset(run, weights, monkeypatch):
    monkeypatch.setattr(datasets, "load", None)
    found = load_weights(run)
    assert found.class_names == tuple("0123456789")
    assert found.statistics.mean.shape == (8, 8, 1)
    assert found.statistics.mean.any()


def test_a_run_whose_checkpoints_do_not_describe_it_is_described_by_its_dataset(run, monkeypatch):
    expected, restore = load_weights(run), CheckpointReader.restore_selected

    def without_description(*arguments):
        restored = restore(*arguments)
        del restored.record["weights"]
        return restored

    monkeypatch.setattr(CheckpointReader, "restore_selected", without_description)
    found = load_weights(run)
    jax.tree.map(np.testing.assert_array_equal, found.statistics, expected.statistics)
    for name in ("model", "preprocessing", "class_names", "source"):
        assert getattr(found, name) == getattr(expected, name)


NOT_FINITE = "batch_stats/stem/BatchNorm_0/var is not finite (1 of 4 values)"
NEGATIVE = "batch_stats/stem/BatchNorm_0/var is a variance and has negative values"


@pytest.mark.parametrize(("value", "fault"), [(np.nan, NOT_FINITE), (-1.0, NEGATIVE)])
@pytest.mark.parametrize(
    "command",
    [
        "import {weights} --out={out}/w",
        "predict --checkpoint={weights} {image}",
        "features --checkpoint={weights} {image} --out={out}/f.npz",
        "export {weights} --format=torchvision --out={out}/w.safetensors",
        "export {weights} --format=stablehlo --out={out}/program",
        "verify {weights}",
    ],
)
def test_one_bad_number_is_named_by_every_command(
    command, value, fault, weights, digits, tmp_path, capsys
):
    arrays = flatten(weights.variables)
    arrays["batch_stats/stem/BatchNorm_0/var"] = np.array([1, value, 1, 1], np.float32)
    save(replace(weights, variables=unflatten(arrays)), tmp_path / "bad")
    given = {"weights": tmp_path / "bad", "image": digits[0][0], "out": tmp_path}
    typed = command.format(**given).split()
    assert main(typed) == (1 if typed[0] == "verify" else 2)
    assert fault in "".join(capsys.readouterr())
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_variables_have_the_layout_of_the_loop(weights, tmp_path, loop):
    deep = replace(weights, model={**weights.model, "depth": 14})
    init = jax.jit(deep.network(loop="unroll").init, compiler_options=quick_compile())
    drawn = init(jax.random.key(0), np.zeros((1, 8, 8, 1)))
    save(replace(deep, variables=jax.device_get(drawn)), tmp_path)
    model, variables = resjax.load_pretrained(tmp_path, loop=loop)
    assert ("blocks" in variables["params"]["stage1"]) == (loop == "scan")
    jax.tree.map(np.testing.assert_array_equal, unrolled(variables), drawn)
    assert jax.eval_shape(model.apply, variables, np.zeros((2, 8, 8, 1))).shape == (2, 10)


def test_a_loaded_network_has_the_outputs_of_the_run(run, weights, digits):
    model, variables = resjax.load_pretrained(run)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    logits = model.apply(variables, normalize(images, weights.statistics))
    expected = classifier(weights)(images)
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, rtol=1e-4)


def test_the_selected_checkpoint_is_loaded(run):
    assert load_weights(run, "40").source["step"] == 40
    with pytest.raises(UserError, match="has no checkpoint of step 7; it has: "):
        load_weights(run, "7")


def test_another_number_of_classes_gets_a_new_head(run):
    old, _ = resjax.load_pretrained(run, classes=10)
    model, variables = resjax.load_pretrained(run, classes=3)
    assert (old.head.features, model.head.features) == (10, 3)
    assert jax.eval_shape(model.apply, variables, np.zeros((2, 8, 8, 1))).shape == (2, 3)


def test_a_backbone_has_features_and_no_classes(run):
    model, variables = resjax.load_pretrained(run, backbone=True, channels=3)
    assert "head" not in variables["params"]
    apply = partial(model.apply, method="features")
    stages = jax.eval_shape(apply, variables, np.zeros((2, 8, 8, 3)))
    assert stages["stage3"].shape == (2, 2, 2, 16)
    with pytest.raises(UserError, match="a backbone has no classes"):
        resjax.load_pretrained(run, backbone=True, classes=3)


def test_a_hugging_face_folder_is_not_a_run(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert not is_run_folder(tmp_path)
    assert is_run_folder(run)


def test_a_run_of_images_that_are_not_square_is_refused(train_small, tmp_path):
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (10, 6, 8), np.uint8), np.arange(10) % 2
    np.savez(tmp_path / "wide.npz", images=images, labels=labels)
    run = train_small(
        tmp_path / "run",
        data__name=f"npz:{tmp_path / 'wide.npz'}",
        data__batch_size=8,
        train__steps=1,
        train__log_every=1,
        train__eval_every=1,
        train__checkpoint_every=1,
    )
    with pytest.raises(UserError, match="images that are not square"):
        load_weights(run)


def test_a_deeper_network_copies_what_fits_and_reports_the_rest(run, weights):
    told = []
    model, variables = resjax.load_pretrained(run, depth=14, loop="unroll", warn=told.append)
    assert model.stages == (2, 2, 2)
    taken = flatten(weights.variables)
    for path, array in flatten(variables).items():
        assert (path in taken) == ("block2" not in path)
        if path in taken:
            np.testing.assert_array_equal(array, taken[path])
    (line,) = told
    assert f"{len(taken)} arrays copied; " in line
    assert "new: " in line
