"""The workers of a launch on a Ray cluster, each of them a Ray task."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from resjax.errors import UserError, one_line
from resjax.sweeps import ray_task
from resjax.train.progress import print_warning

POLL_SECONDS = 0.2  # between two looks at workers that are to end
CANCEL_SECONDS = 5.0  # after which the cancellation of a task that goes on is repeated
CLOSE_SECONDS = 10.0  # in which a worker ends that finds no run
PATIENCE_SECONDS = 15.0  # after which a line says that workers wait for resources
SOON_SECONDS = 60.0  # a worker that is lost sooner has probably trained nothing
LOSSES = 3  # of workers in a row, all of them soon, after which no other is started


class Share(NamedTuple):
    """What each worker gets of a node."""

    cpus: int
    gpus: float

    @property
    def text(self) -> str:
        """The share for messages, such as `2 CPUs and 0.5 GPUs`."""
        cpus = "1 CPU" if self.cpus == 1 else f"{self.cpus} CPUs"
        gpus = "1 GPU" if self.gpus == 1 else f"{self.gpus:g} GPUs"
        return f"{cpus} and {gpus}" if self.gpus else cpus

    def room(self, resources: Mapping[str, float]) -> int:
        """Returns the number of workers for which the resources of a node suffice."""
        cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
        room = int(cpus / self.cpus)
        if not self.gpus:
            return room
        # Workers that share a GPU never share two.
        return min(room, int(gpus) * int(1 / self.gpus) if self.gpus < 1 else int(gpus / self.gpus))


@dataclass
class Task:
    """The Ray task of a worker."""

    events: Any  # a generator of references to what `run_worker` yields
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    host: str = ""


class Pool:
    """Starts workers and notices how they end; closing it stops those that are left."""

    def __init__(self, ray: Any, share: Share, arguments: tuple[Any, ...]):
        """Starts no worker yet.

        Args:
          ray: the module, connected to a cluster.
          share: the resources of each worker.
          arguments: of `ray_task.run_worker`.
        """
        # Lost workers are started again here, where one sees whether runs are left.
        options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_retries": 0}
        self._function = ray.remote(num_returns="streaming", **options)(ray_task.run_worker)
        self._ray, self._share, self._arguments = ray, share, arguments
        self._unfit: list[str] = []  # nodes that cannot run a worker
        self._losses, self._why = 0, ""
        self._waited = False  # whether a line has said so
        self.workers: list[Task] = []

    @property
    def job(self) -> str:
        """The ID of the Ray job, which the locks of its workers name."""
        return self._ray.get_runtime_context().get_job_id()

    def start(self, number: int) -> None:
        """Starts workers, unless the last ones were all lost.

        Raises:
          UserError: they were, and no other is left.
        """
        if number > 0 and self._losses >= LOSSES:
            if not self.workers:
                raise UserError(f"--launcher=ray: {self._losses} workers were lost: {self._why}")
            return
        options = {}
        if self._unfit:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(self._unfit)})"}
        function = self._function.options(**options)
        self.workers += [Task(function.remote(*self._arguments)) for _ in range(number)]

    def progressed(self) -> None:
        """Forgets about lost workers, because runs have ended since."""
        self._losses = 0

    def poll(self) -> None:
        """Receives what has happened to the workers, and forgets those that have ended.

        Raises:
          UserError: no node is left that can run a worker.
        """
        for task in [*self.workers]:
            while self._ray.wait([task.events], timeout=0)[0]:
                try:
                    self._receive(task, *self._ray.get(next(task.events)))
                except StopIteration:
                    self.workers.remove(task)
                    break
                except self._ray.exceptions.RayError as error:
                    self._lose(task, one_line(error))
        self._say_that_workers_wait()

    def stop(self) -> None:
        """Stops the workers, which save their runs first, and waits for them."""
        while self.workers:
            # A cancellation may be lost, for example if it arrives before the task runs.
            for task in self.workers:
                self._ray.cancel(task.events)
            ends = {task.events.completed(): task for task in self.workers}
            ended, _ = self._ray.wait([*ends], num_returns=len(ends), timeout=CANCEL_SECONDS)
            for end in ended:
                self.workers.remove(ends[end])

    def close(self) -> None:
        """Waits for workers that end because no run is left; stops those that do not."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while self.workers and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self.poll()
        self.stop()

    def _receive(self, task: Task, event: str, *values: Any) -> None:
        """Handles what `run_worker` yields."""
        if event == "started":
            (task.host,), task.started = values, time.monotonic()
        elif event == "unfit":
            node, why = values
            is_news = node not in self._unfit
            self._unfit += [node] * is_news
            self._require_node(why)
            if is_news:
                print_warning(why)
        elif code := values[0]:
            self._lose(task, values[1] or f"exit code {code}")

    def _lose(self, task: Task, why: str) -> None:
        lived = 0.0 if task.started is None else time.monotonic() - task.started
        self._losses = 1 if lived > SOON_SECONDS else self._losses + 1
        self._why = why
        print_warning(f"a worker on {task.host or 'the cluster'} was lost: {why}")

    def _require_node(self, why: str) -> None:
        fit = [
            node
            for node in self._ray.nodes()
            if node["Alive"] and node["NodeID"] not in self._unfit
        ]
        if not any(self._share.room(node["Resources"]) for node in fit):
            raise UserError(f"--launcher=ray: {why}; no other node has room for a worker")

    def _say_that_workers_wait(self) -> None:
        now = time.monotonic()
        waiting = [task for task in self.workers if task.started is None]
        if any(now - task.submitted > PATIENCE_SECONDS for task in waiting) and not self._waited:
            self._waited = True
            number = f"{len(waiting)} of {len(self.workers)} workers"
            print_warning(f"{number} wait for {self._share.text} each; the Ray cluster is busy")
