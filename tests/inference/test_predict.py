"""Images in, the likeliest classes out."""

import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from resjax.cli import main
from resjax.errors import UserError
from resjax.inference.features import load_features
from resjax.inference.predict import Prediction, as_csv, as_json, classifier, predict
from resjax.text import encodable
from resjax.train.load_weights import load_weights
from resjax.train.loop import evaluate
from resjax.transfer.weights import save


def errors(found, labels):
    return [each.classes[0] != str(label) for each, label in zip(found, labels, strict=True)]


def test_the_error_of_predictions_is_that_of_the_evaluation(run, weights, digits):
    paths, labels = digits
    found, left_out = predict(weights, paths, top=3)
    assert [each.path for each in found] == paths
    assert not left_out
    assert np.mean(errors(found, labels)) == pytest.approx(evaluate(run)["test_error"], abs=1e-6)


def test_the_error_of_a_streamed_run_is_that_of_its_evaluation(
    train_small, photos, write_folder, tmp_path
):
    """Whose images are scaled and cut; those of other sizes and shapes."""
    sizes = [(20 + index % 13, 32 - index % 5) for index in range(len(photos))]
    files = {
        f"{'ab'[index % 2]}/{index:02}.png": photo[: sizes[index][0], : sizes[index][1]]
        for index, photo in enumerate(photos)
    }
    folder = write_folder(files)
    run = train_small(
        tmp_path / "run",
        data__name=f"folder:{folder}",
        data__image_size=16,
        data__feed="stream",
        data__workers=0,
        data__batch_size=8,
        train__steps=4,
        train__log_every=2,
        train__eval_every=2,
        train__checkpoint_every=2,
        optimizer__ema_decay=0.5,
    )
    weights = load_weights(run)
    assert (weights.preprocessing.size, weights.preprocessing.shorter_side) == (16, 18)
    paths = [path for name in "ab" for path in sorted((folder / name).iterdir())[-4:]]
    found, _ = predict(weights, paths, top=2)
    of_label = [
        dict(zip(each.classes, each.probabilities, strict=True))[each.path.parent.name]
        for each in found
    ]
    assert np.mean(-np.log(of_label)) == pytest.approx(evaluate(run)["test_ema_loss"], rel=1e-4)


def test_probabilities_are_sorted_and_sum_to_one(weights, digits):
    ((found,), _) = predict(weights, digits[0][:1], top=99)
    assert len(found.classes) == 10
    assert list(found.probabilities) == sorted(found.probabilities, reverse=True)
    assert sum(found.probabilities) == pytest.approx(1, abs=1e-5)


def test_all_batches_have_one_size_and_change_no_prediction(weights, digits, monkeypatch):
    sizes = []

    def watched(weights):
        function = classifier(weights)
        return lambda images: sizes.append(len(images)) or function(images)

    monkeypatch.setattr("resjax.inference.predict.classifier", watched)
    whole, _ = predict(weights, digits[0][:10])
    parts, _ = predict(weights, digits[0][:10], batch_size=4)
    assert sizes == [10, 4, 4, 4]
    assert [each.classes for each in parts] == [each.classes for each in whole]
    probabilities = [[each.probabilities for each in found] for found in (parts, whole)]
    np.testing.assert_allclose(*probabilities, rtol=1e-4)


