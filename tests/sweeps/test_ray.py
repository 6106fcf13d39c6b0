"""Sweeps on a Ray cluster, which these tests start and stop; about a minute in all."""

import _thread
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from resjax.cli import main
from resjax.errors import UserError
from resjax.sweeps import ray_pool
from resjax.sweeps.launchers import Options
from resjax.sweeps.ray_cluster import choose_share, require_room
from resjax.sweeps.ray_pool import LOSSES, Pool, Share
from resjax.sweeps.ray_task import run_worker
from tests.sweeps.paused import go_on, pause, signalled

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='needs Ray: pip install "resjax[ray]"'
)

EXPERIMENT = """
import os
from resjax.sweeps import param

NAMES = "NPROC", "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION", "OF_THE_LAUNCHER"

def sweep(seeds=(0, 1, 2, 3, 4, 5)):
    return param("seed", seeds)

def measure(run):
    return {name: os.environ.get(name, "") for name in NAMES} | {"cwd": os.getcwd()}
"""
LONG_EXPERIMENT = """
from resjax.sweeps import param
sweep = lambda: param("seed", (0, 1))
"""
CONFIG = """
from resjax.config import default_config
get_config = default_config
"""
LONG = {"train.steps": 600, "train.log_every": 40, "train.checkpoint_every": 40}
LONG |= {"train.eval_every": 600}


