"""What the README claims, from real runs of minutes: `make test-slow`."""

import os
import signal
import subprocess
import sys
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


def test_the_demo_killed_ten_times_has_the_metrics_of_the_demo_byte_for_byte(tmp_path):
    assert launch_sweep(tmp_path / "whole").wait() == 0
    interrupted = set()
    for kill in range(10):
        process = launch_sweep(tmp_path / "killed")
        wait_for_lines(tmp_path / "killed", 41 * (kill + 1), process)  # of 432 in the end
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        interrupted |= set(unfinished(tmp_path / "killed"))
    assert launch_sweep(tmp_path / "killed").wait() == 0
    assert len(interrupted) >= 8
    whole, killed = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    assert len(whole) == 18
    assert killed == whole
    assert main(["verify", str(tmp_path / "killed")]) == 0


def launch_sweep(workdir):
    """Starts the demo's sweep, with checkpoints, in a group of processes of its own."""
    experiment, config = ROOT / "experiments/degradation.py", ROOT / "configs/quickstart.py"
    command = [sys.executable, "-m", "resjax", "sweep", str(experiment), f"--config={config}"]
    command += [f"--workdir={workdir}", "--config.train.checkpoint_every=50"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def metrics(workdir):
    """Returns the bytes of each metrics.jsonl by the name of its run."""
    return {path.parent.name: path.read_bytes() for path in workdir.glob("runs/*/metrics.jsonl")}


def unfinished(workdir):
    folders = [path.parent for path in workdir.glob("runs/*/metrics.jsonl")]
    return [folder.name for folder in folders if not (folder / "summary.json").exists()]


def wait_for_lines(workdir, number, process):
    """Waits until the runs of a sweep have this number of measurements together."""
    deadline = time.monotonic() + 600
    while sum(lines.count(b"\n") for lines in metrics(workdir).values()) < number:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