def test_a_folder_is_searched_recursively_in_order(weights, digits, tmp_path):
    for name in ("b/2.png", "b/1.png", "a.JPG", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(digits[0][0].read_bytes())
    found, _ = predict(weights, [tmp_path, digits[0][0]])
    names = ["a.JPG", "b/1.png", "b/2.png"]
    assert [each.path for each in found] == [*(tmp_path / name for name in names), digits[0][0]]


def test_a_damaged_checkpoint_is_skipped(run):
    path = run / "checkpoints" / "60" / "record" / "metadata"
    content, told = path.read_bytes(), []
    try:
        path.write_bytes(content[:-1])
        weights = load_weights(run, warn=told.append)
    finally:
        path.write_bytes(content)
    assert "checkpoints/60 is damaged" in told[0]
    assert weights.source["step"] == 40


def test_images_of_other_sizes_and_modes_are_converted(weights, tmp_path):
    Image.new("RGB", (31, 20), (200, 10, 10)).save(tmp_path / "red.jpg")
    ((found,), _) = predict(weights, [tmp_path / "red.jpg"])
    assert len(found.classes) == 5


def test_other_files_are_one_line(weights, digits, tmp_path):
    (tmp_path / "note.png").write_text("no image")
    with pytest.raises(UserError, match=r"note\.png: cannot be decoded"):
        predict(weights, [tmp_path / "note.png"])
    with pytest.raises(UserError, match=r"gone\.png: cannot be read: No such file"):
        predict(weights, [tmp_path / "gone.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: contains no images"):
        predict(weights, [tmp_path / "empty"])
    with pytest.raises(UserError, match="none of 1 images can be decoded"):
        predict(weights, [tmp_path / "note.png"], on_bad_image="skip")


def test_bad_images_are_skipped_and_named_on_request(weights, digits, tmp_path):
    good, bad = digits[0][:2], tmp_path / "bad.png"
    bad.write_bytes(good[0].read_bytes()[:70])
    found, left_out = predict(weights, [good[0], bad, good[1]], on_bad_image="skip")
    assert [each.path for each in found] == good
    assert left_out == [bad]


def with_params(weights, params):
    return replace(weights, variables={**weights.variables, "params": params})


def test_weights_without_a_head_predict_no_classes(weights, digits):
    params = {k: v for k, v in weights.variables["params"].items() if k != "head"}
    with pytest.raises(UserError, match="these weights are a backbone"):
        predict(with_params(weights, params), digits[0][:1])


def test_outputs_that_are_not_finite_are_refused_by_image(weights, digits):
    params = jax.tree.map(lambda array: array * np.nan, weights.variables["params"])
    with pytest.raises(UserError, match=r"outputs of .*000.png are not finite \(1 of 1 images\)"):
        predict(with_params(weights, params), digits[0][:1])


def test_csv_and_json_hold_the_same_numbers(weights, digits):
    found, _ = predict(weights, digits[0][:3], top=2)
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    flat = [
        {"image": each["image"], "rank": str(rank), **{k: str(v) for k, v in one.items()}}
        for each in json.loads(as_json(found))
        for rank, one in enumerate(each["classes"], 1)
    ]
    assert rows == flat
    assert json.loads(as_json(found))[0]["classes"][0]["probability"] == found[0].probabilities[0]


def test_the_command_prints_a_table(run, digits, capsys):
    assert main(["predict", f"--checkpoint={run}", "--top=2", str(digits[0][0])]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["image", "class", "probability"]
    assert len(rows) == 2
    assert all(row.endswith(" %") for row in rows)


def test_the_command_reads_a_weights_folder_and_writes_all_formats(
    weights, digits, tmp_path, capsys
):
    save(weights, tmp_path / "weights")
    out, bad = tmp_path / "new" / "found.csv", tmp_path / "bad.png"
    bad.write_text("no image")
    typed = ["predict", f"--checkpoint={tmp_path / 'weights'}", str(digits[0][0])]
    assert main([*typed, str(bad), f"--out={out}", "--on-bad-image=skip"]) == 0
    assert capsys.readouterr().err == f"resjax: skipped images that cannot be decoded (1): {bad}\n"
    expected, _ = predict(weights, [digits[0][0], bad], on_bad_image="skip")
    assert out.read_text() == as_csv(expected)
    assert main([*typed, "--format=json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["image"] == str(digits[0][0])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--out=found.txt", "must end in .csv or .json"),
        ("--format=xml", "no such choice: 'xml'"),
        ("--top=0", "'0' is not an integer of at least 1"),
        ("--which=worst", "'worst' is not last, best or a step"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_read(option, message, capsys):
    assert main(["predict", "--checkpoint=.", "no.png", option]) == 2
    assert message in capsys.readouterr().err


def test_only_a_run_has_checkpoints_to_select(weights, digits, tmp_path, capsys):
    save(weights, tmp_path)
    typed = [f"--checkpoint={tmp_path}", "--which=best", str(digits[0][0])]
    assert main(["predict", *typed]) == 2
    assert "is not a run folder: it has no checkpoint 'best'" in capsys.readouterr().err


STRANGE = b"=\xff\x1b[2J\n.png"  # a formula, no UTF-8, and what clears a terminal


def test_files_with_any_name_are_written(run, digits, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    strange = tmp_path / "images" / os.fsdecode(STRANGE)
    try:
        strange.write_bytes(digits[0][0].read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    here = ["predict", str(tmp_path / "images"), f"--checkpoint={run}"]
    assert main([*here, f"--out={tmp_path / 'x.json'}"]) == 0
    (found,) = json.loads((tmp_path / "x.json").read_text())
    assert found["image"] == str(strange)
    assert main([*here, f"--out={tmp_path / 'x.csv'}"]) == 0
    rows = csv.DictReader((tmp_path / "x.csv").read_text().splitlines())
    name = r"=\udcff\x1b[2J\n.png"
    assert {row["image"] for row in rows} == {str(tmp_path / "images" / name)}
    for suffix in ("npz", "parquet"):
        out = tmp_path / f"x.{suffix}"
        assert main(["features", *here[1:], f"--out={out}"]) == 0
        (origin,) = load_features(out).origins
        assert origin == (str(strange) if suffix == "npz" else encodable(str(strange)))
    for form in ("table", "csv", "json"):
        assert main([*here, f"--format={form}"]) == 0
    printed = "".join(capsys.readouterr())
    assert r"\udcff" in printed
    assert "\x1b" not in printed


def test_csv_cells_are_no_formulas_and_have_one_line():
    found = Prediction(Path("-1.png"), ("=1+1", "@SUM(A1)", "+1", "a\nb"), (0.4, 0.3, 0.2, 0.1))
    rows = list(csv.DictReader(io.StringIO(as_csv([found]))))
    assert {row["image"] for row in rows} == {"'-1.png"}
    assert [row["class"] for row in rows] == ["'=1+1", "'@SUM(A1)", "'+1", r"a\nb"]
