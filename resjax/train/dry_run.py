"""Reports memory, FLOPs and times of a run without training it.

The report is computed from the programs that the run would compile. The devices may be those of a
topology that a compiler describes (`resjax.xla.topologies`), so that a job can be checked before it
is queued. The state and the data are shapes without arrays.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import jax

from resjax.config import Config
from resjax.train.loop import compile_programs, describe, describe_compilation
from resjax.train.memory import largest_batch, require_memory
from resjax.train.parallel import batch_unit, device_memory
from resjax.train.plan import plan
from resjax.train.state import TrainState
from resjax.train.trainer import Dispatch, Executable, Trainer
from resjax.xla.ceilings import product_rate
from resjax.xla.program import Program
from resjax.xla.target import Target, compiling_for, described_target, devices, platform
from resjax.xla.topologies import CHIPS

MIB = 2**20
# Sides of the matrices whose product measures the speed of a device that is not in CHIPS.
CPU_SIDE, ACCELERATOR_SIDE = 1024, 8192


def dry_run(config: Config, announce: Callable[[str], None]) -> dict[str, str]:
    """Compiles the programs of a run and returns a report: names of quantities and their texts.

    Args:
      config: the resolved config of the run.
      announce: called with descriptions of the dataset and of what is compiled, and with a summary
        of the programs.

    Raises:
      UserError: the run would be refused: its dataset is missing, options contradict each other, or
        it does not fit into memory.
    """
    here = Target(jax.devices(), device_memory(), present=True)
    with nullcontext() if described_target() else compiling_for(here):
        trainer = Trainer(config)
        trainer.require_layers()
        dispatches = plan(trainer, 0)
        announce(trainer.source.description)
        announce(f"compiling {describe_compilation(trainer, set(dispatches))} ...")
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
    evaluation = max(evaluations, key=lambda each: each.peak_bytes or 0)
    needed = (
        f"{_mib(program.peak_bytes)} for training, {_mib(evaluation.peak_bytes)} for evaluation"
    )
    fits = f"fits into {_mib(available)}" if available else "the device's memory is unknown"
    return f"{needed}; {fits}"


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / MIB:,.0f} MiB"


def _largest_batch(trainer: Trainer, state: TrainState, dispatch: Dispatch) -> str:
    size = largest_batch(trainer, state, dispatch)
    if size is None:
        return "unknown, because the memory is unknown"
    most = trainer.source.examples["train"]
    unit = batch_unit(trainer.config, trainer.backend.devices)
    whole = f"; the training split has {most:,} images" if size > most - unit else ""
    return f"data.batch_size={size} fits, compiled to be sure{whole}"


def _times(
    trainer: Trainer, state: TrainState, programs: Mapping[Dispatch, Executable]
) -> dict[str, str]:
    """Returns FLOPs, and lower bounds and predictions of the times of a step and of the run."""
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
    """Returns the highest FLOP/s of all devices together, and the source of this number."""
    dtype, found = trainer.config.model.dtype, devices()
    kind = found[0].device_kind
    if chip := CHIPS.get(kind):
        peak = chip.flops[dtype]
        return len(found) * peak, f"{len(found)} x {peak / 1e12:,.0f} TFLOP/s, the peak of {kind}"
    if platform() == "cpu":  # CPU devices share the cores
        rate = product_rate(dtype, CPU_SIDE, repetitions=3)
    else:
        rate = len(found) * product_rate(dtype, ACCELERATOR_SIDE, repetitions=3)
    return rate, f"{rate / 1e9:,.0f} GFLOP/s, measured in a product of matrices"


def duration(seconds: float) -> str:
    """Returns a time with three significant digits and its unit."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
