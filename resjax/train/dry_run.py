"""What a run needs, from the programs that it would compile: nothing is trained or written.

The devices may be described ones (`resjax.xla.topologies`), so the question can be asked before a
job is queued. State and data are shapes, and take no memory.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import jax

from resjax.config import Config
from resjax.train.loop import compile_programs, describe, what_compiles
from resjax.train.memory import largest_batch, require_memory
from resjax.train.parallel import device_memory
from resjax.train.plan import plan
from resjax.train.state import TrainState
from resjax.train.trainer import Dispatch, Executable, Trainer
from resjax.xla.ceilings import product_rate
from resjax.xla.program import Program
from resjax.xla.target import Target, compiling_for, described_target, devices, platform
from resjax.xla.topologies import CHIPS

MIB = 2**20
SIDE = {"cpu": 1024}  # of the product that measures a device without known rates
LARGE_SIDE = 8192


def dry_run(config: Config, announce: Callable[[str], None]) -> dict[str, str]:
    """Compiles what a run would; returns what it needs, in words by name.

    Args:
      config: resolved.
      announce: called with the data, with what is compiled, and with a summary of the programs.

    Raises:
      UserError: data, devices or options do not allow the run, or it does not fit into memory.
    """
    here = Target(jax.devices(), device_memory(), present=True)
    with nullcontext() if described_target() else compiling_for(here):
        trainer = Trainer(config)
        trainer.require_layers()
        dispatches = plan(trainer, 0)
        announce(trainer.source.description)
        announce(f"compiling {what_compiles(trainer, set(dispatches))} ...")
        state = trainer.start(config.seed)
        largest = max(dispatches)
        entered = trainer.enter_phase(state, largest.phase)
        require_memory(trainer, entered, largest)
        programs = compile_programs(trainer, state, set(dispatches))
        evaluations = [trainer.compile_evaluation(state, each) for each in trainer.evaluated_splits]
        seconds = sum(each.compile_seconds for each in {*programs.values(), *evaluations})
        announce(describe(trainer, programs, seconds))
        return {
            "memory per device": _memory(programs[largest], evaluations),
            "largest batch": _largest_batch(trainer, entered, largest),
            **_times(trainer, state, programs),
        }


def _memory(program: Executable, evaluations: list[Executable]) -> str:
    available = device_memory()
    parts = [
        f"{_mib(program.peak_bytes)} for training",
        *(f"{_mib(each.peak_bytes)} for evaluation" for each in evaluations[:1]),
    ]
    fits = f"fits into {_mib(available)}" if available else "the device's memory is not known"
    return f"{', '.join(parts)}; {fits}"


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / MIB:,.0f} MiB"


def _largest_batch(trainer: Trainer, state: TrainState, dispatch: Dispatch) -> str:
    size = largest_batch(trainer, state, dispatch)
    if size is None:
        return "not known, because the memory is not"
    most = trainer.source.examples["train"]
    whole = (
        f", the training split of {most:,} images" if size > most - trainer.backend.devices else ""
    )
    return f"data.batch_size={size} fits, compiled to be sure{whole}"


def _times(
    trainer: Trainer, state: TrainState, programs: Mapping[Dispatch, Executable]
) -> dict[str, str]:
    """Returns lower bounds of the times of a step and of the run, and what a compiler predicts."""
    train, source = trainer.config.train, trainer.source
    steps = Counter[int]()
    for dispatch in plan(trainer, 0):
        steps[dispatch.phase] += dispatch.steps
    flops = {phase: trainer.step_flops(trainer.enter_phase(state, phase), phase) for phase in steps}
    count = -(-train.steps // train.eval_every)
    averages = 2 if trainer.config.optimizer.ema_decay else 1
    images = averages * sum(source.examples[split] for split in trainer.evaluated_splits)
    rate, how = _rate(trainer)
    total = sum(flops[phase] * steps[phase] for phase in steps)
    total += count * 2 * trainer.counts.macs * images
    step = max(flops.values())
    times = {
        "FLOPs per step": f"{step:.3g} in convolutions and matrix products, on all devices",
        "time per step": f"at least {duration(step / rate)}, by arithmetic at {how}",
        "time of the run": f"at least {duration(total / rate)} for {train.steps:,} steps and "
        f"{count:,} evaluations, besides compilation and input",
    }
    if chip := CHIPS.get(devices()[0].device_kind):
        dtype = trainer.config.model.dtype
        predicted = {
            dispatch.phase: Program(program.call.as_text()).seconds(chip, dtype)
            / (1 if source.streamed else dispatch.steps)
            for dispatch, program in programs.items()
        }
        run = sum(predicted[phase] * steps[phase] for phase in steps)
        times["time per step"] += f"; predicted {duration(max(predicted.values()))}"
        times["time of the run"] += f"; predicted {duration(run)} without evaluations"
    return times


def _rate(trainer: Trainer) -> tuple[float, str]:
    """Returns the FLOP/s of all devices at most, and what that is based on."""
    dtype, found = trainer.config.model.dtype, devices()
    kind = found[0].device_kind
    if chip := CHIPS.get(kind):
        peak = chip.flops[dtype]
        return len(found) * peak, f"{len(found)} x {peak / 1e12:,.0f} TFLOP/s, the peak of {kind}"
    side = SIDE.get(platform(), LARGE_SIDE)
    measured = product_rate(dtype, side, repetitions=3)
    # CPU devices share the cores.
    rate = measured if platform() == "cpu" else len(found) * measured
    return rate, f"{rate / 1e9:,.0f} GFLOP/s, measured in a product of matrices"


def duration(seconds: float) -> str:
    """Returns a time with three digits and its unit."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
