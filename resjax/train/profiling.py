"""Profiles training steps: a trace for Perfetto or XProf, and the most expensive operations."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax

from resjax.train.trainer import Dispatch, StepRunner, Trainer


class Operation(NamedTuple):
    """All calls of one operation of the compiled program."""

    name: str
    seconds: float
    calls: int
    share: float  # of the time of all operations


def profile(trainer: Trainer, steps: int, folder: Path) -> list[Operation]:
    """Writes a trace of `steps` steps to `folder`, after as many steps to warm up.

    Returns:
      The operations, the most expensive first.
    """
    dispatch = Dispatch(phase=0, steps=steps)
    with StepRunner(trainer, seed=0, first_step=0) as runner:
        state, metrics = runner.run(trainer.init(0), dispatch)
        jax.block_until_ready(metrics)
        with jax.profiler.trace(str(folder), create_perfetto_trace=True):
            _, metrics = runner.run(state, dispatch)
            jax.block_until_ready(metrics)
    traces = folder.glob("plugins/profile/*/*.xplane.pb")
    return operations(max(traces, key=lambda path: path.stat().st_mtime))


def operations(trace: Path) -> list[Operation]:
    """Returns the operations in an .xplane.pb file, the most expensive first.

    An event with the statistic `hlo_op` is an operation, on accelerators as on CPUs. The events of
    loops and calls are left out: their time is that of the operations within them.
    """
    seconds, calls = Counter[str](), Counter[str]()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                operation = str(dict(event.stats).get("hlo_op", "while"))
                if not operation.startswith(("while", "call")):
                    seconds[event.name] += event.duration_ns / 1e9
                    calls[event.name] += 1
    total = sum(seconds.values())
    return [Operation(name, s, calls[name], s / total) for name, s in seconds.most_common()]
