"""The launchers, which start workers somewhere: on this machine, on a cluster.

A launcher is a module. Workers of several launchers may train one sweep at the same time, because
each run is claimed by a lock in its folder.
"""

import os
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from resjax.errors import UserError
from resjax.models.presets import nearest
from resjax.train.signals import SAVE_ON

if TYPE_CHECKING:
    from resjax.sweeps.experiment import Plan
    from resjax.train.signals import StopRequest

LAUNCHERS = {
    "local": "resjax.sweeps.local",
    "ray": "resjax.sweeps.ray_cluster",
    "slurm": "resjax.sweeps.slurm",
}
"""The module of each launcher by the name that `--launcher` takes."""


@dataclass(frozen=True)
class Options:
    """How the runs of a plan are trained.

    Attributes:
      workers: how many runs are trained at the same time; None leaves it to the launcher.
      retries: how often a run that failed is tried again.
      settings: the launcher's own settings: `--slurm.time=60` is `{"time": "60"}`.
      wait: whether to wait for workers that could go on after the command.
      nodes_per_run: how many nodes train a run together.
      per_gpu: how many runs share a GPU of a worker's machine, or "auto" for the number that is
        measured to be fastest; None leaves it to `workers`.
      mps: whether NVIDIA's MPS serves processes that share a GPU.
      save_on: the signals after which a run saves and goes on.
    """

    workers: int | None = None
    retries: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)
    wait: bool = False
    nodes_per_run: int = 1
    per_gpu: int | Literal["auto"] | None = None
    mps: bool = False
    save_on: tuple[int, ...] = SAVE_ON

    @property
    def worker_flags(self) -> list[str]:
        """The options of `python -m resjax.sweeps.worker` that say how it shares its GPUs."""
        shared = [] if self.per_gpu is None else [f"--workers-per-gpu={self.per_gpu}"]
        return shared + ["--mps"] * self.mps


def per_gpu(text: str) -> int | Literal["auto"]:
    """An argument type: a number of workers per GPU, or auto."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is neither auto nor an integer of at least 1")
    return int(text)


class Launcher(Protocol):
    """A module that starts workers.

    Attributes:
      SETTINGS: the known settings `--NAME.KEY=VALUE` and their help; None if every key is accepted,
        because another program checks it, such as the `sbatch` of a cluster.
    """

    SETTINGS: Mapping[str, str] | None

    def launch(
        self, plan: "Plan", workdir: Path, command: str, options: Options, stop: "StopRequest"
    ) -> int | None:
        """Trains and measures the runs of a plan.

        Returns:
          How many runs are not finished; None if workers go on after this call.
        """

    def dry_run(self, plan: "Plan", workdir: Path, command: str, options: Options) -> str:
        """Returns what `launch` would start, as text; writes nothing."""


def worker_command(
    module: str, workdir: Path, plan: str, launch: str, options: Options
) -> list[str]:
    """Returns the command of a worker that another machine starts.

    Args:
      module: `resjax.sweeps.worker`, or one that takes its arguments.
      workdir: the sweep folder.
      plan: the digest of the plan.
      launch: the ID of the launch.
      options: the options of the launch.
    """
    # -P: a file of the working directory never takes precedence over an installed module.
    program = [sys.executable, "-P", "-m", module, str(workdir.absolute())]
    named = [f"--plan={plan}", f"--launch={launch}", f"--retries={options.retries}"]
    named += options.worker_flags
    if options.save_on != SAVE_ON:
        names = (signal.Signals(each).name.removeprefix("SIG") for each in options.save_on)
        named.append(f"--save-on={','.join(names)}")
    return [*program, *named]


def worker_python_path() -> str:
    """Returns PYTHONPATH with absolute paths, and the folder of a resjax that is not installed."""
    folders = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    package = Path(__file__).parents[2]
    installed = package.name in ("site-packages", "dist-packages")
    own = [] if installed else [str(package)]
    return os.pathsep.join([*(str(Path(each).absolute()) for each in folders), *own])


def find_launcher(name: str, settings: Mapping[str, Mapping[str, str]]) -> Launcher:
    """Returns a launcher after checking the names of its settings.

    Args:
      name: the name of the launcher.
      settings: the settings that were typed, by launcher.

    Raises:
      UserError: a setting is unknown or belongs to another launcher.
    """
    for other in settings.keys() - {name}:
        raise UserError(
            f"--{other}.{next(iter(settings[other]))} needs --launcher={other}; the launcher is "
            f"{name}"
        )
    launcher = cast(Launcher, import_module(LAUNCHERS[name]))
    known = launcher.SETTINGS
    for key in settings.get(name, ()):
        if known is not None and key not in known:
            hint = nearest(key, known) or f"; known: {', '.join(known) or 'none'}"
            raise UserError(f"--{name}.{key}: the launcher {name} has no such setting{hint}")
    return launcher
