"""Where a step's time goes: a trace for Perfetto or XProf, and the operations that cost most."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jax

from resjax.train.step import Program


class Operation(NamedTuple):
    """An operation of the compiled program, all its calls together."""

    name: str
    seconds: float
    calls: int
    share: float  # of the time of all operations


def profile(program: Program, steps: int, folder: Path) -> list[Operation]:
    """Traces `steps` steps of a fresh state into `folder`, after as many to warm up.

    Returns:
      The operations, the most expensive first.
    """
    state, metrics = program.steps(program.init(0), steps)
    jax.block_until_ready(metrics)
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        _, metrics = program.steps(state, steps)
        jax.block_until_ready(metrics)
    newest = max(
        folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime
    )
    return operations(newest)


def operations(trace: Path) -> list[Operation]:
    """The operations in a trace, the most expensive first.

    On an accelerator they lie on its own lines; on CPU on those of the threads, where an event of
    the compiled program names its HLO operation. A loop's own event covers what runs within it, so
    it is left out.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" not in stats or str(stats["hlo_op"]).startswith(("while", "call")):
                    continue
                seconds[event.name] += event.duration_ns / 1e9
                calls[event.name] += 1
    total = sum(seconds.values())
    ranked = sorted(seconds, key=seconds.__getitem__, reverse=True)
    return [Operation(name, seconds[name], calls[name], seconds[name] / total) for name in ranked]
