"""Resident and streamed data: which is chosen, that both train the same, and what is refused."""

import json
import os

import jax
import numpy as np
import pytest
from PIL import Image

from resjax.errors import UserError
from resjax.train import sources
from resjax.train.loop import train
from resjax.train.parallel import make_backend
from resjax.xla.compile_options import quick_compile

STREAM = {"data.feed": "stream", "data.workers": 0}


@pytest.fixture
def photos(tmp_path):
    """A folder of 24 images in two classes, of several sizes above 20 pixels."""
    generator = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "photos" / ("cat" if number % 2 else "dog") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (21 + number, 30, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "photos"


@pytest.fixture
def cropped(photos):
    """Overrides for a run on the photos."""
    return {
        "data.name": f"folder:{photos}",
        "data.image_size": 16,
        "data.batch_size": 8,
        "train.steps": 4,
        "train.log_every": 1,
        "train.eval_every": 2,
        "train.checkpoint_every": 2,
        "data.workers": 0,
    }


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def source_of(config):
    return sources.make_source(config, make_backend(config))


def test_a_small_dataset_is_resident_and_a_large_one_is_streamed(configure, monkeypatch):
    config = configure({"data.workers": 0})
    assert not source_of(config).streamed
    monkeypatch.setattr(sources, "device_memory", lambda: 4 * 1797 * 64 - 1)
    assert source_of(config).streamed
    monkeypatch.setattr(sources, "device_memory", lambda: 4 * 1797 * 64)
    assert not source_of(config).streamed


def test_of_a_subset_only_its_examples_are_on_the_device(configure):
    few = {"data.classes": (7, 3), "data.per_class": 4, "data.batch_size": 8}
    source = source_of(configure(few))
    assert source.examples == {"train": 8, "test": 73}
    assert source.info.class_names == ("7", "3")
    train, _ = source.example_arrays()
    assert np.bincount(train["label"]).tolist() == [4, 4]


def test_a_batch_that_is_larger_than_the_training_split_is_refused(configure, tmp_path):
    few = {"data.classes": (0, 1), "data.per_class": 5}
    size, unit = {"data.batch_size": 100_000}, {"train.accumulation_steps": 4}
    for fields, message in [
        (
            size,
            "data.batch_size=100000 is larger than the training split of digits, 1,437 images; "
            "the largest batch is 1437",
        ),
        (
            few,
            "data.batch_size=16 is larger than the training split of digits, 10 images after "
            "data.classes and data.per_class; the largest batch is 10",
        ),
        (few | unit, "the largest batch is 8"),
        (STREAM | size, "the training split of digits, 1,437 images; "),
    ]:
        with pytest.raises(UserError) as refusal:
            train(configure(fields), tmp_path / "run")
        assert message in str(refusal.value)
    assert not (tmp_path / "run").exists()
    assert source_of(configure(few | {"data.batch_size": 10})).examples["train"] == 10


def test_an_evaluation_batch_is_never_larger_than_the_test_split(configure):
    source = source_of(configure(STREAM | {"data.eval_batch_size": 100_000}))
    _, arrays = source.example_arrays()
    assert arrays["image"].shape == (1, 360, 8, 8, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.classes": (3, 10)}, "digits has no class 10, only 0, 1, 2"),
        ({"data.per_class": 143}, "data.per_class=143: class '2' has 142 training examples"),
        ({"data.per_class": 5} | STREAM, "cannot choose from digits as a stream"),
    ],
)
def test_a_subset_that_does_not_exist_is_refused(configure, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train(configure(overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_that_are_cropped_at_random_on_the_host_are_streamed(configure, cropped):
    cropped |= {"data.train_crop": "random_resized"}
    assert source_of(configure(cropped)).streamed


@pytest.mark.parametrize("split", ["train", "test"])
def test_streamed_and_resident_data_have_the_same_evaluation(regression, split):
    resident, streamed = regression(), regression(**STREAM)
    state = resident.init(0)
    found, expected = (
        each.metric_values(each.evaluate(state, split)) for each in (streamed, resident)
    )
    assert found["error"] == pytest.approx(expected["error"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.usefixtures("regression")
def test_a_resumed_stream_yields_the_batches_of_an_uninterrupted_one(configure, cropped, tmp_path):
    config = configure(cropped | {"data.train_crop": "scale_jitter"})
    train(config, tmp_path / "whole")

    def interrupt(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", interrupt)
    train(config, tmp_path / "parts")
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


@pytest.mark.usefixtures("regression")
def test_worker_processes_make_the_same_batches_as_this_process(configure, cropped, tmp_path):
    cropped |= {"data.train_crop": "random_resized"}
    train(configure(cropped), tmp_path / "thread")
    train(configure(cropped | {"data.workers": 2}), tmp_path / "processes")
    assert lines(tmp_path / "thread") == lines(tmp_path / "processes")


def test_the_evaluation_of_ten_crops_uses_their_mean_logits(regression, cropped):
    trainer = regression(**cropped, **{"data.eval_crop": "ten", "data.eval_batch_size": 4})
    state = trainer.init(0)
    found = trainer.metric_values(trainer.evaluate(state))
    apply = jax.jit(trainer.model.apply, compiler_options=quick_compile())
    losses, count = 0.0, 0
    for batch in trainer.source.evaluation():
        arrays = (batch[name][0] for name in ("image", "label", "weight"))
        for ten, label, weight in zip(*arrays, strict=True):
            normal = (ten / 255 - trainer.statistics.mean) / trainer.statistics.std
            logits = apply(state.variables, normal).mean(0)
            losses -= weight * jax.nn.log_softmax(logits)[label]
            count += weight
    assert ten.shape == (10, 16, 16, 3)
    assert count == 24 // 5  # the test split is a fifth
    assert found["loss"] == pytest.approx(float(losses / count), rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.image_size": None}, "its images may differ in size; set data.image_size"),
        (
            {"data.feed": "device", "data.train_crop": "random_resized"},
            "data.train_crop=random_resized needs data.feed=stream",
        ),
        ({"data.feed": "device", "data.eval_crop": "ten"}, "data.eval_crop=ten needs"),
    ],
)
def test_fields_that_exclude_each_other_are_refused(
    configure, cropped, tmp_path, overrides, message
):
    with pytest.raises(UserError, match=message):
        train(configure(cropped | overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("regression")
@pytest.mark.parametrize("feed", ["stream", "device"])
def test_a_bad_image_ends_the_run_or_is_skipped_and_counted(
    configure, cropped, photos, tmp_path, feed
):
    bad = photos / "cat" / "11.png"
    os.truncate(bad, 100)
    cropped |= {"data.feed": feed}
    with pytest.raises(UserError, match=rf"^{bad}.*decoded"):
        train(configure(cropped), tmp_path / "strict")
    summary = train(configure(cropped | {"data.on_bad_image": "skip"}), tmp_path / "lenient")
    assert summary["skipped_images"] > 0


def test_the_statistics_of_a_prepared_set_are_computed_once(
    configure, cropped, tmp_path, write_images, noise, monkeypatch
):
    write_images(train=noise(40, (20, 20, 3)), test=noise(9, (20, 20, 3)), shape=(20, 20, 3))
    config = configure(cropped | {"data.name": "tfds:shapes", "data.feed": "stream"})
    first = source_of(config).statistics
    monkeypatch.setattr(sources.Streamed, "_sample", lambda self: 1 / 0)
    again = source_of(config).statistics
    np.testing.assert_array_equal(first.mean, again.mean)
    assert again.mean.shape == (16, 16, 3)
    with pytest.raises(ZeroDivisionError):  # another size has other statistics
        source_of(
            configure(
                cropped | {"data.name": "tfds:shapes", "data.image_size": 12, "data.feed": "stream"}
            )
        )


def test_the_order_of_a_stream_and_its_crops_follow_the_seed(configure, cropped):
    def batches(seed, **overrides):
        fields = {**cropped, "data.feed": "stream", "data.batch_size": 4, **overrides}
        drawn = source_of(configure(fields)).training(seed, 0)
        arrays = [jax.device_get(next(drawn)) for _ in range(5)]
        drawn.close()
        return [batch["image"][0] for batch in arrays]

    def images(batches):
        return [image.tobytes() for batch in batches for image in batch]

    first, again, other = (images(batches(seed)) for seed in (0, 0, 1))
    assert first == again
    assert len(set(first)) == 20  # an epoch
    assert sorted(first) == sorted(other)  # the same images, uncropped,
    assert first != other  # in another order
    first, other = (
        images(batches(seed, **{"data.train_crop": "random_resized"})) for seed in (0, 1)
    )
    assert not set(first) & set(other)
