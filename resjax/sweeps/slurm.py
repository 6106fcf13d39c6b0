"""The SLURM launcher: starts the workers of a sweep as tasks of job arrays.

A worker takes the next run that is missing or interrupted until none is left, or until SLURM warns
that its time is nearly up. So nothing depends on array limits, on requeueing or on the preemption
policy of a cluster: an interrupted run is saved, and any other worker goes on with it.

The script that `sbatch` gets is kept in `slurm/` in the sweep folder, beside the output of the
tasks. Every option of `sbatch` can be set as `--slurm.OPTION=VALUE`.
"""

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from resjax.disk import report_disk_errors, write_atomically
from resjax.errors import UserError
from resjax.run_files import experiment_name
from resjax.sweeps.experiment import Plan
from resjax.sweeps.failures import Retries
from resjax.sweeps.launchers import Options, worker_command, worker_python_path
from resjax.sweeps.plan_files import new_launch, plan_digest, write_sweep
from resjax.sweeps.status import print_line
from resjax.sweeps.watching import SweepWatch
from resjax.text import user_path
from resjax.train.signals import StopRequest

SETTINGS: Mapping[str, str] | None = None  # every option of sbatch

ALIASES = {"cpus": "cpus-per-task", "memory": "mem"}
TASKS_PER_NODE = "ntasks-per-node"
RESERVED = {
    "array": "--workers=N sets the number of tasks",
    "nodes": "--nodes-per-run=N sets the number of nodes",
    "ntasks": f"--nodes-per-run=N and --slurm.{TASKS_PER_NODE}=N set the number of tasks",
    "dependency": "--slurm.chain=N starts N sets of workers, one after the other",
    "wait": "--wait waits for the workers",
    "wrap": "--slurm.file=FILE adds lines to the script",
    "parsable": "the launcher reads the job ID itself",
    "test-only": "--dry-run prints the script and submits nothing",
}
"""Options of sbatch that would break the launcher, and what does their work."""

WARNING_SECONDS = 120  # before the time limit, when SLURM sends SIGUSR1 to the worker
MAX_ARRAY_SIZE = 1001  # SLURM's default, for a cluster that does not say
POLL_SECONDS = 5.0  # between two looks at the queue with --wait


class Job(NamedTuple):
    """What the settings ask for.

    Attributes:
      directives: the options of sbatch, as `#SBATCH` lines have them; the last of several counts.
      setup: lines of shell that the script runs before the worker.
      chain: sets of workers, each of which starts when the one before has ended.
      processes: that train a run together on each node.
    """

    directives: tuple[str, ...]
    setup: tuple[str, ...]
    chain: int
    processes: int


def launch(
    plan: Plan, workdir: Path, command: str, options: Options, stop: StopRequest
) -> int | None:
    """Submits workers for the runs that are not finished; there are no more tasks than runs.

    Returns:
      The number of runs that are not finished, if there is nothing to train or after `--wait`; None
      if workers go on.

    Raises:
      UserError: there is no `sbatch`, it refuses, or a setting is not valid; nothing is launched.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "--launcher=slurm: there is no sbatch on this machine; launch on a login node of the "
            "cluster, or load the module that has it"
        )
    workers, job = _workers(options), _job(options)
    retries = Retries(new_launch(), options.retries)
    is_new = not workdir.exists()
    with report_disk_errors(workdir):
        stored = write_sweep(plan, workdir, command, retries.launch)
        watch = SweepWatch(stored, retries, print_line)
        watch.look()
        if not watch.left:
            return watch.unfinished
        text = _script(plan, workdir, command, options, job, stored.digest, retries.launch)
        script = workdir / "slurm" / f"{retries.launch}.sh"
        script.parent.mkdir(exist_ok=True)
        write_atomically(script, text)
    try:
        tasks = min(workers, len(watch.left))
        jobs = _submit(script, tasks, job.chain)
    except UserError:
        script.unlink()
        if is_new and not any((workdir / "runs").iterdir()):
            shutil.rmtree(workdir)
        raise
    print(_describe(jobs, tasks, workdir), flush=True)
    if not options.wait:
        return None
    while watch.left and _in_queue(jobs):
        time.sleep(POLL_SECONDS)
        watch.look()
    watch.look(again=True)  # what happened before the last job ended
    return watch.unfinished


def dry_run(plan: Plan, workdir: Path, command: str, options: Options) -> str:
    """Returns the calls of sbatch and the script that they would get."""
    job, launch_id = _job(options), new_launch()
    script = workdir / "slurm" / f"{launch_id}.sh"
    tasks = min(_workers(options), len(plan.runs))
    calls = [shlex.join(_sbatch(script, each)) for each in _array_sizes(tasks)] * job.chain
    text = _script(plan, workdir, command, options, job, plan_digest(plan), launch_id)
    return "\n".join([*calls, f"{script}:", text]).rstrip()


def _workers(options: Options) -> int:
    if options.workers is None:
        raise UserError("--launcher=slurm needs --workers=N, the number of tasks of the job array")
    return options.workers


def _job(options: Options) -> Job:
    """Returns what the settings ask for.

    Raises:
      UserError: an option of sbatch is the launcher's own, a file cannot be read, or runs that
        have several processes are to share a GPU.
    """
    settings = {}
    for typed, value in options.settings.items():
        name = ALIASES.get(typed, typed.replace("_", "-"))
        if name in RESERVED:
            raise UserError(f"--slurm.{typed}: {RESERVED[name]}")
        if not value.isprintable():
            raise UserError(f"--slurm.{typed}={value!r}: the value must be on one line")
        settings[name] = value
    directives, setup = _read_lines(settings.pop("file", None))
    chain = _positive("chain", settings.pop("chain", "1"))
    processes = _positive(TASKS_PER_NODE, settings.pop(TASKS_PER_NODE, "1"))
    if options.worker_flags and options.nodes_per_run * processes > 1:
        raise UserError(
            f"{options.worker_flags[0]}: several processes train each run together, so runs cannot "
            "share a GPU; leave it out"
        )
    return Job((*directives, *_directives(settings)), setup, chain, processes)


def _positive(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"--slurm.{name}={value}: not an integer of at least 1")
    return int(value)


def _directives(settings: Mapping[str, str]) -> Iterator[str]:
    for name, value in settings.items():
        yield f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}"


def _read_lines(file: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the `#SBATCH` lines of a file, and its other lines."""
    if file is None:
        return (), ()
    try:
        lines = user_path(file).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"--slurm.file={file}: {reason}") from error
    lines = [line for line in lines if not line.startswith("#!")]
    directives = tuple(line for line in lines if line.startswith("#SBATCH"))
    return directives, tuple(line for line in lines if line not in directives)


