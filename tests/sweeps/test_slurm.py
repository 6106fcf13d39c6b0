"""The SLURM launcher on a real SLURM, which the tests start; see tests/slurm_server.py."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from resjax.cli import main
from resjax.errors import UserError
from resjax.run_files import find_error
from resjax.sweeps import slurm as launcher
from resjax.sweeps import srun
from resjax.sweeps.attempts import Job
from resjax.sweeps.failures import Retries
from resjax.train.checkpoint_reader import CheckpointReader, read_checkpoint
from resjax.train.distributed import _own_gpus
from resjax.train.lock import read_holder
from tests.sweeps.paused import go_on, pause, signalled

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
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0.5)

    def launch(files, workdir, *options):
        capsys.readouterr()
        assert main(["sweep", *files, f"--workdir={workdir}", "--launcher=slurm", *options]) == 0
        return re.search(r"SLURM jobs ([\d ]+);", capsys.readouterr().out)[1].split()

    return launch


def start_local(files, workdir):
    """Starts the local launcher with two workers of one thread each."""
    command = [sys.executable, "-P", "-m", "resjax", "sweep", *files, f"--workdir={workdir}"]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    return subprocess.Popen(
        ["taskset", "--cpu-list", cores, *command, "--workers=2"],  # JAX's threads forbid a fork
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
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
    """Finds and pauses the runs that tasks train, once they have taken steps there."""

    def __init__(self, workdir):
        self._runs, self._sizes = workdir / "runs", {}

    def pause(self, task):
        """Pauses the run of a task, if it has taken steps and is far from its end.

        So the run is under way when the next signal comes, however fast it is.

        Returns:
          The run's folder and the paused process, or None.
        """
        for folder in self._runs.glob("*"):
            holder, metrics = read_holder(folder), folder / "metrics.jsonl"
            if not holder or holder["job"] != f"SLURM {task}":
                continue
            process, size = holder["process"], metrics.stat().st_size if metrics.exists() else 0
            if size > self._sizes.setdefault(holder["token"], size) and pause(process):
                if '"test"' not in metrics.read_text():  # the first evaluation is later
                    return folder, process
                go_on(process)
        return None


def train_steps(metrics):
    lines = map(json.loads, metrics.read_text().splitlines())
    return [line["step"] for line in lines if line["split"] == "train"]


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
        tasks[2]: lambda _, process: os.kill(parent(process), signal.SIGKILL),
    }
    stopped, watch = {}, Watch(workdir)

    def stop_those_under_way():
        for task in stops.keys() - stopped.keys():
            if paused := watch.pause(task):
                stopped[task], process = paused
                worker = Path(f"/proc/{parent(process)}")
                stops[task](task, process)
                # SLURM may lose sight of the run's process once its worker has been killed.
                slurm.wait(lambda p=process, w=worker: signalled(p) or not w.exists())
                go_on(process)
        return stopped.keys() == stops.keys()

    slurm.wait(stop_those_under_way)
    slurm.wait(lambda: slurm.queued() == [tasks[3]])
    stopped[tasks[3]], process = slurm.wait(lambda: watch.pause(tasks[3]))
    urgent = subprocess.Popen(["srun", "--partition=urgent", "--nodes=2", "--exclusive", "true"])
    slurm.wait(lambda: signalled(process))
    go_on(process)
    assert urgent.wait(timeout=60) == 0
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
    done = [line.split()[0] for line in lines if re.search("  (done|finished)  ", line)]
    assert sorted(done) == sorted(trained)


@pytest.fixture
def one_run(files):
    """A sweep of one run, whose steps take long enough for two processes to be interrupted."""
    fields = {"train__steps": 40, "train__log_every": 1, "train__eval_every": 40}
    return [*files(data__batch_size=256, **fields), "--config.sweep.seeds=0"]


def test_a_run_of_two_nodes_survives_a_lost_process_and_a_time_limit(
    slurm, submit, one_run, tmp_path
):
    workdir = tmp_path / "w"
    nodes = ["--workers=1", "--nodes-per-run=2", "--slurm.time=5"]
    job = submit(one_run, workdir, *nodes)[0]
    watch = Watch(workdir)
    folder, process = slurm.wait(lambda: watch.pause(f"{job}_0"))
    os.kill(process, signal.SIGKILL)
    slurm.wait(lambda: find_error(folder))
    _, process = slurm.wait(lambda: watch.pause(f"{job}_0"))
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    slurm.wait(lambda: signalled(process))
    go_on(process)
    slurm.wait(lambda: not slurm.queued())
    log = (workdir / "slurm" / f"{job}_0.log").read_text()
    assert "failed, tried again: a process is lost: localhost: task 0: Killed" in log
    assert "the run under way has saved" in log
    assert not (folder / "summary.json").exists()
    assert len(CheckpointReader(folder / "checkpoints").steps()) == 1

    submit(one_run, workdir, *nodes, "--wait")
    assert train_steps(folder / "metrics.jsonl") == [*range(1, 41)]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["processes"] == 2
    assert provenance["resumed"][-1]["step"] > 0
    assert results(workdir)[folder.name][2] == [{"last": 40}]
    assert find_error(folder) is None


@pytest.mark.slow  # SLURM counts a limit in minutes
def test_a_time_limit_that_ends_before_the_sweep_loses_no_step(
    slurm, submit, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(launcher, "WARNING_SECONDS", 20)
    typed = files(train__steps=200_000, train__eval_every=100_000, train__log_every=50)
    typed.append("--config.sweep.seeds=0,1")
    workdir = tmp_path / "w"
    jobs = submit(typed, workdir, "--workers=1", "--slurm.time=2", "--slurm.chain=2")
    slurm.wait(lambda: not slurm.queued(), seconds=400)
    logs = [(workdir / "slurm" / f"{job}_0.log").read_text() for job in jobs]
    assert all("SIGUSR1: saves after the current steps" in log for log in logs)
    assert all("the run under way has saved" in log for log in logs)
    assert not any("CANCELLED" in log for log in logs)
    resumed = (workdir / "runs").glob("*/provenance.json")
    assert any(json.loads(path.read_text()).get("resumed") for path in resumed)
    for metrics in (workdir / "runs").glob("*/metrics.jsonl"):
        steps = train_steps(metrics)
        assert steps == [*range(50, 50 * len(steps) + 1, 50)]


@pytest.mark.slow  # half a minute
def test_a_run_of_two_nodes_that_was_cancelled_equals_one_that_was_not(
    slurm, submit, one_run, tmp_path
):
    cancelled, whole = tmp_path / "cancelled", tmp_path / "whole"
    nodes = ["--workers=1", "--nodes-per-run=2", "--slurm.time=5"]
    job = submit(one_run, cancelled, *nodes)[0]
    watch = Watch(cancelled)
    folder, process = slurm.wait(lambda: watch.pause(f"{job}_0"))
    slurm.run("scancel", job)
    slurm.wait(lambda: signalled(process))
    go_on(process)
    slurm.wait(lambda: not slurm.queued())
    log = (cancelled / "slurm" / f"{job}_0.log").read_text()
    assert "stopped by SIGTERM; the run under way has saved" in log
    for workdir in (cancelled, whole):
        submit(one_run, workdir, *nodes, "--wait")
    assert json.loads((folder / "provenance.json").read_text())["resumed"][-1]["step"] > 0
    assert results(cancelled) == results(whole)


SRUN = """
import json, signal, sys
signal.alarm(60)
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
json.load(sys.stdin)
print("ready", file=sys.stderr, flush=True)
while len(told) < 2:  # the first one is dropped
    signal.pause()
