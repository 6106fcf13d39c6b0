"""Plans a run's dispatches: the steps that the device gets at once.

A line of metrics is one dispatch if its steps are fast. Slow steps are dispatched in equal parts of
a few seconds, between which a run can save and stop; that changes no result.
"""

from itertools import pairwise

from resjax.train.estimate import SECONDS_AT_ONCE
from resjax.train.trainer import Dispatch, Trainer


def plan(trainer: Trainer, first: int, within_line: bool = False) -> list[Dispatch]:
    """Returns a run's dispatches from a step on.

    They end at the steps of `ends_line`, and between them if steps are slow. A stream is dispatched
    step by step.

    Args:
      trainer: of the run.
      first: steps that have been taken.
      within_line: whether the last of these belong to a line that has not been written.
    """
    times = trainer.config.train
    every = range(first - first % times.log_every, times.steps, times.log_every)
    cuts = {*every, *(phase.first_step for phase in trainer.phases), times.steps}
    ends = sorted(cut for cut in cuts if first < cut <= times.steps)
    planned: list[Dispatch] = []
    for begin, end in pairwise([first, *ends]):
        parts = _parts(trainer, end - begin)
        part = parts > 1 or trainer.source.streamed or (within_line and begin == first)
        size = (end - begin) // parts
        planned += [Dispatch(trainer.phase_at(begin), size, part)] * parts
    return planned


def ends_line(trainer: Trainer, step: int) -> bool:
    """Returns whether a line of training metrics ends with a step.

    It does at multiples of `train.log_every`, at the last step, and before each phase.
    """
    times = trainer.config.train
    starts = (phase.first_step for phase in trainer.phases)
    return step % times.log_every == 0 or step in (times.steps, *starts)


def _parts(trainer: Trainer, steps: int) -> int:
    """Returns the number of equal parts of a line; one program serves all of them."""
    most = 1 if trainer.source.streamed else SECONDS_AT_ONCE / trainer.step_seconds
    return next(n for n in range(1, steps + 1) if steps % n == 0 and steps / n <= max(most, 1))
