"""How many runs share a GPU is measured once, and NVIDIA's MPS serves them for one launch.

No test here has a GPU: processes share CPU cores, or only what they are given is looked at.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resjax.cli import main
from resjax.config import default_config, override
from resjax.errors import UserError
from resjax.machine import available_cores
from resjax.sweeps import local, packing, worker
from resjax.sweeps.experiment import plan
from resjax.sweeps.launchers import Options
from resjax.sweeps.mps import CONTROL, mps_daemon
from resjax.sweeps.packing import Measurement, NotMeasuredError, choose, shared_devices
from resjax.sweeps.plan_files import write_sweep
from resjax.train.signals import Stopped, StopRequest

SWEEP = "from resjax.sweeps import param\nsweep = lambda: param('seed', range(8))\n"


@pytest.fixture
def planned(tmp_path, smallest):
    """Returns a function that plans eight seeds of the smallest run with overrides."""
    (tmp_path / "sweep.py").write_text(SWEEP)

    def planned(overrides=()):
        return plan(tmp_path / "sweep.py", override(default_config(), smallest | dict(overrides)))

    return planned


@pytest.fixture
def sweep(planned, tmp_path):
    """Returns a function that writes such a plan; the sweep folder is `w`."""
    return lambda overrides=(): write_sweep(planned(overrides), tmp_path / "w", "", "launch")


@pytest.fixture
def gpus(monkeypatch):
    """Returns a function that sets which GPUs are visible, and how many cores there are."""

    def gpus(names, cores=64):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)

    return gpus


@pytest.fixture
def rates(monkeypatch):
    """Replaces measuring by a table; `rates.measured` lists what was measured."""

    class Rates(dict):
        measured, shares = [], []

    table = Rates()

    def rate(_, shares):
        table.measured.append(len(shares))
        table.shares = shares
        if not isinstance(found := table[len(shares)], str):
            return found
        raise NotMeasuredError(found)

    monkeypatch.setattr(Rates, "measured", [])
    monkeypatch.setattr(Measurement, "rate", rate)
    monkeypatch.setattr(Measurement, "device_kind", lambda *_: "H100")
    return table


AUTO = Options(per_gpu="auto")


def divide(stored, tmp_path, options=AUTO):
    with shared_devices(options, tmp_path / "w", stored, StopRequest()) as shares:
        return shares


@pytest.mark.parametrize(
    ("rates", "most", "chosen"),
    [
        ({}, 8, (1, 1)),
        ({1: 10}, 8, (1, 2)),
        ({1: 10, 2: 10.4}, 8, (1, None)),  # less than 5 % faster
        ({1: 10, 2: 10.6}, 8, (2, 4)),
        ({1: 10, 2: 19, 4: 30, 8: 31}, 16, (4, None)),
        ({1: 10, 2: 19, 4: None}, 16, (2, None)),  # memory did not suffice
        ({1: None}, 16, (1, None)),
        ({1: 10, 2: 19, 4: 30}, 6, (4, 6)),
        ({1: 10, 2: 19, 4: 30, 6: 40}, 6, (6, None)),
        ({1: 10, 2: 19, 4: 30, 8: 60}, 2, (2, None)),  # there are only two runs now
        ({1: 10}, 1, (1, None)),
    ],
)
def test_the_number_doubles_as_long_as_all_together_are_five_percent_faster(rates, most, chosen):
    assert choose(rates, most) == chosen


def test_processes_are_measured_on_one_gpu_with_their_share_of_its_memory(
    sweep, tmp_path, gpus, rates, capsys
):
    gpus("4,5", cores=16)
    rates |= {1: 100.0, 2: 190.0, 4: 191.0}
    shares = divide(sweep(), tmp_path)
    assert rates.measured == [1, 2, 4]
    devices = {share.environment["CUDA_VISIBLE_DEVICES"] for share in rates.shares}
    fractions = {share.environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] for share in rates.shares}
    assert (devices, fractions) == ({"4"}, {"0.225"})
    assert {share.threads for share in rates.shares} == {2}  # of 16 for two GPUs
    assert [share.environment["CUDA_VISIBLE_DEVICES"] for share in shares] == ["4", "5"] * 2
    output = capsys.readouterr().out
    assert "measuring how many runs at a time are fastest on a H100: 5 minutes at most" in output
    assert "(1: 100.0, 2: 190.0, 4: 191.0): 2 on one H100 (0 s)" in output


def test_the_number_is_kept_for_each_network_and_device(sweep, tmp_path, gpus, rates, capsys):
    gpus("0")
    rates |= {1: 100.0, 2: 190.0, 4: "memory does not suffice"}
    assert len(divide(sweep(), tmp_path)) == 2
    (entry,) = json.loads((tmp_path / "w" / "packing.json").read_text())["packings"]
    assert entry["device"] == "H100"
    assert entry["steps_per_second"] == {"1": 100.0, "2": 190.0, "4": None}
    assert (entry["workers"], entry["reason"]) == (2, "4 processes: memory does not suffice")
    rates.measured.clear()
    assert len(divide(sweep({"data.flip": True}), tmp_path)) == 2
    assert rates.measured == [1, 2, 4]  # of another network
    rates.clear()
    assert len(divide(sweep(), tmp_path)) == 2
    assert "from" in capsys.readouterr().out.splitlines()[-1]
    (tmp_path / "w" / "packing.json").write_text('{"packings": [{"program": 3}]')
    rates |= {1: 100.0, 2: 90.0}
    assert len(divide(sweep(), tmp_path)) == 1  # a file that is damaged is measured again


def test_a_network_that_does_not_train_is_measured_again_by_the_next_launch(
    sweep, tmp_path, gpus, rates, capsys
):
    gpus("0")
    rates |= {1: "memory does not suffice"}
    assert len(divide(sweep(), tmp_path)) == 1
    assert "(none; 1 processes: memory does not suffice): 1 on one" in capsys.readouterr().out
    assert not (tmp_path / "w" / "packing.json").exists()


def test_real_processes_are_measured_and_write_no_run(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "MEASURED_SECONDS", 0.2)
    cores = min(2, available_cores())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    stored = sweep()
    before = sorted((tmp_path / "w").rglob("*"))
    shares = divide(stored, tmp_path)
    assert sorted({*(tmp_path / "w").rglob("*")} - {*before}) == [tmp_path / "w" / "packing.json"]
    (entry,) = json.loads((tmp_path / "w" / "packing.json").read_text())["packings"]
    assert (entry["device"], entry["cores"], entry["reason"]) == ("cpu", cores, "")
    assert entry["program"] == stored.runs[0].program
    measured = entry["steps_per_second"]
    assert list(measured) == ["1", "2"][:cores]
    assert all(10 < rate < 1e6 for rate in measured.values())
    faster = measured.get("2", 0) >= 1.05 * measured["1"]
    assert len(shares) == entry["workers"] == (2 if faster else 1)


BLOCKS = """
import json, os, signal, sys
from pathlib import Path
from resjax.models.blocks import BasicBlock