print(json.dumps({"outcome": "stopped"}))
"""


def test_a_stop_that_srun_drops_is_repeated(tmp_path, monkeypatch, capfd):
    program = tmp_path / "srun"
    program.write_text(f"#!{sys.executable}\n{SRUN}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(srun, "STOP_AGAIN_SECONDS", 0.1)
    worker = srun.SrunWorker()

    def attempt():
        with suppress(SystemExit):
            worker.attempt(Job({}, tmp_path, None, Retries("launch", 0)), lambda progress: None)

    thread = threading.Thread(target=attempt)
    thread.start()
    said = ""
    while "ready" not in said:
        said += capfd.readouterr().err
        time.sleep(0.01)
    worker.stop()
    thread.join()  # the process ends after a minute at the latest
    assert worker.saved


def test_a_process_that_has_nothing_to_save_yet_goes_on_when_it_is_requested_to_save():
    pipe = subprocess.PIPE
    process = subprocess.Popen(srun.MEMBER, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    status, save = Path(f"/proc/{process.pid}/status"), 1 << (srun.SAVE - 1)
    deadline = time.monotonic() + 120
    while not int(re.search(r"SigIgn:\s*(\w+)", status.read_text())[1], 16) & save:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(srun.SAVE)
    _, error = process.communicate("no JSON", timeout=60)
    assert process.returncode == 1
    assert "JSONDecodeError" in error


def refusal(capsys, *typed):
    assert main(["sweep", *typed]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            "--slurm.partition=gpuu",
            "invalid partition specified: gpuu; Batch job submission failed: Invalid partition "
            "name specified",
        ),
        ("--slurm.partion=main", "unrecognized option '--partion=main'"),
        ("--slurm.time=soon", "Invalid --time specification"),
        (
            "--slurm.mem=900T",
            "Memory specification can not be satisfied; Batch job submission failed: Requested "
            "node configuration is not available",
        ),
    ],
)
def test_what_slurm_refuses_is_its_message_in_one_line_and_leaves_nothing(
    slurm, files, tmp_path, capsys, option, said
):
    workdir = tmp_path / "w"
    options = [f"--workdir={workdir}", "--launcher=slurm", "--workers=2", "--slurm.chain=2"]
    line = refusal(capsys, *files(), *options, option)
    assert line == f"resjax: error: sbatch refuses: {said}; nothing was launched"
    assert not workdir.exists()
    assert not slurm.queued()


def test_a_refusal_keeps_what_earlier_launches_wrote(slurm, submit, files, tmp_path, capsys):
    workdir = tmp_path / "w"
    job = submit(files(), workdir, "--workers=1", "--slurm.hold")[0]
    script = workdir / "slurm"
    before = sorted(script.iterdir())
    options = [f"--workdir={workdir}", "--launcher=slurm", "--workers=1"]
    refusal(capsys, *files(), *options, "--slurm.partition=gpuu")
    assert sorted(script.iterdir()) == before
    assert slurm.queued() == [f"{job}_0"]
    slurm.run("scancel", job)


def test_jobs_are_cancelled_if_sbatch_takes_only_some_of_them(slurm, files, tmp_path, monkeypatch):
    calls = []
    real = launcher._sbatch

    def refuse_third(*arguments):
        calls.append(arguments)
        return ["false"] if len(calls) == 3 else real(*arguments)

    monkeypatch.setattr(launcher, "_sbatch", refuse_third)
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --hold\n")
    with pytest.raises(UserError, match="sbatch refuses: exit code 1; nothing was launched"):
        launcher._submit(script, 7, chain=1)
    assert not slurm.queued()


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    """As on a machine without the commands of SLURM."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--launcher=slurm", "--workers=2"], "there is no sbatch on this machine; launch on a"),
        (["--launcher=slurm", "--workers=0"], "'0' is not an integer of at least 1"),
        (["--slurm.time=60"], "--slurm.time needs --launcher=slurm; the launcher is local"),
        (["--nodes-per-run=2"], "--nodes-per-run needs --launcher=slurm; the launcher is local"),
    ],
)
def test_an_impossible_launch_is_refused_in_one_line(
    no_slurm, files, tmp_path, capsys, options, said
):
    workdir = tmp_path / "w"
    assert said in refusal(capsys, *files(), f"--workdir={workdir}", *options)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--launcher=slurm needs --workers=N, the number of tasks of the job array"),
        (["--workers=1", "--slurm.file=absent.sh"], "absent.sh: No such file or directory"),
        (["--workers=1", "--slurm.array=0-9"], "--slurm.array: --workers=N sets the number"),
        (["--workers=1", "--slurm.chain=0"], "--slurm.chain=0: not an integer of at least 1"),
        (
            ["--workers=1", "--nodes-per-run=2", "--workers-per-gpu=2"],
            "--workers-per-gpu=2: several processes train each run together",
        ),
        (["--workers=1", "--slurm.comment=a\nb"], r"comment='a\nb': the value must be on one line"),
    ],
)
def test_settings_are_checked_before_anything_is_submitted(
    no_slurm, files, tmp_path, capsys, options, said
):
    options = [f"--workdir={tmp_path / 'w'}", "--launcher=slurm", "--dry-run", *options]
    assert said in refusal(capsys, *files(), *options)


