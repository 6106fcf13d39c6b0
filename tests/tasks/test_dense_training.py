"""Segmentation and detection train as classification does: interrupted, sharded, transferred."""

import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resjax.analysis.report import write_report
from resjax.analysis.runs import load_curves, load_runs
from resjax.config import default_config, override, resolve
from resjax.train.loop import evaluate, train
from resjax.train.signals import Stopped, StopRequest

TASKS = "segmentation", "detection"
METRIC = {"segmentation": "miou", "detection": "ap"}


@pytest.fixture(scope="module")
def runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        yield importlib.import_module("dense_training")


def config(runs, task, **fields):
    named = {name.replace("__", "."): value for name, value in fields.items()}
    return resolve(override(default_config(), {**runs.RUN, **runs.TASKS[task], **named}))


@pytest.fixture(scope="module", params=TASKS)
def trained(request, runs, tmp_path_factory):
    """The task, the config and the folder of a run."""
    made = config(runs, request.param)
    folder = tmp_path_factory.mktemp("runs") / request.param
    train(made, folder)
    return request.param, made, folder


class StopAtOnce(StopRequest):
    """Asks to stop after the first dispatch."""

    def requested(self):
        self.signal = signal.SIGTERM
        return True


def test_an_interrupted_run_is_the_whole_one_byte_for_byte(trained, tmp_path):
    _, made, folder = trained
    with pytest.raises(Stopped):
        train(made, tmp_path / "run", stop=StopAtOnce())
    assert not (tmp_path / "run" / "summary.json").exists()
    train(made, tmp_path / "run")
    for name in ("metrics.jsonl", "predictions.png"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()


def test_curves_have_the_tasks_metric_and_evaluation_repeats_it(trained):
    task, _, folder = trained
    (row,) = load_runs(folder).to_dict("records")
    name = METRIC[task]
    assert (row["primary_metric"], row["lower_is_better"]) == (name, False)
    curves = load_curves(folder)
    assert curves.loc[curves["split"] == "test", name].notna().all()
    found = evaluate(folder)
    assert found[f"test_{name}"] == pytest.approx(row[f"test_{name}"])
    assert found["test_loss"] == pytest.approx(row["test_loss"], rel=1e-6)


def test_predictions_are_drawn_and_the_report_shows_them(trained, tmp_path):
    _, _, folder = trained
    picture = np.asarray(Image.open(folder / "predictions.png"))
    assert picture.std() > 10
    page = write_report(folder, out=tmp_path / "report").read_text()
    assert '<section id="predictions">' in page
    assert page.count("data:image/png;base64,") == 1


def test_a_picture_that_fails_loses_no_run(runs, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("resjax.train.loop.write_predictions", fail)
    train(config(runs, "segmentation"), tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").exists()
    assert "predictions.png could not be drawn" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_training_starts_from_a_classifiers_backbone(runs, task, tmp_path):
    digits = {
        "data.name": "digits",
        "data.train_split": None,
        "data.test_split": None,
        "data.normalization": "channel",
        "train.steps": 2,
        "train.eval_every": 2,
    }
    classifier = resolve(override(default_config(), {**runs.RUN, **digits}))
    train(classifier, tmp_path / "digits")
    weights = str(tmp_path / "digits")
    started = config(
        runs, task, transfer__weights=weights, transfer__head="new", transfer__freeze="stem,stage*"
    )
    train(started, tmp_path / "dense")
    before, after = (_parameters(tmp_path / name) for name in ("digits", "dense"))
    shared = [path for path in before if path.startswith("params/stage")]
    assert shared
    assert all((before[path] == after[path]).all() for path in shared)


def _parameters(folder):
    from resjax.train.load_weights import load_weights
    from resjax.transfer.weights import flatten

    return flatten(load_weights(folder).variables)


@pytest.mark.parametrize("task", TASKS)
def test_every_block_is_a_backbone_with_ema_diagnostics_and_bfloat16(runs, task, tmp_path):
    fields = {
        "model__depth": 11,
        "model__block": "preact_bottleneck",
        "model__shortcut": "project",
        "model__dilated_stages": 1,
        "model__dtype": "bfloat16",
        "model__remat": True,
        "optimizer__ema_decay": 0.9,
        "diagnostics__every": 4,
        "diagnostics__names": ("all",),
    }
    made = config(runs, task, **fields)
    train(made, tmp_path / "run")
    (row,) = load_runs(tmp_path / "run").to_dict("records")
    assert np.isfinite(row["test_loss"])
    assert np.isfinite(row[f"test_ema_{METRIC[task]}"])
    assert (tmp_path / "run" / "layers.jsonl").exists()


@pytest.fixture(scope="module")
def on_eight_devices(runs):
    script = Path(__file__).with_name("dense_devices.py")
    done = subprocess.run(
        [sys.executable, str(script), *TASKS], stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    return found["results"]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("way", ["sharded", "pmap"])
def test_losses_and_metrics_do_not_depend_on_how_a_batch_is_divided(on_eight_devices, task, way):
    losses, metrics = on_eight_devices[f"{task} {way}"]
    expected, expected_metrics = on_eight_devices[f"{task} jit"]
    np.testing.assert_allclose(losses, expected, rtol=2e-4)
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=5e-3, abs=5e-3), name
