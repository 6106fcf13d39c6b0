"""A finished run is opened again as it was trained, or refused in one line."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from resjax.data import datasets
from resjax.errors import UserError
from resjax.measurements import FinishedRun
from resjax.run_files import checkpoint_digest, read_summary
from resjax.train.parallel import make_backend
from resjax.train.sources import make_source


def test_a_run_is_evaluated_as_it_was_in_training(run, run_folder):
    summary = read_summary(run_folder / "summary.json")
    assert run.step == 2
    for split, name in (("test", "test"), ("train", "train_set")):
        found = run.evaluate(split=split)
        assert found["loss"] == pytest.approx(summary[f"{name}_loss"], rel=1e-5)
        assert found["error"] == pytest.approx(summary[f"{name}_error"], abs=1e-7)


def test_the_moving_average_is_restored_too(run, run_folder):
    summary = read_summary(run_folder / "summary.json")
    loss = run.evaluate(run.ema)["loss"]
    assert loss == pytest.approx(summary["test_ema_loss"], rel=1e-5)


def test_batches_are_the_examples_in_order_with_weights_for_those_that_fill_the_last(run):
    labels = datasets.load("digits").test.labels
    batches = list(run.batches("test"))
    assert len({batch["image"].shape for batch in batches}) == 1
    found = np.concatenate([batch["label"][batch["weight"] > 0] for batch in batches])
    np.testing.assert_array_equal(found, labels)
    size = len(batches[0]["label"])
    assert 0 <= len(batches) * size - len(labels) < size


def test_some_examples_are_spread_over_the_split(run):
    labels = datasets.load("digits").train.labels
    [batch] = run.batches("train", 10)
    np.testing.assert_array_equal(batch["label"], labels[np.arange(10) * len(labels) // 10])


def test_a_streamed_dataset_is_read_as_one_on_the_device(run):
    streamed = replace(run.config, data=replace(run.config.data, feed="stream", workers=0))
    sources = [make_source(each, make_backend(each)) for each in (run.config, streamed)]
    for split in ("train", "test"):
        read = [list(source.read(split, 300)) for source in sources]
        jax.tree.map(np.testing.assert_array_equal, *read)


def test_an_unknown_split_is_refused(run):
    with pytest.raises(UserError, match="split 'val': name train or test"):
        run.evaluate(split="val")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "it has no checkpoint of step 2; copy"),
        (lambda run: (run / "summary.json").unlink(), "it is not a finished run"),
        (
            lambda run: (run / "diverged.json").write_text('{"step": 1, "reason": "NaN"}'),
            "it diverged at step 1: NaN",
        ),
        (
            lambda run: next(run.glob("checkpoints/2/state/d/*")).write_bytes(b""),
            "has no intact checkpoint",
        ),
    ],
)
def test_a_run_that_cannot_be_measured_is_refused_in_one_line(run_folder, tmp_path, spoil, message):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    spoil(folder)
    with pytest.raises(UserError, match=message) as refused:
        FinishedRun(folder, warn=lambda _: None)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


def test_the_checkpoint_is_named_by_its_digest(run, run_folder):
    assert run.checkpoint == checkpoint_digest(run_folder, 2) != ""
