"""The Ray launcher: trains the runs of a plan in tasks of a Ray cluster.

Each task runs one worker on a node that shares the sweep folder. The launcher starts lost workers
again, and shows what the sweep folder says about the runs. It needs Ray's core alone. Ray counts
resources and does not enforce them, so a worker gets as many threads as its task has CPUs, and its
share of a GPU's memory, before JAX is imported.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from resjax.disk import report_disk_errors
from resjax.errors import UserError, first_few, one_line
from resjax.machine import available_cores
from resjax.sweeps import ray_task
from resjax.sweeps.experiment import Plan
from resjax.sweeps.failures import Retries
from resjax.sweeps.launchers import Options, worker_command, worker_python_path
from resjax.sweeps.plan_files import new_launch, plan_file, write_sweep
from resjax.sweeps.ray_pool import Pool, Share
from resjax.sweeps.status import RunStatus, shown
from resjax.sweeps.watching import SweepWatch
from resjax.sweeps.workers import GPU_MEMORY
from resjax.train.lock import read_holder
from resjax.train.signals import Stopped, StopRequest

SETTINGS = {
    "address": "auto (RAY_ADDRESS, or the cluster of this machine), HOST:PORT, or local",
    "cpus": "CPUs per worker, which is also its number of threads",
    "gpus": "GPUs per worker, such as 0.5 for two workers on each GPU",
    "autoscaling": "the cluster adds nodes: wait for one with room for a worker",
}
WORKER = "resjax.sweeps.ray_worker"
POLL_SECONDS = 0.5  # between two looks at the tasks
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0  # in which a task that needs nothing ends
OBJECT_STORE_BYTES = 100_000_000  # the tasks exchange a few texts
QUICK = {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_py_gcs_connect_timeout_s": "5"}
"""Without these, Ray tries for minutes to connect to what is no cluster, or refuses the token."""


def launch(plan: Plan, workdir: Path, command: str, options: Options, stop: StopRequest) -> int:
    """Trains and measures the runs of `plan`; returns how many are still not finished.

    Args:
      plan: the resolved runs.
      workdir: the sweep folder, which the nodes share.
      command: the command line, for `sweep.json`.
      options: the number of workers (None: as many as the cluster has room for), how often a failed
        run is tried again, and values for `SETTINGS`.
      stop: a request to stop, after which the workers save their runs.

    Raises:
      UserError: a setting is wrong, Ray is not installed or does not run at the address, no node
        has room for a worker or sees the sweep folder, or this machine cannot write to it.
      Stopped: stopping was requested; says how many of the runs under way have saved.
    """
    cpus, gpus = _typed_share(options.settings)
    with _connected(options.settings.get("address", "auto")) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = choose_share(cpus, gpus, nodes)
        require_room(share, nodes, options)
        launch_id = new_launch()
        with report_disk_errors(workdir):
            stored = write_sweep(plan, workdir, command, launch_id)
        worker = worker_command(WORKER, workdir, stored.digest, launch_id, options)
        plan_path = str(plan_file(workdir.absolute(), stored.digest))
        pool = Pool(ray, share, (worker, str(Path.cwd()), _environment(share), plan_path))
        with shown(stored.runs) as show_end, closing(pool), stop.graceful():
            watch = SweepWatch(stored, Retries(launch_id, options.retries), show_end)
            _supervise(pool, watch, options.workers or max(1, sum(map(share.room, nodes))), stop)
        return watch.unfinished


def dry_run(plan: Plan, workdir: Path, command: str, options: Options) -> str:
    """Returns what would be started, without a look at the cluster."""
    settings = options.settings
    cpus, gpus = _typed_share(settings)
    number = options.workers and min(options.workers, len(plan.runs))
    lines = [
        f"workers: {number or 'as many as the cluster has room for'}",
        f"CPUs per worker: {cpus or '1, or the part of a node that goes with its GPUs'}",
        f"GPUs per worker: {'1 if the cluster has any' if gpus is None else f'{gpus:g}'}",
        *(f"option of each worker: {flag}" for flag in options.worker_flags),
        f"would train on the Ray cluster {settings.get('address', 'auto')}, in {workdir}:",
    ]
    return "\n".join([*lines, *(f"  runs/{run.name}" for run in plan.runs)])


def _typed_share(settings: Mapping[str, str]) -> tuple[int | None, float | None]:
    """Returns the CPUs and GPUs per worker, None for what was not typed."""
    cpus, gpus = settings.get("cpus"), settings.get("gpus")
    if cpus is not None and not (cpus.isdecimal() and int(cpus)):
        raise UserError(f"--ray.cpus={cpus}: not an integer of at least 1")
    if settings.get("autoscaling"):
        raise UserError("--ray.autoscaling takes no value")
    if gpus is None:
        return (cpus and int(cpus)) or None, None
    try:
        number = float(gpus)
    except ValueError:
        number = -1.0
    if not (0 <= number <= 1 or (number.is_integer() and number > 0)):
        raise UserError(
            f"--ray.gpus={gpus}: not a number of GPUs, such as 2, or a part of one, such as 0.5"
        )
    return (cpus and int(cpus)) or None, number


def choose_share(
    cpus: int | None, gpus: float | None, nodes: Sequence[Mapping[str, float]]
) -> Share:
    """Returns the share per worker: by default a GPU, if there is any, and its part of the CPUs.

    All workers have the same number of CPUs, so that no result depends on which one trained a run.

    Args:
      cpus: CPUs per worker, if they were chosen.
      gpus: GPUs per worker, if they were chosen.
      nodes: the resources of each node.
    """
    with_gpus = [node for node in nodes if node.get("GPU")]
    if gpus is None:
        gpus = 1.0 if with_gpus else 0.0
    if cpus is None:
        parts = [int(node.get("CPU", 0) * gpus / node["GPU"]) for node in with_gpus if gpus]
        cpus = max(1, min(parts, default=1))
    return Share(cpus, gpus)


def require_room(share: Share, nodes: Sequence[Mapping[str, float]], options: Options) -> None:
    """Checks that a worker fits on some node, and that its options fit its share.

    Raises:
      UserError: they do not.
    """
    if options.worker_flags and not share.gpus:
        flag = options.worker_flags[0]
        raise UserError(f"{flag}: the workers get no GPU to share; add --ray.gpus=1")
    if not any(map(share.room, nodes)) and "autoscaling" not in options.settings:
        has = {Share(int(node.get("CPU", 0)), node.get("GPU", 0.0)).text for node in nodes}
        raise UserError(
            f"--launcher=ray: no node of the cluster has {share.text} for a worker; they have "
            f"{first_few(sorted(has), separator=' or ')}; lower --ray.cpus or --ray.gpus, or add "
            "--ray.autoscaling if the cluster adds nodes"
        )


def _environment(share: Share) -> dict[str, str]:
    """Returns this command's environment for a worker, with its share of the node."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ray_task.ASSIGNED and not name.startswith("RAY_")
    }
    environment["PYTHONPATH"] = worker_python_path()
    environment["NPROC"] = str(share.cpus)
    if share.gpus:
        fraction = f"{GPU_MEMORY * min(share.gpus, 1):.3f}"
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = fraction
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _supervise(pool: Pool, watch: SweepWatch, workers: int, stop: StopRequest) -> None:
    """Keeps workers running until no run is left that they could take, or a stop is requested."""
    watch.look()
    while watch.left and not stop.signal:
        # A worker that ends leaves no run that it could take; one that is lost may.
        wanted = min(workers, len(pool.workers) + len(watch.open))
        pool.start(wanted - len(pool.workers))
        time.sleep(POLL_SECONDS)
        pool.poll()
        left = len(watch.left)
        watch.look()
        if len(watch.left) < left:
            pool.progressed()
    if not stop.signal:
        return
    watch.look(again=True)  # at the runs that workers have begun since
    if watch.left:
        under_way = watch.held_by(f"Ray {pool.job}")
        pool.stop()
        saved = sum(not _is_held(run) for run in under_way)
        raise Stopped(stop.signal, f"; {saved} of {len(under_way)} runs under way have saved")


