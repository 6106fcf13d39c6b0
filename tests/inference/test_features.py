"""Embeddings: what they are, and that files give them back."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import resjax
from resjax.cli import main
from resjax.data import datasets
from resjax.data.normalization import normalize
from resjax.errors import UserError
from resjax.inference.features import (
    Features,
    features,
    load_features,
    of_dataset,
    of_files,
    save_features,
)


def same(one, other):
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_array_equal(one.labels, other.labels)
    return one.origins == other.origins and one.class_names == other.class_names


@pytest.mark.parametrize(("stage", "name"), [(None, "stage3"), ("stage1", "stage1")])
def test_features_are_the_means_of_a_stage(run, weights, stage, name):
    found = features(weights, of_dataset("digits", "test"), stage, batch_size=100)
    test = datasets.load("digits").test
    images, labels = test.images, test.labels
    model, variables = resjax.load_pretrained(run)
    every = model.apply(variables, normalize(images[:5], weights.statistics), method="features")
    np.testing.assert_allclose(found.values[:5], every[name].mean((1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.class_names == tuple("0123456789")
    assert found.origins[:2] == ("digits test[0]", "digits test[1]")


def test_files_and_their_dataset_have_the_same_features(weights, digits):
    files = features(weights, of_files(digits[0][:40]))
    part = features(weights, of_dataset("digits", "test[:40]"))
    np.testing.assert_array_equal(files.values, part.values)
    assert files.labels is None
    assert files.origins == tuple(map(str, digits[0][:40]))


def test_grayscale_images_are_converted_for_an_rgb_network(weights, tmp_path, photos):
    for mode in ("RGB", "L"):
        Image.fromarray(photos[0]).convert(mode).save(tmp_path / f"{mode}.png")
    assert features(weights, of_files([tmp_path])).values.shape == (2, 16)


def test_an_unknown_stage_is_refused_with_the_known_ones(weights):
    with pytest.raises(UserError, match=r"the network has stem, stage1, stage2, stage3"):
        features(weights, of_dataset("digits", "test"), "stage33")


def test_unknown_data_are_one_line():
    for name, split in (("digist", "test"), ("digits", "validation")):
        with pytest.raises(UserError):
            of_dataset(name, split)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
@pytest.mark.parametrize("labelled", [True, False])
def test_saved_features_are_loaded_unchanged(tmp_path, suffix, labelled):
    values = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    found = Features(values, ("a.png", "b é.png", "c.png"))
    if labelled:  # and a class without an image
        labels = np.array([2, 0, 2], np.int32)
        found = found._replace(labels=labels, class_names=("x", "y", "z"))
    save_features(found, tmp_path / f"found{suffix}")
    loaded = load_features(tmp_path / f"found{suffix}")
    assert same(loaded, found)
    assert loaded.values.dtype == np.float32


def test_pandas_reads_the_parquet_file(tmp_path):
    values, labels = np.arange(4, dtype=np.float32).reshape(2, 2), np.array([1, 0], np.int32)
    save_features(Features(values, ("a", "b"), labels, ("cat", "dog")), tmp_path / "f.parquet")
    frame = pd.read_parquet(tmp_path / "f.parquet")
    np.testing.assert_array_equal(np.stack(frame["features"]), values)
    assert frame["class"].tolist() == ["dog", "cat"]


REFUSED = "is not a file of `resjax features`|damaged zip archive"


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_file_with_other_content_is_one_line(tmp_path, suffix):
    path = tmp_path / f"f{suffix}"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_features(path)
    for content in (b"", b"no features at all"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=REFUSED):
            load_features(path)
    save_features(Features(np.ones((3, 2), np.float32), ("a", "b", "c")), path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=REFUSED):
        load_features(path)
    other = {"x": [1, 2]}
    if suffix == ".npz":
        np.savez(path, **other)
    else:
        pd.DataFrame(other).to_parquet(path)
    with pytest.raises(UserError, match="is not a file of `resjax features`"):
        load_features(path)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (Features(np.ones((2, 2), np.float32), ("a", "b"), np.array([0, 2]), ("x", "y")), "beyond"),
        (
            Features(np.ones((2, 2), np.float32), ("a", "b"), np.array([0, -1]), ("x", "y")),
            "beyond",
        ),
        (Features(np.ones((2, 2), np.int64), ("a", "b")), "one row of numbers per image"),
    ],
)
def test_features_that_contradict_themselves_are_refused(found, told, tmp_path):
    save_features(found, tmp_path / "f.npz")
    with pytest.raises(UserError, match=told):
        load_features(tmp_path / "f.npz")


def test_the_command_writes_features(run, digits, tmp_path, capsys):
    typed = ["features", f"--checkpoint={run}", f"--out={tmp_path / 'new' / 'f.parquet'}"]
    assert main([*typed, "--data=digits", "--split=test[:50]", "--stage=stage2"]) == 0
    assert "50 images, 8 values" in capsys.readouterr().out
    assert load_features(tmp_path / "new" / "f.parquet").values.shape == (50, 8)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("--out=f.txt", "x.png"), "must end in .npz or .parquet"),
        (("--out=f.npz",), "needs either images or --data=NAME"),
        (("--out=f.npz", "x.png", "--data=digits"), "needs either images or --data=NAME"),
        (("--out=f.npz", "x.png", "--split=test"), "--split=test needs --data=NAME"),
        (("--out=f.npz", "x.png"), "x.png: cannot be read: No such file"),
    ],
)
def test_a_mistake_is_refused_before_weights_are_read(typed, message, capsys):
    assert main(["features", "--checkpoint=.", *typed]) == 2
    assert message in capsys.readouterr().err