def _script(
    plan: Plan,
    workdir: Path,
    command: str,
    options: Options,
    job: Job,
    digest: str,
    launch_id: str,
) -> str:
    """Returns the script of a task: options of sbatch, the environment, and the worker."""
    nodes, folder = options.nodes_per_run, workdir.absolute()
    output = str(folder / "slurm").replace("%", "%%") + "/%A_%a.log"
    defaults = {
        "job-name": f"resjax-{experiment_name(plan.experiment)}",
        "output": output,
        "open-mode": "append",
        "signal": f"B:USR1@{WARNING_SECONDS}",
        "nodes": str(nodes),
        TASKS_PER_NODE: str(job.processes),
    }
    module = "resjax.sweeps.worker" if nodes * job.processes == 1 else "resjax.sweeps.srun"
    worker = worker_command(module, workdir, digest, launch_id, options)
    lines = [
        "#!/bin/bash",
        *_directives(defaults),
        *job.directives,
        "",
        f"# {command}",
        f"cd {shlex.quote(str(Path.cwd()))} || exit",
        f"export PYTHONPATH={shlex.quote(worker_python_path())}",
        *job.setup,
        f"cores=$((SLURM_CPUS_ON_NODE / {job.processes}))",
        "export NPROC=${NPROC:-${SLURM_CPUS_PER_TASK:-$cores}}  # XLA's threads",
        f"exec {shlex.join(worker)}",
    ]
    return "\n".join(lines) + "\n"


def _submit(script: Path, tasks: int, chain: int) -> list[str]:
    """Submits `chain` sets of tasks, each after the other; returns the IDs of the jobs.

    Raises:
      UserError: sbatch refuses; jobs that it has taken before are cancelled.
    """
    jobs, before = list[str](), list[str]()
    try:
        for _ in range(chain):
            submitted = []
            for size in _array_sizes(tasks):
                done = _run(_sbatch(script, size, before))
                if done.returncode:
                    raise UserError(f"sbatch refuses: {_message(done)}; nothing was launched")
                jobs.append(done.stdout.strip().partition(";")[0])
                submitted.append(jobs[-1])
            before = submitted
    except BaseException:
        if jobs:
            _run(["scancel", *jobs])
        raise
    return jobs


def _sbatch(script: Path, tasks: int, after: Sequence[str] = ()) -> list[str]:
    dependency = [f"--dependency=afterany:{':'.join(after)}"] if after else []
    return ["sbatch", "--parsable", f"--array=0-{tasks - 1}", *dependency, str(script.absolute())]


def _array_sizes(tasks: int) -> list[int]:
    """Returns the sizes of the job arrays, each at most MaxArraySize, that have so many tasks."""
    shown = _run(["scontrol", "show", "config"])
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown.stdout, re.MULTILINE)
    largest = max(1, int(found[1]) if found else MAX_ARRAY_SIZE)
    return [min(largest, tasks - first) for first in range(0, tasks, largest)]


def _message(done: subprocess.CompletedProcess[str]) -> str:
    """Returns what a command of SLURM says, on one line."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Try ")]
    texts = [re.sub(r"^(sbatch: )?(error: )?", "", line).strip() for line in lines]
    return "; ".join(filter(None, texts)) or f"exit code {done.returncode}"


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command of SLURM, without the variables of a job from within which it is called."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name in ("SLURM_CONF", "SLURM_CLUSTERS")
    }
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: {error.strerror}")


def _describe(jobs: Sequence[str], tasks: int, workdir: Path) -> str:
    """Returns what was submitted, and what to type next."""
    names = " ".join(jobs)
    number = "1 worker" if tasks == 1 else f"{tasks} workers"
    where = shlex.quote(str(workdir))
    return "\n".join(
        [
            f"submitted {number} as SLURM jobs {names}; they write to {workdir / 'slurm'}",
            f"  resjax status {where}   shows the runs",
            f"  resjax report {where}   draws what is finished",
            f"  scancel {names}   saves the runs and stops the workers",
        ]
    )


def _in_queue(jobs: Sequence[str]) -> bool:
    """Returns whether a job waits or runs; a controller that does not answer changes nothing."""
    done = _run(["squeue", "--noheader", f"--user={os.getuid()}", "--format=%A %F"])
    return bool(done.returncode) or not {*done.stdout.split()}.isdisjoint(jobs)
