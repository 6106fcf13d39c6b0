"""Worker processes divide the machine among them, and what happens in one stays there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from resjax.config import default_config, override
from resjax.machine import available_cores
from resjax.sweeps import local, workers
from resjax.sweeps.experiment import plan
from resjax.sweeps.launchers import Options
from resjax.train.signals import StopRequest

BLOCKS = """
import os, signal
from resjax.models.blocks import BasicBlock

class Lost(BasicBlock):
    def __call__(self, x):
        os.kill(os.getpid(), signal.SIGKILL)

class Broken(BasicBlock):
    def __call__(self, x):
        raise RuntimeError("this block is\\nbroken")
"""
SWEEP = """
from resjax.sweeps import chain, param

def sweep():
    broken = param("model.block", ("fragile:Lost", "fragile:Broken"))
    return chain(broken, param("seed", (0, 1, 2)))
"""


def launch(plan, workdir, workers=None):
    return local.launch(plan, workdir, "", Options(workers, retries=0), StopRequest())


@pytest.fixture
def cores(monkeypatch):
    """Returns a function that sets how many cores this process may use."""
    return lambda count: monkeypatch.setattr(
        os, "sched_getaffinity", lambda _: set(range(count)), raising=False
    )


@pytest.fixture
def gpus(monkeypatch):
    """Returns a function that sets which GPUs are visible."""
    return lambda names: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)


@pytest.mark.parametrize(("count", "divided"), [(8, 2), (7, 3), (2, 2)])
def test_every_core_belongs_to_exactly_one_worker(cores, gpus, count, divided):
    cores(count)
    gpus("")
    shares = [share.cores for share in workers.divide_machine(divided)]
    assert sorted(core for share in shares for core in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) < 2
    assert {share.threads for share in workers.divide_machine(divided)} == {count // divided}


def test_more_workers_than_cores_share_them(cores, gpus):
    cores(2)
    gpus("")
    assert [share.cores for share in workers.divide_machine(3)] == [{0}, {1}, {0}]


def test_workers_divide_gpus_and_their_memory(cores, gpus):
    cores(8)
    gpus("3,GPU-5a")
    assert workers.default_workers() == 2
    assert [share.environment for share in workers.divide_machine(2)] == [
        {"CUDA_VISIBLE_DEVICES": "3", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.900"},
        {"CUDA_VISIBLE_DEVICES": "GPU-5a", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.900"},
    ]
    fractions = [
        share.environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] for share in workers.divide_machine(3)
    ]
    assert fractions == ["0.450"] * 3  # two workers share the first


def test_the_default_without_a_gpu_is_one_worker_per_core(cores, gpus):
    cores(6)
    gpus("")
    assert workers.default_workers() == 6


def test_macos_has_no_affinity_so_workers_share_all_cores(monkeypatch, gpus):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    gpus("7")
    assert (available_cores(), workers.default_workers()) == (4, 1)
    first, second = workers.divide_machine(2)
    assert (first.cores, second.cores) == ({0, 2}, {1, 3})
    second.claim()  # cannot pin; sets the environment
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.450"


@pytest.fixture
def planned(tmp_path, monkeypatch, smallest):
    """A plan of five runs: one kills its process, one raises, three train."""
    (tmp_path / "fragile.py").write_text(BLOCKS)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "sweep.py").write_text(SWEEP)
    return plan(tmp_path / "sweep.py", override(default_config(), smallest))


def test_a_run_that_kills_its_process_does_not_stop_the_others(planned, tmp_path, capsys):
    workdir = tmp_path / "w"
    assert launch(planned, workdir, workers=2) == 2
    output = capsys.readouterr().out
    assert "failed: the worker process ended by SIGKILL" in output
    assert "failed: RuntimeError: this block is broken" in output
    assert output.count("  finished  step 2/2  train error ") == 3
    reports = {path.parent.name[:4]: path.read_text() for path in workdir.glob("runs/*/error.txt")}
    assert "fragile.py" in reports["Brok"]  # the traceback of the other process
    assert len(reports) == 2
    seeds = [json.loads(path.read_text()) for path in workdir.glob("runs/seed*/summary.json")]
    assert len({summary["train_loss"] for summary in seeds}) == 3


@pytest.fixture
def seeds(tmp_path, smallest):
    """Returns a function that plans small runs of some seeds."""
    (tmp_path / "sweep.py").write_text(
        "from resjax.sweeps import param\nsweep = lambda seeds: param('seed', seeds)\n"
    )
    return lambda *values: plan(
        tmp_path / "sweep.py", override(default_config(), smallest | {"sweep.seeds": values})
    )


def provenance(run):
    return json.loads((run / "provenance.json").read_text())


def test_the_last_run_of_a_sweep_is_trained_as_it_was_among_others(seeds, tmp_path):
    workdir = tmp_path / "w"
    assert launch(seeds(0, 1), workdir, workers=2) == 0
    run, _ = (workdir / "runs").iterdir()
    whole = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run)
    assert launch(seeds(0, 1), workdir, workers=2) == 0
    assert (run / "metrics.jsonl").read_bytes() == whole
    assert provenance(run)["threads"] == max(1, available_cores() // 2)
    assert "xla_backend_optimization_level" in provenance(run)["compile_options"]


@pytest.fixture
def sweep(tmp_path, smallest):
    """A process that sweeps two seeds, for a minute or more, in two workers."""
    (tmp_path / "sweep.py").write_text(
        "from resjax.sweeps import param\nsweep = lambda: param('seed', (0, 1))\n"
    )
    (tmp_path / "config.py").write_text(
        "from resjax.config import default_config\nget_config = default_config\n"
    )
    long = {"train.steps": 50_000, "train.eval_every": 50_000, "train.checkpoint_every": 0}
    fields = smallest | long
    typed = ["sweep", f"{tmp_path / 'sweep.py'}", f"--config={tmp_path / 'config.py'}"]
    typed += [f"--workdir={tmp_path / 'w'}", "--workers=2"]
    typed += [f"--config.{name}={value}" for name, value in fields.items()]
    # A background job, which this test may be, ignores the signal of Ctrl-C.
    handles = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{handles}; from resjax.cli import main; sys.exit(main())"]
    # In a session of its own, so that a signal to the group does not reach this test.
    process = subprocess.Popen(
        [*command, *typed], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("sent", "send"),
    [
        pytest.param(signal.SIGUSR1, os.killpg, id="SIGUSR1 to launcher and workers"),
        pytest.param(
            signal.SIGINT, os.killpg, id="Ctrl-C to launcher and workers", marks=pytest.mark.slow
        ),
        pytest.param(signal.SIGTERM, os.kill, id="SIGTERM to the launcher", marks=pytest.mark.slow),
        pytest.param(
            signal.SIGTERM, os.killpg, id="SIGTERM to launcher and workers", marks=pytest.mark.slow
        ),
    ],
)
def test_a_sweep_survives_a_hangup_and_a_stopped_one_saves_its_runs(tmp_path, sweep, sent, send):
    def under_way():
        return len([path for path in tmp_path.glob("w/runs/*/metrics.jsonl") if path.read_text()])

    def saved():
        return {path.parents[2] for path in tmp_path.glob("w/runs/*/checkpoints/*/SHA256SUMS")}

    wait_until(lambda: under_way() == 2, sweep)
    send(sweep.pid, signal.SIGHUP)
    wait_until(lambda: len(saved()) == 2, sweep)
    send(sweep.pid, sent)
    _, output = sweep.communicate(timeout=120)
    assert sweep.returncode == 128 + sent
    assert "2 of 2 runs under way have saved; the same command goes on from here" in output
    assert "Traceback" not in output
    assert not list(tmp_path.glob("w/runs/*/error.txt"))
    deadline = time.monotonic() + 60
    while group_lives(sweep.pid):
        assert time.monotonic() < deadline, "a worker goes on"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_sweep_that_is_killed_twice_ends_with_the_bytes_of_one_that_is_not(tmp_path, smallest):
    long = {"train.steps": 400, "train.eval_every": 400, "train.checkpoint_every": 40}
    (tmp_path / "sweep.py").write_text(
        "from resjax.sweeps import param\nsweep = lambda: param('seed', range(4))\n"
    )
    (tmp_path / "config.py").write_text(
        "from resjax.config import default_config\nget_config = default_config\n"
    )
    fields = [f"--config.{name}={value}" for name, value in (smallest | long).items()]

    def start(workdir):
        typed = ["sweep", f"{tmp_path / 'sweep.py'}", f"--config={tmp_path / 'config.py'}"]
        typed += [f"--workdir={workdir}", "--workers=2", *fields]
        main = "import sys; from resjax.cli import main; sys.exit(main())"
        return subprocess.Popen([sys.executable, "-c", main, *typed], start_new_session=True)

    def saved():
        return len([*tmp_path.glob("killed/runs/*/checkpoints/*/SHA256SUMS")])

    def steps():
        files = tmp_path.glob("killed/runs/*/metrics.jsonl")
        return sum(path.read_bytes().count(b"\n") for path in files)

    def holders():
        locks = [*tmp_path.glob("killed/runs/*/lock")]
        return [json.loads(lock.read_text().strip("\0"))["process"] for lock in locks]

    assert start(tmp_path / "whole").wait() == 0
    launch = start(tmp_path / "killed")
    wait_until(lambda: saved() >= 2 and holders(), launch)
    os.kill(holders()[0], signal.SIGKILL)  # a worker process, which the launch replaces
    wait_until(lambda: steps() > 900, launch)
    launch.kill()
    launch.wait()
    assert start(tmp_path / "killed").wait() == 0
    whole, killed = (
        {
            path.parent.name: path.read_bytes()
            for path in tmp_path.glob(f"{name}/runs/*/metrics.jsonl")
        }
        for name in ("whole", "killed")
    )
    assert len(whole) == 4
    assert whole == killed


def test_a_sweep_that_is_stopped_while_its_workers_start_has_saved_nothing(tmp_path, sweep):
    wait_until((tmp_path / "w" / "sweep.json").exists, sweep)
    time.sleep(0.5)
    os.killpg(sweep.pid, signal.SIGTERM)
    _, output = sweep.communicate(timeout=60)
    assert sweep.returncode == 143
    assert "stopped by SIGTERM; 0 of 2 runs under way have saved" in output
    assert not list(tmp_path.glob("w/runs/*/error.txt"))


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
