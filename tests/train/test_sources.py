"""Where images come from: the device or a stream, chosen by size, and to the same effect."""

import json
import os

import jax
import numpy as np
import pytest
from PIL import Image

from resjax.errors import UserError
from resjax.train import feeding
from resjax.train.loop import train
from resjax.train.step import Program

STREAM = {"data.feed": "stream", "data.workers": 0}


@pytest.fixture
def photos(tmp_path):
    """A folder of 24 pictures in two classes, larger than 20 pixels and of several sizes."""
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


def test_a_small_dataset_lies_on_the_device_and_a_large_one_streams(configure, monkeypatch):
    assert not isinstance(Program(configure()).source, feeding.Streamed)
    monkeypatch.setattr(feeding, "device_memory", lambda: 4 * 1797 * 64 - 1)
    assert isinstance(Program(configure({"data.workers": 0})).source, feeding.Streamed)
    monkeypatch.setattr(feeding, "device_memory", lambda: 4 * 1797 * 64)
    assert not isinstance(Program(configure()).source, feeding.Streamed)


def test_a_part_of_a_dataset_is_all_that_lies_on_the_device(configure):
    part = {"data.classes": (7, 3), "data.per_class": 4}
    source = Program(configure(part)).source
    assert source.examples == {"train": 8, "test": 73}
    assert source.class_names == ("7", "3")
    train, _ = source.arrays(configure(part))
    assert np.bincount(train.labels).tolist() == [4, 4]


def test_a_batch_may_be_larger_than_the_part(configure, tmp_path):
    part = {"data.classes": (0, 1), "data.per_class": 2, "data.batch_size": 16}
    summary = train(configure(part), tmp_path / "run")
    assert np.isfinite(summary["train_loss"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.classes": (3, 10)}, "digits has no class 10, its classes are 0 to 9"),
        ({"data.per_class": 143}, "data.per_class=143: class '2' has 142 training examples"),
        ({"data.per_class": 5} | STREAM, "cannot choose from digits as a stream"),
    ],
)
def test_a_part_that_is_not_there_is_refused(configure, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train(configure(overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_cropped_at_random_on_the_host_stream(configure, cropped):
    cropped |= {"data.train_crop": "random_resized"}
    assert isinstance(Program(configure(cropped)).source, feeding.Streamed)


def test_a_stream_is_evaluated_as_resident_data_are(configure):
    resident, streamed = Program(configure()), Program(configure(STREAM))
    state = resident.init(0)
    found, expected = jax.device_get((streamed.evaluate(state), resident.evaluate(state)))
    assert found["error"] == expected["error"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_stream_that_is_resumed_gives_the_batches_that_would_have_come(
    configure, cropped, tmp_path, monkeypatch
):
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
def test_worker_processes_make_what_this_process_makes(configure, cropped, tmp_path):
    cropped |= {"data.train_crop": "random_resized"}
    train(configure(cropped), tmp_path / "thread")
    train(configure(cropped | {"data.workers": 2}), tmp_path / "processes")
    assert lines(tmp_path / "thread") == lines(tmp_path / "processes")


def test_ten_crops_are_evaluated_by_their_mean_logits(configure, cropped):
    program = Program(configure(cropped | {"data.eval_crop": "ten", "data.eval_batch_size": 4}))
    state = program.init(0)
    found = jax.device_get(program.evaluate(state))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    losses, count = 0.0, 0
    for images, labels, weights in program.source.evaluation():
        for ten, label, weight in zip(images[0], labels[0], weights[0], strict=True):
            normal = (ten / 255 - program.statistics.mean) / program.statistics.std
            logits = program.model.apply(variables, normal).mean(0)
            losses -= weight * jax.nn.log_softmax(logits)[label]
            count += weight
    assert ten.shape == (10, 16, 16, 3)
    assert count == 24 // 5  # the fifth that is the test
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
def test_fields_that_cannot_go_together_are_refused(
    configure, cropped, tmp_path, overrides, message
):
    with pytest.raises(UserError, match=message):
        train(configure(cropped | overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("regression")
@pytest.mark.parametrize("feed", ["stream", "device"])
def test_a_bad_image_ends_the_run_or_is_counted(configure, cropped, photos, tmp_path, feed):
    bad = photos / "cat" / "11.png"
    os.truncate(bad, 100)
    cropped |= {"data.feed": feed}
    with pytest.raises(UserError, match=rf"^{bad}.*decoded"):
        train(configure(cropped), tmp_path / "strict")
    summary = train(configure(cropped | {"data.on_bad_image": "skip"}), tmp_path / "lenient")
    assert summary["skipped_images"] > 0


def test_a_prepared_sets_statistics_are_computed_once(
    configure, cropped, tmp_path, write_images, noise, monkeypatch
):
    write_images(train=noise(40, (20, 20, 3)), test=noise(9, (20, 20, 3)), shape=(20, 20, 3))
    config = configure(cropped | {"data.name": "tfds:shapes", "data.feed": "stream"})
    first = Program(config).statistics
    monkeypatch.setattr(feeding.Streamed, "_sample", lambda self: 1 / 0)
    again = Program(config).statistics
    np.testing.assert_array_equal(first.mean, again.mean)
    assert again.mean.shape == (16, 16, 3)
    with pytest.raises(ZeroDivisionError):  # those of another size are others
        Program(
            configure(
                cropped | {"data.name": "tfds:shapes", "data.image_size": 12, "data.feed": "stream"}
            )
        )