class Lost(BasicBlock):
    def __call__(self, x):
        os.kill(os.getpid(), signal.SIGKILL)

if folder := os.environ.get("SEEN"):
    Path(folder, f"{os.getpid()}.json").write_text(json.dumps(dict(os.environ)))
    raise RuntimeError("seen")
"""


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A module with a block that kills its process; it writes its environment to $SEEN, if set."""
    (tmp_path / "watched.py").write_text(BLOCKS)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_process_that_is_lost_ends_the_measurement(sweep, tmp_path, watched, capsys):
    stored = sweep({"model.block": "watched:Lost"})
    assert len(divide(stored, tmp_path)) == 1
    assert "1 processes: one was killed; memory may be exhausted" in capsys.readouterr().out


def test_the_time_is_limited(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "LIMIT_SECONDS", 0.0)
    assert len(divide(sweep(), tmp_path)) == 1
    assert "1 processes: 0 s were over" in capsys.readouterr().out


def test_a_stop_request_ends_the_measurement(sweep, tmp_path):
    stop = StopRequest()
    stop.signal = signal.SIGTERM
    sharing = shared_devices(AUTO, tmp_path / "w", sweep(), stop)
    with pytest.raises(Stopped, match="stopped by SIGTERM; no run was under way"), sharing:
        pass


def test_workers_set_their_share_of_a_gpu_before_jax_is_imported():
    program = "import sys, resjax.sweeps.workers; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


FAKE = """#!/bin/sh
[ "$1" = -d ] && word=start || read -r word
echo "$word $CUDA_VISIBLE_DEVICES $CUDA_MPS_PIPE_DIRECTORY $CUDA_MPS_LOG_DIRECTORY" >> {log}
[ "$word" = start ] || exit 0
ls "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY" > /dev/null || exit 3
echo "some line"; echo {says} >&2
exit {code}
"""


@pytest.fixture
def control(tmp_path, monkeypatch):
    """Installs a program in the place of NVIDIA's; returns a function that reads what it logged."""
    log, folder = tmp_path / "log", tmp_path / "bin"

    def install(code=0, says=""):
        folder.mkdir(exist_ok=True)
        (folder / CONTROL).write_text(FAKE.format(log=log, says=says, code=code))
        (folder / CONTROL).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return lambda: [line.split() for line in log.read_text().splitlines()]

    return install


def test_the_daemon_of_mps_has_folders_of_its_own_and_ends_after_errors(control):
    logged, folders = control(), []

    def interrupted():
        with mps_daemon(["3", "GPU-5a"]) as environment:
            assert list(environment) == ["CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"]
            folders.extend(environment.values())
            assert all(Path(folder).is_dir() for folder in folders)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert logged() == [["start", "3,GPU-5a", *folders], ["quit", "3,GPU-5a", *folders]]
    assert not any(Path(folder).exists() for folder in folders)