def _is_held(run: RunStatus) -> bool:
    """Returns whether the lock of a run still names the holder that the last look has seen.

    A worker of another launch may have taken a run that a worker of this one has saved.
    """
    holder = read_holder(run.folder)
    return holder is not None and holder.get("token") == (run.holder or {}).get("token")


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Connects this process to a cluster, or starts a local one; yields the module `ray`.

    Raises:
      UserError: Ray is not installed, does not run there, or refuses the connection.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            '--launcher=ray: Ray is not installed; install it by `pip install "resjax[ray]"`'
        )
    options = _local_options() if address == "local" else _cluster_options(address)
    ray = importlib.import_module("ray")
    ray.cloudpickle.register_pickle_by_value(ray_task)  # the Python of a node may lack resjax
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with _stderr_dropped():
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--ray.address={address}: {_reason(error)}") from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray's would end this process at once
    try:
        _require_answer(ray, address)
        yield ray
    finally:
        ray.shutdown()


def _accepts_no_token(address: str) -> bool:
    """Returns whether a cluster lets a process without a token connect.

    Ray decides once per process whether it sends a token. A cluster without tokens accepts one that
    does, and then neither side notices that nothing comes back.
    """
    connect = f"import ray; ray.init(address={address!r}, log_to_driver=False)"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-P", "-c", connect]
    tried = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return "InvalidAuthToken" not in tried.stderr


