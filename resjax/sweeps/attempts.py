"""An attempt at one run: claims its folder, trains it and measures it, in the calling process."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from resjax.config import code_names, from_dict
from resjax.disk import report_disk_errors
from resjax.errors import UserError, one_line
from resjax.machine import threads
from resjax.run_files import RunError, recorded_threads
from resjax.sweeps.failures import Failure, Retries
from resjax.sweeps.measure import Measure, measure_run, needs_measuring
from resjax.sweeps.settled import settled
from resjax.sweeps.status import Measuring
from resjax.train.lock import Claim, try_claim
from resjax.train.progress import Progress, print_warning
from resjax.train.signals import StopRequest
from resjax.user_code import trust


class Held(NamedTuple):
    """Another process trains or measures the run."""

    holder: str = ""


class Finished(NamedTuple):
    """The run needs no attempt: others have meanwhile finished it, or used up its retries."""


class OtherThreads(NamedTuple):
    """The run began on another number of threads, which only another process can use."""

    threads: int


Outcome = Failure | RunError | Held | Finished | OtherThreads | None
"""The end of an attempt; None if the run is trained and measured.

A failure that is written to the run folder is a `RunError`.
"""

Report = Callable[[Progress | Measuring], None]


class Job(NamedTuple):
    """A run to train and to measure.

    Attributes:
      content: the resolved config of the run, as `to_dict` returns it.
      folder: the run folder.
      measure: the experiment's `measure`, if it has one.
      retries: how often the launch tries a run.
      attempts: the number of failed attempts, in case the folder could not record them.
      dead: the token of a lock in the folder whose holder is known to be dead.
    """

    content: dict[str, Any]
    folder: Path
    measure: Measure | None
    retries: Retries
    attempts: int = 0
    dead: str | None = None


Attempt = Callable[[Job, Report], Outcome]


def attempt(job: Job, report: Report, stop: StopRequest | None = None) -> Outcome:
    """Trains and measures one run in this process; returns the failure instead of raising it.

    Args:
      job: the run.
      report: called with the progress of the training, and when measuring begins.
      stop: a request to stop training.

    Raises:
      Stopped: stopping was requested; the run is saved.
    """
    try:
        with report_disk_errors(job.folder):
            claim = try_claim(job.folder, print_warning, job.dead)
    except Exception as error:
        return _failure(error, "failed")
    if claim is None:
        return Held()
    with claim:
        return _attempt_claimed(job, claim, report, stop)


def _attempt_claimed(job: Job, claim: Claim, report: Report, stop: StopRequest | None) -> Outcome:
    state = "failed"

    def report_stage(message: Progress | Measuring) -> None:
        nonlocal state
        if isinstance(message, Measuring):
            state = "not measured"
        report(message)

    try:
        return _train_and_measure(job, claim, report_stage, stop)
    except Exception as error:
        # While the run is claimed, so that no other worker starts one attempt too many.
        return job.retries.record(job.folder, _failure(error, state), job.attempts)


def _failure(error: Exception, state: str) -> Failure:
    users = isinstance(error, UserError)
    text = str(error) if users else one_line(error)
    return Failure(text, traceback.format_exc(), state, retry=not users)


def _train_and_measure(job: Job, claim: Claim, report: Report, stop: StopRequest | None) -> Outcome:
    from resjax.train.loop import train  # imports JAX, which takes seconds
    from resjax.xla.compilation_cache import enable_compilation_cache
    from resjax.xla.devices import require_devices

    folder, measure = job.folder, job.measure
    if settled(job.content, folder, measure, job.retries):
        return Finished()
    if other := _other_threads(folder):
        return other
    require_devices()
    enable_compilation_cache()
    config = from_dict(job.content)
    train(config, folder, report, stop=stop, claim=claim)
    if measure and needs_measuring(measure, folder):
        report(Measuring())
        trust(code_names(config))  # the user named this code when the sweep was launched
        measure_run(measure, folder, claim=claim)
    return None


def _other_threads(folder: Path) -> OtherThreads | None:
    began = recorded_threads(folder)
    return None if began in (None, threads()) else OtherThreads(began)
