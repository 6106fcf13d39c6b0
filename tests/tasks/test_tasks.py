"""Tasks: classification keeps the contract, and so can a task of the user's, without an edit."""

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import pytest
from PIL import Image

from resjax.analysis.report import write_report
from resjax.analysis.runs import load_curves, load_runs
from resjax.config import Task as TaskConfig
from resjax.config import default_config, override, resolve
from resjax.errors import UserError
from resjax.inference.predict import predict
from resjax.tasks import Classification, DatasetInfo, Metric, make_task
from resjax.tasks.conformance import check_task
from resjax.train.load_weights import load_weights
from resjax.train.loop import evaluate, train
from resjax.train.signals import Stopped, StopRequest

DIGITS = DatasetInfo(tuple("0123456789"), (8, 8, 1))


@pytest.fixture(autouse=True)
def user_module(monkeypatch):
    """Makes angle_task.py, which stands beside this file, importable as a user's module."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    yield
    sys.modules.pop("angle_task", None)


def config(task="angle_task:Angle", **fields):
    overrides = {
        "model.family": "cifar",
        "model.depth": 8,
        "model.width": 4,
        "task.name": task,
        "data.batch_size": 32,
        "train.steps": 8,
        "train.log_every": 2,
        "train.eval_every": 2,
        "train.checkpoint_every": 2,
    }
    return resolve(override(default_config(), overrides | fields))


class StopAfter(StopRequest):
    """Asks to stop after so many dispatches."""

    def __init__(self, dispatches):
        super().__init__()
        self._left = dispatches

    def requested(self):
        self._left -= 1
        if self._left <= 0:
            self.signal = signal.SIGTERM
        return self._left <= 0


def test_classification_keeps_the_contract_of_a_task(capsys):
    claims = check_task("classification", label_smoothing=0.1)
    assert len(claims) == 5
    assert all(claim in capsys.readouterr().out for claim in claims[:1])


def test_a_users_task_keeps_the_contract_of_a_task():
    assert check_task("angle_task:Angle", power=1.0)


@dataclass(frozen=True)
class Averages(Classification):
    """Returns means in place of sums, so that batches of different sizes count the same."""

    def sums(self, outputs, batch):
        sums = super().sums(outputs, batch)
        return {name: (total / weight, jnp.ones(())) for name, (total, weight) in sums.items()}


@dataclass(frozen=True)
class IgnoresWeights(Classification):
    """Counts the examples that only fill the last batch."""

    def sums(self, outputs, batch):
        return super().sums(outputs, {**batch, "weight": jnp.ones(len(batch["image"]))})


@dataclass(frozen=True)
class NoPrimary(Classification):
    primary: ClassVar[Metric] = Metric("accuracy", lower_is_better=False)


@dataclass(frozen=True)
class VectorLoss(Classification):
    def loss(self, outputs, batch):
        return self._cross_entropy(outputs, batch["label"])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Averages, "not the sums over its halves"),
        (IgnoresWeights, "examples of weight 0 change the sums"),
        (NoPrimary, "lacks accuracy"),
        (VectorLoss, "return the mean, a scalar"),
    ],
)
def test_check_task_says_which_claim_does_not_hold(monkeypatch, task, message):
    monkeypatch.setitem(sys.modules, "broken_tasks", sys.modules[__name__])
    with pytest.raises(AssertionError, match=message):
        check_task(f"broken_tasks:{task.__name__}")


def test_an_unknown_task_or_option_is_one_line_that_names_it():
    with pytest.raises(UserError, match=r"task.options.smoothing: .*label_smoothing"):
        make_task(TaskConfig("classification", {"smoothing": 0.1}), DIGITS)
    with pytest.raises(UserError, match="label_smoothing=2: must be a number from 0"):
        make_task(TaskConfig("classification", {"label_smoothing": 2}), DIGITS)
    with pytest.raises(UserError, match="the data have one class, 'cat'; classification needs"):
        make_task(TaskConfig("classification"), DatasetInfo(("cat",), (8, 8, 1)))
    with pytest.raises(UserError, match=r"task.name=no_module:Task"):
        make_task(TaskConfig("no_module:Task"), DIGITS)
    with pytest.raises(UserError, match=r"task.name=json:loads: is no class derived from"):
        make_task(TaskConfig("json:loads"), DIGITS)
    with pytest.raises(UserError, match=r"task.options: label_smoothing='much': must be"):
        make_task(TaskConfig("classification", {"label_smoothing": "much"}), DIGITS)
    with pytest.raises(UserError, match=r"task.name=clasification: unknown"):
        config("clasification")


def test_a_users_task_trains_resumes_bit_for_bit_and_keeps_its_best_checkpoint(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    summary = train(config(), whole)
    with pytest.raises(Stopped):
        train(config(), stopped, stop=StopAfter(2))
    train(config(), stopped)
    metrics = (whole / "metrics.jsonl").read_bytes()
    assert (stopped / "metrics.jsonl").read_bytes() == metrics

    lines = [json.loads(line) for line in metrics.splitlines()]
    angles = {line["step"]: line["angle"] for line in lines if line["split"] == "test"}
    best = min(angles, key=angles.__getitem__)
    assert (summary["best_test_step"], summary["best_test_angle"]) == (best, angles[best])
    found = evaluate(whole, "best")
    assert (found["step"], found["test_angle"]) == (best, pytest.approx(angles[best]))
    assert not any("error" in name for line in lines for name in line)


def test_a_task_whose_metric_should_grow_gets_its_best_checkpoint_a_table_and_a_figure(tmp_path):
    fields = {"data.mixup": 0.2, "optimizer.ema_decay": 0.5}
    summary = train(config("angle_task:Cosine", **fields), tmp_path)
    curves = load_curves(tmp_path)
    assert {"cosine", "ema_cosine", "loss"} <= set(curves)
    tests = curves[curves["split"] == "test"].set_index("step")["cosine"]
    assert (summary["best_test_step"], summary["best_test_cosine"]) == (tests.idxmax(), tests.max())
    assert evaluate(tmp_path, "best")["step"] == tests.idxmax()
    assert "test cosine" in write_report(tmp_path).read_text()
    assert (tmp_path / "figures" / "curves.svg").is_file()
    assert load_runs(tmp_path)["primary_metric"].tolist() == ["cosine"]


def test_the_weights_of_another_task_are_a_backbone(tmp_path):
    train(config(**{"train.steps": 2}), tmp_path)
    weights = load_weights(str(tmp_path))
    assert weights.model["classes"] == 0
    assert "head" not in weights.variables["params"]
    Image.new("L", (8, 8)).save(tmp_path / "digit.png")
    with pytest.raises(UserError, match="no head"):
        predict(weights, [tmp_path / "digit.png"])


def test_mixing_needs_labels_that_can_be_mixed(tmp_path):
    with pytest.raises(UserError, match="IntegerLabels has integer labels"):
        train(config("angle_task:IntegerLabels", **{"data.mixup": 0.2}), tmp_path)