def dry_run(capsys, *typed):
    assert main(["sweep", *typed, "--launcher=slurm", "--dry-run"]) == 0
    return capsys.readouterr().out


def test_the_script_has_the_settings_the_files_lines_and_the_launchers_environment(
    no_slurm, files, tmp_path, capsys, monkeypatch
):
    (tmp_path / "setup.sh").write_text(
        "#!/bin/bash\n#SBATCH --account=lab\n#SBATCH --time=5\nmodule load cuda\n"
    )
    monkeypatch.setenv("PYTHONPATH", "mine")
    workdir = tmp_path / "100%"
    printed = dry_run(
        capsys,
        *files(),
        f"--workdir={workdir}",
        "--workers=20",
        f"--slurm.file={tmp_path / 'setup.sh'}",
        "--slurm.gpus_per_node=a100:2",
        "--slurm.cpus=8",
        "--slurm.time=4:00:00",
        "--slurm.comment=two words",
        "--slurm.exclusive",
        "--workers-per-gpu=auto",
        "--mps",
        "--save-on=HUP,USR2",
    )
    call, _, script = printed.partition("#!/bin/bash\n")
    assert "sbatch --parsable --array=0-5 " in call  # no more tasks than runs
    lines = script.splitlines()
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert options == [
        "job-name=resjax-seeds",
        f"output={tmp_path}/100%%/slurm/%A_%a.log",
        "open-mode=append",
        "signal=B:USR1@120",
        "nodes=1",
        "ntasks-per-node=1",
        "account=lab",
        "time=5",
        "gpus-per-node=a100:2",
        "cpus-per-task=8",
        "time=4:00:00",
        "comment='two words'",
        "exclusive",
    ]
    assert f"cd {Path.cwd()} || exit" in lines
    assert f"export PYTHONPATH={Path.cwd() / 'mine'}:{ROOT}" in lines
    assert lines.index("module load cuda") < len(lines) - 1
    assert lines[-1].startswith(f"exec {sys.executable} -P -m resjax.sweeps.worker {workdir}")
    assert lines[-1].endswith(" --workers-per-gpu=auto --mps --save-on=HUP,USR2")
    assert not workdir.exists()