def test_the_daemon_of_mps_ends_when_its_launcher_is_killed(control):
    logged = control()
    program = (
        "import time\nfrom resjax.sweeps.mps import mps_daemon\n"
        "with mps_daemon(['0']):\n    print('up', flush=True); time.sleep(60)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout.readline() == "up\n"
    launcher.kill()
    launcher.communicate()
    deadline = time.monotonic() + 20
    while len(logged()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert logged()[1][0] == "quit"


def test_a_daemon_that_does_not_start_is_one_line(control):
    control(code=1, says="An instance of this daemon is already running")
    message = (
        f"--mps: {CONTROL} -d ended with code 1: An instance of this daemon is already running"
    )
    with pytest.raises(UserError) as refusal, mps_daemon(["0"]):
        pass
    assert str(refusal.value) == message


def test_workers_of_one_gpu_get_their_share_of_its_memory_and_find_mps(
    sweep, tmp_path, watched, control, monkeypatch
):
    """The workers are real processes; their run fails when they have written what they see."""
    logged, seen = control(), tmp_path / "seen"
    seen.mkdir()
    stored = sweep({"model.block": "watched:Lost"})
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    typed = [str(tmp_path / "w"), f"--plan={stored.digest}", "--launch=1", "--retries=0"]
    assert worker.main([*typed, "--workers-per-gpu=2", "--mps"]) == 0
    assert [line[:2] for line in logged()] == [["start", "3"], ["quit", "3"]]
    environments = [json.loads(path.read_text()) for path in seen.iterdir()]
    assert len(environments) == 2
    for environment in environments:
        assert environment["CUDA_VISIBLE_DEVICES"] == "0"  # the daemon's only GPU
        assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.450"
        assert environment["CUDA_MPS_PIPE_DIRECTORY"] == logged()[0][2]
        assert int(environment["NPROC"]) == max(1, available_cores() // 2)


@pytest.mark.parametrize(
    ("options", "devices"),
    [
        (Options(per_gpu=2), ["3", "GPU-5a"] * 2),
        (Options(per_gpu=2, mps=True), ["0", "GPU-5a"] * 2),
        (Options(workers=3, mps=True), ["0", "GPU-5a", "0"]),
        (Options(mps=True), ["0", "GPU-5a"]),
        (Options(per_gpu=8), ["3", "GPU-5a"] * 4),  # of eight runs
    ],
)
def test_runs_are_spread_over_gpus(sweep, tmp_path, gpus, control, options, devices):
    gpus("3,GPU-5a")
    control()
    shares = divide(sweep(), tmp_path, options)
    assert [share.environment["CUDA_VISIBLE_DEVICES"] for share in shares] == devices
    assert all(("CUDA_MPS_PIPE_DIRECTORY" in each.environment) == options.mps for each in shares)


def test_workers_within_a_task_share_its_threads_and_its_part_of_a_gpu(
    sweep, tmp_path, gpus, rates, monkeypatch
):
    gpus("2", cores=64)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.48")  # of a task with half a GPU
    rates |= {1: 100.0, 2: 190.0, 4: 300.0, 8: 301.0}
    with shared_devices(AUTO, tmp_path / "w", sweep(), StopRequest(), threads=8) as shares:
        assert len(shares) == 4
    assert {share.threads for share in shares} == {2}
    assert {len(share.cores) for share in shares} == {64}  # other tasks are on the node too
    fractions = {share.environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] for share in shares}
    assert fractions == {"0.120"}
    (entry,) = json.loads((tmp_path / "w" / "packing.json").read_text())["packings"]
    assert entry["cores"] == 8


@pytest.mark.parametrize(
    ("visible", "flags", "message"),
    [
        ("", ["--workers-per-gpu=2"], "--workers-per-gpu: no NVIDIA GPU is visible here"),
        ("", ["--mps"], "--mps: no NVIDIA GPU is visible here; leave it out"),
        ("0", ["--mps"], f"--mps: no {CONTROL} on PATH; it is part of NVIDIA's driver"),
        ("0", ["--workers=2", "--workers-per-gpu=2"], "exclude each other; give one of them"),
        ("0", ["--workers-per-gpu=0"], "'0' is neither auto nor an integer of at least 1"),
        ("0", ["--workers-per-gpu=many"], "'many' is neither auto nor an integer"),
    ],
)
def test_what_the_machine_lacks_is_refused_in_one_line_and_nothing_is_launched(
    planned, tmp_path, monkeypatch, capsys, visible, flags, message
):
    planned()  # writes the experiment
    (tmp_path / "config.py").write_text(
        "from resjax.config import default_config\nget_config = default_config\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    typed = ["sweep", str(tmp_path / "sweep.py"), f"--config={tmp_path / 'config.py'}"]
    for dry in ([], ["--dry-run"]):
        assert main([*typed, f"--workdir={tmp_path / 'w'}", *flags, *dry]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "w").exists()


def test_a_dry_run_says_how_gpus_are_shared(planned, tmp_path, gpus):
    gpus("0,1")
    text = local.dry_run(planned(), tmp_path / "w", "", AUTO)
    first = "as many processes per GPU as are measured to be fastest on 2 GPUs would train in"
    assert text.startswith(first)
    text = local.dry_run(planned(), tmp_path / "w", "", Options(per_gpu=3))
    assert text.startswith("3 processes per GPU on 2 GPUs would train in")
