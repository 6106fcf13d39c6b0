"""Images in, the likeliest classes out; from what verifies."""

import numpy as np
import pytest
from PIL import Image

from resjax.cli import main
from resjax.config import UserError
from resjax.data import datasets
from resjax.train.loop import evaluate, train
from resjax.train.predict import predict


@pytest.fixture(scope="module")
def run(configure, tmp_path_factory):
    """A run on digits that has begun to learn."""
    workdir = tmp_path_factory.mktemp("predict") / "run"
    times = {"train.steps": 60, "train.log_every": 20, "train.eval_every": 20}
    train(configure(times | {"train.checkpoint_every": 20, "data.batch_size": 64}), workdir)
    return workdir


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The test images as files, and their labels."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = datasets.load("digits").test
    paths = []
    for index, image in enumerate(images):
        paths.append(folder / f"{index}.png")
        Image.fromarray(image[..., 0]).save(paths[-1])
    return paths, labels


def test_it_errs_on_the_test_set_as_often_as_the_evaluation_says(run, digits):
    paths, labels = digits
    found = predict(run, paths, top=3)
    assert [each.path for each in found] == paths
    wrong = [each.classes[0] != str(label) for each, label in zip(found, labels, strict=True)]
    assert np.mean(wrong) == pytest.approx(evaluate(run)["test_error"], abs=1e-6)


def test_the_likeliest_come_first_and_all_together_are_certain(run, digits):
    (found,) = predict(run, digits[0][:1], top=99)
    assert len(found.classes) == 10
    assert list(found.probabilities) == sorted(found.probabilities, reverse=True)
    assert sum(found.probabilities) == pytest.approx(1, abs=1e-5)


def test_a_damaged_checkpoint_is_passed_over(run, digits):
    path = run / "checkpoints" / "60" / "record" / "metadata"
    content, told = path.read_bytes(), []
    try:
        path.write_bytes(content[:-1])
        predict(run, digits[0][:1], warn=told.append)
    finally:
        path.write_bytes(content)
    assert "checkpoints/60 is damaged" in told[0]


def test_another_size_and_colour_is_brought_to_the_network(run, tmp_path):
    Image.new("RGB", (31, 20), (200, 10, 10)).save(tmp_path / "red.jpg")
    (found,) = predict(run, [tmp_path / "red.jpg"])
    assert len(found.classes) == 5


def test_what_is_no_image_is_one_line(run, tmp_path):
    (tmp_path / "note.png").write_text("no image")
    with pytest.raises(UserError, match=r"note\.png: cannot be decoded"):
        predict(run, [tmp_path / "note.png"])
    with pytest.raises(UserError, match=r"gone\.png: cannot be read: No such file"):
        predict(run, [tmp_path / "gone.png"])


def test_the_command_prints_a_table(run, digits, capsys):
    assert main(["predict", f"--checkpoint={run}", "--top=2", str(digits[0][0])]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["image", "class", "probability"]
    assert len(rows) == 2
    assert all(row.endswith(" %") for row in rows)