@pytest.fixture(scope="module")
def cluster():
    """A cluster of one node with two CPUs and a GPU that it only believes to have.

    It ignores SIGINT, as does a cluster that a script starts in the background.
    """
    folder = tempfile.mkdtemp(prefix="ray-")  # the paths of its sockets must be short
    token = secrets.token_hex(32)
    # Ray's processes would be niced, and starve beside other tests.
    options = {"RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0", "PYTHONPATH": ""}
    environment = os.environ | options | {"RAY_AUTH_TOKEN": token}
    command = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--port=0"]
    command += ["--num-cpus=2", "--num-gpus=1", "--include-dashboard=false"]
    command += ["--disable-usage-stats", f"--temp-dir={folder}"]
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(f"{folder}/log", "w") as log:
        node = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    signal.signal(signal.SIGINT, handler)
    try:
        address = Path(folder, "ray_current_cluster")
        wait_until(lambda: address.exists() and address.read_text(), node)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_TOKEN", token)  # that it is required, launches find out
            yield address.read_text()
    finally:
        node.terminate()
        node.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with two experiments and a config."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "sweep.py").write_text(EXPERIMENT)
    (folder / "long.py").write_text(LONG_EXPERIMENT)
    (folder / "config.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def command(files):
    """Returns a function that returns the command of a sweep in a folder."""
    smallest = {"model.depth": 8, "model.width": 4, "data.batch_size": 8}
    short = {"train.steps": 2, "train.log_every": 1, "train.eval_every": 2}

    def sweep(workdir, *options, experiment="sweep.py"):
        fields = smallest | (short if experiment == "sweep.py" else LONG)
        typed = ["sweep", f"{files / experiment}", f"--config={files / 'config.py'}"]
        typed += [f"--workdir={workdir}", *options]
        typed += [f"--config.{name}={value}" for name, value in fields.items()]
        return [sys.executable, "-c", "from resjax.cli import main; exit(main())", *typed]

    return sweep


@pytest.fixture(scope="module")
def on_ray(cluster):
    """The options of a launch on the cluster, whose workers share the GPU."""
    return ["--launcher=ray", f"--ray.address={cluster}", "--ray.cpus=1", "--ray.gpus=0.5"]


@pytest.fixture
def start(tmp_path):
    """Returns a function that starts a command, which does not outlive the test."""
    processes = []

    def popen(command):
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield popen
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The runs of the long sweep, trained without interruption by the local launcher."""
    workdir = tmp_path_factory.mktemp("whole") / "w"
    finish(subprocess.Popen(command(workdir, "--workers=2", experiment="long.py")))
    return metrics(workdir)


def measurements(workdir):
    return sum(len(content.splitlines()) for content in metrics(workdir).values())


def ancestor(process, name):
    """Returns the process above another whose command line has the name."""
    while process > 1:
        stat = Path(f"/proc/{process}/stat").read_text()
        process = int(stat.rpartition(")")[2].split()[1])
        if name in Path(f"/proc/{process}/cmdline").read_text():
            return process
    raise LookupError(name)


def finish(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def wait_until(condition, *processes):
    deadline = time.monotonic() + 600
    while not condition():
        for process in processes:
            assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def metrics(workdir):
    return {path.parent.name: path.read_bytes() for path in workdir.glob("runs/*/metrics.jsonl")}


def under_way(workdir, count=2):
    """Returns whether that many runs have a checkpoint that they could resume from."""
    return (
        len({path.parents[2] for path in workdir.glob("runs/*/checkpoints/*/SHA256SUMS")}) >= count
    )


def pause_run(workdir, launcher, others=()):
    """Pauses a run once it has a checkpoint; returns its lock and its process."""

    def resumable():
        saved = {path.parents[2] for path in workdir.glob("runs/*/checkpoints/*/SHA256SUMS")}
        return [lock for lock in locks(workdir) if lock.parent in saved and lock not in others]

    wait_until(resumable, launcher)
    (lock,) = resumable()
    process = read_json(lock)["process"]
    assert pause(process)
    return lock, process


def read_json(path):
    return json.loads(path.read_text())


def locks(workdir):
    return list(workdir.glob("runs/*/lock"))


@needs_ray
def test_a_sweep_on_ray_has_the_results_of_the_local_launcher(
    command, on_ray, start, tmp_path, monkeypatch
):
    monkeypatch.setenv("OF_THE_LAUNCHER", "its value")
    ray, local = tmp_path / "ray", tmp_path / "local"
    output = finish(start(command(ray, *on_ray)))
    finish(start(command(local, "--workers=2")))
    assert output.count("  finished  step 2/2  train error ") == 6
    assert len(metrics(ray)) == 6
    assert metrics(ray) == metrics(local)
    assert (ray / "report.html").exists()
    assert not locks(ray)
    for run in (ray / "runs").iterdir():
        assert read_json(run / "config.json") == read_json(
            local / "runs" / run.name / "config.json"
        )
        (row,) = read_json(run / "measurements" / "sweep.json")["rows"]
        assert row == {
            "NPROC": "1",
            "CUDA_VISIBLE_DEVICES": "0",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450",
            "OF_THE_LAUNCHER": "its value",
            "cwd": str(tmp_path),
        }


@needs_ray
def test_launchers_share_a_sweep_replace_killed_workers_and_save_when_they_are_stopped(
    command, on_ray, start, tmp_path, whole
):
    workdir = tmp_path / "w"
    launch = command(workdir, *on_ray, "--workers=1", experiment="long.py")
    # Runs and a launcher are paused, so that no result depends on which process is faster.
    stopped = start(launch)
    lock, first = pause_run(workdir, stopped)
    other = start(launch)
    other_lock, second = pause_run(workdir, other, others=[lock])
    stopped.terminate()
    wait_until(lambda: signalled(first), stopped, other)
    pause(stopped.pid)
    go_on(first)
    wait_until(lambda: locks(workdir) == [other_lock], other)
    os.kill(ancestor(second, "run_worker"), signal.SIGKILL)
    go_on(second)
    wait_until(lock.exists, other)  # a new worker has taken the run that the stopped one has saved
    go_on(stopped.pid)
    output, _ = stopped.communicate(timeout=600)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; 1 of 1 runs under way have saved" in output
    output = finish(other)
    assert "a worker on " in output
    assert " was lost: WorkerCrashedError" in output
    assert metrics(workdir) == whole
    assert all(read_json(run / "provenance.json")["resumed"] for run in workdir.glob("runs/*"))
    assert not locks(workdir)
    assert not list(workdir.glob("runs/*/error.txt"))


@needs_ray
def test_ray_goes_on_with_a_sweep_of_the_local_launcher_and_this_one_finishes_it(
    command, on_ray, start, tmp_path, whole
):
    workdir = tmp_path / "w"
    local = command(workdir, "--workers=2", experiment="long.py")
    begun = start(local)
    wait_until(lambda: under_way(workdir), begun)
    begun.terminate()
    begun.communicate(timeout=600)
    before = measurements(workdir)
    killed = start(command(workdir, *on_ray, experiment="long.py"))
    wait_until(lambda: measurements(workdir) > before + 1, killed)
    killed.kill()
    finish(start(local))
    assert metrics(workdir) == whole
    assert not locks(workdir)


@needs_ray
def test_a_worker_for_which_no_node_has_room_is_refused(command, cluster, start, tmp_path):
    options = "--launcher=ray", f"--ray.address={cluster}", "--ray.gpus=2"
    refused = start(command(tmp_path / "w", *options))
    output, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert "no node of the cluster has 4 CPUs and 2 GPUs for a worker; they have" in output
    assert not (tmp_path / "w").exists()


@pytest.fixture
def typed(command, tmp_path):
    """Returns a function that runs a sweep in this process."""
    return lambda *options: main(command(tmp_path / "w", *options)[3:])


def test_ray_that_is_not_installed_is_named_in_one_line(typed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert typed("--launcher=ray") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith('Ray is not installed; install it by `pip install "resjax[ray]"`')
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--launcher=ray", "--ray.address=here"],
            "--ray.address=here: not auto, local",
        ),
        (["--launcher=ray", "--ray.address=127.0.0.1:1"], "127.0.0.1:1: no Ray cluster answers"),
        (["--launcher=ray", "--ray.gpus=1.5"], "--ray.gpus=1.5: not a number of GPUs"),
        (["--launcher=ray", "--ray.gpus=nan"], "--ray.gpus=nan: not a number of GPUs"),
        (["--launcher=ray", "--ray.cpus=0"], "--ray.cpus=0: not an integer of at least 1"),
        (["--launcher=ray", "--ray.gpu=1"], "--ray.gpu: the launcher ray has no such setting"),
        (["--ray.gpus=1"], "--ray.gpus needs --launcher=ray; the launcher is local"),
    ],
)
def test_a_mistake_is_one_line_and_launches_nothing(
    typed, tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    start = time.monotonic()
    assert typed(*options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "w").exists()
    assert time.monotonic() - start < 10


def test_a_dry_run_looks_for_no_cluster(typed, tmp_path, capsys):
    assert typed("--launcher=ray", "--ray.gpus=0.5", "--workers=9", "--mps", "--dry-run") == 0
    output = capsys.readouterr().out
    assert "option of each worker: --mps\n" in output
    assert "workers: 6\n" in output
    assert "GPUs per worker: 0.5\n" in output
    assert output.count("  runs/seed") == 6
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("cpus", "gpus", "resources", "room"),
    [
        (1, 0.0, {"CPU": 4.0}, 4),
        (3, 0.0, {"CPU": 4.0}, 1),
        (1, 0.5, {"CPU": 4.0, "GPU": 1.0}, 2),
        (1, 0.4, {"CPU": 9.0, "GPU": 2.0}, 4),  # two on each GPU, none on both
        (2, 2.0, {"CPU": 9.0, "GPU": 5.0}, 2),
        (1, 1.0, {"CPU": 4.0}, 0),
        (1, 0.0, {}, 0),
    ],
)
def test_a_node_has_room_for_the_workers_that_its_cpus_and_gpus_allow(cpus, gpus, resources, room):
    assert Share(cpus, gpus).room(resources) == room


@pytest.mark.parametrize(
    ("nodes", "share"),
    [
        ([{"CPU": 4.0}], (1, 0)),
        ([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 4.0}], (8, 1)),
        ([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 6.0, "GPU": 2.0}], (3, 1)),
    ],
)
def test_a_worker_gets_a_gpu_and_its_part_of_the_cpus_by_default(nodes, share):
    assert choose_share(None, None, nodes) == share


def test_workers_without_gpus_share_none():
    with pytest.raises(UserError, match="--workers-per-gpu=2: the workers get no GPU to share; ad"):
        require_room(Share(1, 0), [{"CPU": 1.0}], Options(per_gpu=2))


def test_a_cluster_that_adds_nodes_may_have_no_room_yet():
    settings = {"autoscaling": ""}
    require_room(Share(1, 1), [{"CPU": 1.0}], Options(settings=settings))
    with pytest.raises(UserError, match="no node of the cluster has 1 CPU and 1 GPU for a worker"):
        require_room(Share(1, 1), [{"CPU": 1.0}], Options())


class FakeEvents:
    """Stands for the generator of a task's events."""

    def __init__(self, events):
        self._events = iter(events)

    def __next__(self):
        return next(self._events)

    def completed(self):
        return self


class FakeRay:
    """Ray with a node A and a node B, whose tasks yield what a test says."""

    class exceptions:  # noqa: N801, its name in Ray
        RayError = LookupError

    def __init__(self, *events):
        self.events = list(events)
        self.selectors = []

    def nodes(self):
        return [{"NodeID": name, "Alive": True, "Resources": {"CPU": 1.0}} for name in "AB"]

    def remote(self, **options):
        return lambda function: self

    def options(self, label_selector=None):
        self.selectors.append(label_selector)
        return SimpleNamespace(remote=lambda *_: FakeEvents(self.events.pop(0)))

    def wait(self, tasks, timeout):
        return tasks, []

    def get(self, event):
        if isinstance(event, Exception):
            raise event
        return event


def pool(*events):
    fake = FakeRay(*events)
    return fake, Pool(fake, Share(1, 0), ())


def test_a_node_that_does_not_see_the_sweep_gets_no_further_worker(capsys):
    fake, workers = pool([("unfit", "A", "A does not see it")], [("unfit", "B", "nor does B")])
    workers.start(1)
    workers.poll()
    assert capsys.readouterr().err == "resjax: warning: A does not see it\n"
    assert not workers.workers
    workers.start(1)
    assert fake.selectors == [None, {"ray.io/node-id": "!in(A)"}]
    with pytest.raises(UserError, match="nor does B; no other node has room for a worker"):
        workers.poll()


@pytest.mark.parametrize(
    "lost", [LookupError("it died"), ("ended", 1, "it died")], ids=["the task", "the process"]
)
def test_no_worker_is_started_after_several_were_lost_soon_until_a_run_ends(lost, capsys):
    _, workers = pool(*[[("started", "A"), lost]] * (LOSSES + 1))
    for _ in range(LOSSES):
        workers.start(1)
        workers.poll()
    assert capsys.readouterr().err.count("a worker on A was lost") == LOSSES
    with pytest.raises(UserError, match=f"{LOSSES} workers were lost: .*it died"):
        workers.start(1)
    workers.progressed()
    workers.start(1)
    assert len(workers.workers) == 1


def test_a_worker_that_finds_no_run_was_not_lost(capsys):
    _, workers = pool([("started", "A"), ("ended", 0, "a warning")])
    workers.start(1)
    workers.poll()
    assert not workers.workers
    assert not capsys.readouterr().err


def test_a_stop_repeats_cancellations_until_the_tasks_have_ended(monkeypatch):
    _, workers = pool([], [])
    workers.start(2)
    first, second = (task.events for task in workers.workers)
    canceled = []

    def wait(tasks, num_returns, timeout):
        assert num_returns == len(tasks)
        return [task for task in tasks if canceled.count(task) == (2 if task is first else 3)], []

    monkeypatch.setattr(FakeRay, "cancel", lambda _, task: canceled.append(task), raising=False)
    monkeypatch.setattr(FakeRay, "wait", lambda _, *args, **options: wait(*args, **options))
    workers.stop()
    assert not workers.workers
    assert canceled == [first, second, first, second, second]


SAVES_ON_SIGTERM = """
import signal, sys, time
from pathlib import Path

def save(*_):
    Path("saving").touch()
    while not Path("canceled again").exists():
        time.sleep(0.01)
    sys.exit("saved")

signal.signal(signal.SIGTERM, save)
Path("trains").touch()
while True:
    time.sleep(0.01)
"""


@pytest.fixture
def sigint_handler():
    """Restores what SIGINT does, which `run_worker` changes in the process of its task."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.default_int_handler])
def test_a_worker_saves_if_its_task_is_canceled_once_or_twice(
    before, sigint_handler, tmp_path, monkeypatch
):
    context = SimpleNamespace(get_job_id=lambda: "1", get_node_id=lambda: "A")
    ray = SimpleNamespace(get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", ray)
    signal.signal(signal.SIGINT, before)

    def cancel():
        wait_until((tmp_path / "trains").exists)
        _thread.interrupt_main()  # as Ray does
        wait_until((tmp_path / "saving").exists)
        _thread.interrupt_main()
        (tmp_path / "canceled again").touch()

    folder = str(tmp_path)
    events = run_worker([sys.executable, "-c", SAVES_ON_SIGTERM], folder, {}, folder)
    assert next(events)[0] == "started"
    canceling = threading.Thread(target=cancel)
    canceling.start()
    assert [*events] == [("ended", 1, "saved")]
    canceling.join()


def test_a_line_says_once_that_workers_wait_for_resources(capsys, monkeypatch):
    monkeypatch.setattr(ray_pool, "PATIENCE_SECONDS", -1.0)
    _, workers = pool([None], [None])
    monkeypatch.setattr(FakeRay, "wait", lambda *_, timeout: ([], []))
    workers.start(2)
    workers.poll()
    workers.poll()
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 of 2 workers wait for 1 CPU each" in line
