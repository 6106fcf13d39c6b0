"""The SLURM launcher on a real SLURM, which the tests start; see tests/slurm_server.py."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from resjax.cli import main
from resjax.train.checkpoint_reader import CheckpointReader, read_checkpoint
from resjax.train.lock import read_holder

ROOT = Path(__file__).parents[2]

EXPERIMENT = """
from resjax.sweeps import param

def sweep(seeds=(0, 1, 2, 3, 4, 5)):
    return param("seed", seeds)

def measure(run):
    return {"last": run.step}
"""

CONFIG = """
from resjax.config import default_config, override

def get_config():
    return override(default_config(), %r)
"""


@pytest.fixture
def files(tmp_path, smallest):
    """Returns a function that writes an experiment and a config, and returns them as arguments."""

    def write(**fields):
        (tmp_path / "seeds.py").write_text(EXPERIMENT)
        changed = {name.replace("__", "."): value for name, value in fields.items()}
        (tmp_path / "config.py").write_text(CONFIG % (smallest | changed))
        return [str(tmp_path / "seeds.py"), f"--config={tmp_path / 'config.py'}"]

    return write


@pytest.fixture
def submit(capsys, monkeypatch):
    """Returns a function that launches workers in this process; it returns the IDs of the jobs."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("NPROC", raising=False)

    def launch(files, workdir, *options):
        capsys.readouterr()
        assert main(["sweep", *files, f"--workdir={workdir}", "--launcher=slurm", *options]) == 0
        return re.search(r"SLURM jobs ([\d ]+);", capsys.readouterr().out)[1].split()

    return launch


def start_local(files, workdir):
    """Starts the local launcher with two workers of one thread each."""
    command = [sys.executable, "-P", "-m", "resjax", "sweep", *files, f"--workdir={workdir}"]
    cores = sorted(os.sched_getaffinity(0))[:2]
    return subprocess.Popen(
        [*command, "--workers=2"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


def results(workdir):
    """Returns the metrics and the digests of the last arrays of each run, and its measurements."""
    found = {}
    for folder in sorted((workdir / "runs").iterdir()):
        step = CheckpointReader(folder / "checkpoints").steps()[-1]
        _, record = read_checkpoint(folder / "checkpoints" / str(step))
        rows = json.loads((folder / "measurements" / "seeds.json").read_text())["rows"]
        found[folder.name] = ((folder / "metrics.jsonl").read_bytes(), record["arrays"], rows)
    return found


class Watch:
    """Finds the run that a task trains, once it has taken steps there."""

    def __init__(self, workdir):
        self._runs, self._sizes = workdir / "runs", {}

    def under_way(self, task):
        for folder in self._runs.glob("*"):
            holder, metrics = read_holder(folder), folder / "metrics.jsonl"
            if holder and holder["job"] == f"SLURM {task}":
                size = metrics.stat().st_size if metrics.exists() else 0
                if size > self._sizes.setdefault(holder["token"], size):
                    return folder
        return None


def parent(process):
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_interrupted_workers_change_no_result_and_train_each_run_once(
    slurm, submit, files, tmp_path
):
    """Of four workers one is cancelled, one warned of its limit, one killed, one preempted.

    Afterwards SLURM and the local launcher finish the sweep together.
    """
    typed = files(train__steps=4000, train__eval_every=2000, train__log_every=50)
    workdir = tmp_path / "slurm"
    jobs = submit(typed, workdir, "--workers=4", "--slurm.time=5")
    assert len(jobs) == 2  # the cluster's MaxArraySize is 3
    tasks = [f"{jobs[0]}_{index}" for index in range(3)] + [f"{jobs[1]}_0"]
    stops = {
        tasks[0]: lambda task, _: slurm.run("scancel", task),
        tasks[1]: lambda task, _: slurm.run("scancel", "--signal=USR1", "--batch", task),
        tasks[2]: lambda _, held: os.kill(parent(held["process"]), signal.SIGKILL),
    }
    stopped, watch = {}, Watch(workdir)

    def stop_those_under_way():
        for task in stops.keys() - stopped.keys():
            if folder := watch.under_way(task):
                stops[task](task, read_holder(folder))
                stopped[task] = folder
        return stopped.keys() == stops.keys()

    slurm.wait(stop_those_under_way)
    slurm.wait(lambda: slurm.queued() == [tasks[3]])
    stopped[tasks[3]] = slurm.wait(lambda: watch.under_way(tasks[3]))
    slurm.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "true")
    slurm.wait(lambda: not slurm.queued())
    assert [slurm.state(task) for task in tasks] == ["CANCELLED", "FAILED", "FAILED", "PREEMPTED"]
    logs = {task: (workdir / "slurm" / f"{task}.log") for task in tasks}
    saved = {task for task, log in logs.items() if "the run under way has saved" in log.read_text()}
    assert saved == {*tasks} - {tasks[2]}

    submit(typed, workdir, "--workers=1", "--slurm.time=5")
    together = start_local(typed, workdir)
    alone = start_local(typed, tmp_path / "local")
    outputs = [process.communicate()[0] for process in (together, alone)]
    assert [together.returncode, alone.returncode] == [0, 0]
    slurm.wait(lambda: not slurm.queued())
    trained = results(workdir)
    assert trained == results(tmp_path / "local")
    resumed = [json.loads((stopped[task] / "provenance.json").read_text()) for task in saved]
    assert all(content["resumed"] for content in resumed)
    ended = [path.read_text() for path in (workdir / "slurm").glob("*.log")]
    lines = "".join([*ended, outputs[0]]).splitlines()
    assert sorted(line.split()[0] for line in lines if "  done  " in line) == sorted(trained)
