"""A signal ends a run within a line of metrics or an evaluation, and changes no result."""

import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest

from resjax.errors import UserError
from resjax.train import plan as plans
from resjax.train import trainer as trainers
from resjax.train.checkpoint_reader import CheckpointReader
from resjax.train.loop import train
from resjax.train.signals import Stopped, StopRequest
from resjax.train.verify import verify

# Parts of a line have the bits of the whole with the compile options of users' runs only.
pytestmark = pytest.mark.usefixtures("compile_as_users")


class SignalAt(StopRequest):
    """A request that is made when a run asks for the given time."""

    def __init__(self, asked, save=False):
        super().__init__()
        self._left, self._only_save = asked, save

    def requested(self):
        self._left -= 1
        if self._left == 0 and self._only_save:
            self._save = True
        elif self._left == 0:
            self.signal = signal.SIGTERM
        return super().requested()


FIVE = {  # two lines of five steps, each with two evaluations, of 12 and of 3 batches
    "train.evaluate_train": True,
    "train.log_every": 5,
    "train.eval_every": 5,
    "train.checkpoint_every": 0,
    "train.nonfinite": "skip",
    "optimizer.ema_decay": 0.9,
    "data.eval_batch_size": 128,
    "data.workers": 0,
}


@pytest.fixture
def slow(monkeypatch):
    """As if a step, and a batch of an evaluation, took longer than the device may get at once."""
    monkeypatch.setattr(plans, "SECONDS_AT_ONCE", 0.0)
    monkeypatch.setattr(trainers, "SECONDS_AT_ONCE", 1e-9)


@pytest.fixture(params=["device", "stream"])
def of_five(configure, regression, tmp_path, request):
    """A config, and the metrics of an uninterrupted run of it in the largest dispatches."""
    config = configure(FIVE | {"data.feed": request.param})
    train(config, tmp_path / "whole")
    return config, (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_stops_within_lines_and_evaluations_save_there_and_change_no_result(
    of_five, slow, tmp_path
):
    config, whole = of_five
    trainers._cached_trainer.cache_clear()
    # A run asks after each step and between the batches, 11 and 2 times in the two evaluations.
    for asked, step in ((1, 1), (2, 3), (3, 5), (13, 5), (1, 5), (16, 7), (15, 10), (1, 10)):
        with pytest.raises(Stopped, match=f"stopped by SIGTERM at step {step} of 10, saved"):
            train(config, tmp_path / "parts", stop=SignalAt(asked))
        assert (tmp_path / "parts" / "checkpoints" / str(step)).is_dir()
    assert not any(finding.damaged for finding in verify(tmp_path / "parts"))
    train(config, tmp_path / "parts")
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == whole
    last = CheckpointReader(tmp_path / "parts" / "checkpoints").restore_latest(None)
    assert (last.step, last.record["metrics"].encode()) == (10, whole)


def test_a_save_request_within_a_line_saves_there_and_the_run_goes_on(of_five, slow, tmp_path):
    config, whole = of_five
    trainers._cached_trainer.cache_clear()
    train(config, tmp_path / "parts", stop=SignalAt(3, save=True))
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == whole
    assert (tmp_path / "parts" / "checkpoints" / "3").is_dir()


def test_a_line_that_was_interrupted_continues_in_parts_of_another_size(
    of_five, slow, tmp_path, monkeypatch
):
    config, whole = of_five
    trainers._cached_trainer.cache_clear()
    with pytest.raises(Stopped, match="at step 3"):
        train(config, tmp_path / "parts", stop=SignalAt(3))
    monkeypatch.setattr(plans, "SECONDS_AT_ONCE", 4.0)  # as if on a faster device
    changed = replace(config, train=replace(config.train, log_every=10, eval_every=10))
    shutil.copytree(tmp_path / "parts", tmp_path / "changed")
    train(config, tmp_path / "parts")
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == whole
    train(changed, tmp_path / "changed")
    lines = (tmp_path / "changed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(each)["step"] for each in lines] == [10, 10, 10]
    losses = [json.loads(each)["loss"] for each in whole.decode().splitlines()[::3]]
    assert json.loads(lines[0])["loss"] == pytest.approx(np.mean(losses))


def test_a_loss_that_is_not_finite_within_a_line_is_not_saved(
    configure, regression, slow, tmp_path
):
    config = configure(FIVE | {"optimizer.learning_rate": 1e30, "train.nonfinite": "stop"})
    with pytest.raises(
        UserError, match=r"the loss is not finite in step \d: .*good checkpoint: none"
    ):
        train(config, tmp_path, stop=SignalAt(4))