def test_an_array_is_split_at_the_clusters_limit_and_each_set_of_a_chain_follows_the_last(
    slurm, submit, files, tmp_path, capsys
):
    options = ["--workers=5", "--slurm.chain=2", "--slurm.hold"]
    printed = dry_run(capsys, *files(), f"--workdir={tmp_path / 'dry'}", *options)
    arrays = ["--array=0-2", "--array=0-1"] * 2
    assert re.findall(r"--array=\S+", printed) == arrays
    jobs = submit(files(), tmp_path / "w", *options)
    assert len(jobs) == 4
    waits = slurm.run("squeue", "--noheader", f"--jobs={jobs[3]}", "--format=%E")
    assert {*re.findall(r"afterany:(\d+)", waits)} == {*jobs[:2]}
    slurm.run("scancel", *jobs)


@pytest.mark.parametrize(
    ("gpus", "tasks", "node", "task", "own"),
    [
        ("0,1,2,3", "1(x2)", 0, 0, [0, 1, 2, 3]),
        ("0,1,2,3", "2(x2)", 1, 1, [1, 3]),
        ("0,1", "2,1", 1, 0, [0, 1]),
        ("3", "4", 0, 3, [0]),
        ("", "4", 0, 3, None),
    ],
)
def test_the_gpus_of_a_node_are_divided_among_its_tasks(monkeypatch, gpus, tasks, node, task, own):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    monkeypatch.setenv("SLURM_NODEID", str(node))
    monkeypatch.setenv("SLURM_LOCALID", str(task))
    assert _own_gpus() == own


OWNER = """
import subprocess, sys
server = subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=subprocess.PIPE)
server.wait()
"""


def test_the_tests_slurm_ends_with_the_process_that_started_it(slurm, tmp_path):
    script = ROOT / "tests" / "slurm_server.py"
    # SLURM's sockets are in this folder, and the path of a socket has at most 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="resjax-slurm-")) / "slurm"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(script), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout.readline() == "ready\n"
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    log = tmp_path / "sleep.log"
    sleep = ["sbatch", "--wrap=echo begun; sleep 1000", f"--output={log}"]
    subprocess.run(sleep, env=environment, check=True, capture_output=True)

    def users():
        """Returns the processes that have the SLURM's folder in their environment."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if str(folder).encode() in path.read_bytes():
                    found.append(path)
        return found

    slurm.wait(lambda: log.exists() and log.read_text())
    assert users()
    owner.kill()
    owner.communicate()
    slurm.wait(lambda: not users(), seconds=20)