def _require_answer(ray: Any, address: str) -> None:
    """Checks that what tasks yield comes back.

    Raises:
      UserError: it does not.
    """
    options = {"num_cpus": 0, "max_retries": 0, "num_returns": "streaming"}
    answer = ray.remote(**options)(ray_task.answer).remote()
    if not ray.wait([answer], timeout=ANSWER_SECONDS)[0]:
        raise UserError(
            f"--ray.address={address}: no task answers within {ANSWER_SECONDS:g} s; if the cluster "
            "runs without token authentication, set RAY_AUTH_MODE=disabled"
        )


@contextmanager
def _stderr_dropped() -> Iterator[None]:
    """Drops what Ray's C++ code logs about each attempt to connect."""
    sys.stderr.flush()
    stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nothing)


def _local_options() -> dict[str, Any]:
    """Returns how a cluster of this machine is started, which ends with this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return {
        "address": "local",
        "num_cpus": available_cores(),
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }


def _cluster_options(address: str) -> dict[str, Any]:
    """Returns how to connect to a cluster, and sets what Ray reads when it is imported.

    Raises:
      UserError: nothing listens there.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    if address != "auto":  # for which Ray looks on this machine
        _require_listener(address)
    os.environ.update({name: os.environ.get(name, value) for name, value in QUICK.items()})
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "disabled" if _accepts_no_token(address) else "token"
    return {"address": address}


def _require_listener(address: str) -> None:
    """Raises UserError if nothing listens at HOST:PORT."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdecimal()) or "/" in host:
        raise UserError(
            f"--ray.address={address}: not auto, local or HOST:PORT, the address that "
            "`ray start --head` prints"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--ray.address={address}: no Ray cluster answers there: {error}; start one by "
            "`ray start --head`, or use --ray.address=local"
        ) from error


def _reason(error: BaseException) -> str:
    """Returns on one line why Ray did not connect."""
    causes = list(_causes(error))
    text = " ".join(map(str, causes))
    if _refuses_token(error):
        return (
            "the cluster requires its token; copy what `ray get-auth-token` prints there to "
            "~/.ray/auth_token, or set RAY_AUTH_TOKEN"
        )
    if "Could not find any running Ray instance" in text:
        return (
            "no Ray cluster runs on this machine; name one by --ray.address=HOST:PORT, or start "
            "one by --ray.address=local"
        )
    if "TimedOut" in text or "Timed out" in text:
        return "what answers there is not Ray, or is too slow"
    return one_line(causes[0])


def _refuses_token(error: BaseException) -> bool:
    return any("authentication token" in str(cause).lower() for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
