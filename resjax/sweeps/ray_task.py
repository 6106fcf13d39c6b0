"""What Ray runs on a node: a worker of a sweep in a process of its own.

The task only starts the worker and waits for it. Ray sends this module's code to the node, whose
Python may lack resjax, so it imports nothing but the standard library and Ray.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.2  # between two checks whether the worker has ended or the task is canceled
ASSIGNED = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "TPU_VISIBLE_CHIPS",
)
"""Variables by which Ray assigns the accelerators of a node to tasks."""


def run_worker(
    command: list[str], directory: str, environment: dict[str, str], plan: str
) -> Iterator[tuple[Any, ...]]:
    """Runs a worker until it ends; if the task is canceled, the worker saves its run first.

    Args:
      command: the program and its arguments.
      directory: the working directory of the command.
      environment: its environment, to which the accelerators that Ray has assigned are added.
      plan: the file of the plan, which the node has to see.

    Yields:
      `("unfit", node, why)` if this node cannot run workers, and nothing else; otherwise
      `("started", host)`, then `("ended", exit code, last line of stderr)`.
    """
    import ray

    canceled: list[int] = []
    # To cancel a task, Ray calls the handler of SIGINT in this process. That of Python raises
    # KeyboardInterrupt anywhere, even while the worker is started or saves. There is none if the
    # cluster ignores SIGINT, as it does if a script has started it in the background.
    signal.signal(signal.SIGINT, lambda number, _: canceled.append(number))
    context = ray.get_runtime_context()
    host = socket.gethostname()
    if missing := _missing(command[0], directory, plan):
        remedy = "put it on a file system that all nodes share"
        why = f"the node {host} does not see {missing}; {remedy}"
        yield "unfit", context.get_node_id(), why
        return
    assigned = {name: os.environ[name] for name in ASSIGNED if name in os.environ}
    environment = {**assigned, **environment, "RAY_JOB_ID": context.get_job_id()}
    yield "started", host
    pipe, last = subprocess.PIPE, [""]
    # The worker ends when its stdin is closed, which is so if this process is killed.
    with subprocess.Popen(
        command, cwd=directory, env=environment, stdin=pipe, stderr=pipe, text=True
    ) as worker:
        reader = threading.Thread(target=_copy, args=(worker.stderr, last), daemon=True)
        reader.start()
        try:
            while worker.poll() is None and not canceled:
                time.sleep(POLL_SECONDS)
        finally:
            worker.terminate()
            worker.wait()
        reader.join()
    yield "ended", worker.returncode, last[0]


def answer() -> Iterator[None]:
    """Shows that tasks run, and that what they yield comes back."""
    yield


def _missing(python: str, directory: str, plan: str) -> str:
    """Returns the first path that a worker needs and this node does not see, or ""."""
    return next((each for each in (python, directory, plan) if not Path(each).exists()), "")


def _copy(stderr: Any, last: list[str]) -> None:
    """Copies the worker's messages to the log of the Ray worker, and keeps the last one."""
    for line in stderr:
        sys.stderr.write(line)
        sys.stderr.flush()
        last[0] = line.strip() or last[0]
