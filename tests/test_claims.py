"""What the README claims, from real runs of minutes: `make test-slow`."""

import time
from pathlib import Path

import jax
import pytest

from resjax.analysis.runs import load_runs, summarize
from resjax.cli import main
from resjax.config import default_config, override, resolve
from resjax.train.trainer import Dispatch, StepRunner, Trainer

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def test_the_demo_shows_degradation_and_its_cure(tmp_path):
    experiment, config = ROOT / "experiments/degradation.py", ROOT / "configs/quickstart.py"
    sweep = ["sweep", str(experiment), f"--config={config}", f"--workdir={tmp_path}"]
    assert main(sweep) == 0
    results = summarize(load_runs(tmp_path)).set_index(["model.depth", "model.shortcut"])
    assert (results["seeds"] == 3).all()
    error = results["train_error_mean"]
    assert error[56, "none"] >= error[56, "pad"] + 0.2
    assert error[56, "none"] >= error[20, "none"] + 0.2
    assert error[56, "pad"] <= error[8, "pad"] + 0.03


def test_the_first_step_of_1202_scanned_layers_takes_at_most_twice_that_of_20():
    def seconds(depth: int) -> float:
        fields = {
            "model.depth": depth,
            "model.loop": "scan",
            "model.width": 8,
            "data.batch_size": 16,
        }
        trainer = Trainer(resolve(override(default_config(), fields)))
        start = time.monotonic()
        with StepRunner(trainer, seed=0, first_step=0) as runner:
            _, metrics = runner.run(trainer.init(0), Dispatch(phase=0, steps=1))
        jax.block_until_ready(metrics)
        return time.monotonic() - start

    assert seconds(1202) <= 2 * seconds(20)
