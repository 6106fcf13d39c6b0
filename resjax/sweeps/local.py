"""The local launcher: trains the runs of a plan on this machine, one or several at a time.

A run is identified by its config, so launching again skips finished runs and resumes the others.
If the experiment has a `measure`, the process that has trained a run also measures it, and the next
launch measures finished runs that lack measurements. A run that fails leaves its traceback in
`error.txt`; the other runs go on. Several launches may work in one folder at the same time.
"""

from functools import partial
from pathlib import Path

from resjax.disk import report_disk_errors
from resjax.sweeps.attempts import Job, OtherThreads, Outcome, Report, attempt
from resjax.sweeps.experiment import Plan
from resjax.sweeps.failures import Retries
from resjax.sweeps.launchers import Options
from resjax.sweeps.packing import describe_sharing, require_sharing, shared_devices
from resjax.sweeps.plan_files import StoredPlan, new_launch, write_sweep
from resjax.sweeps.queue import RunQueue
from resjax.sweeps.status import FINISHED, shown
from resjax.sweeps.workers import (
    Worker,
    default_workers,
    divide_machine,
    supervise,
    whole_machine,
)
from resjax.train.signals import Stopped, StopRequest

SETTINGS: dict[str, str] = {}


def launch(plan: Plan, workdir: Path, command: str, options: Options, stop: StopRequest) -> int:
    """Trains and measures the runs of `plan` in `workdir`; returns how many are still not finished.

    A run that is trained but not measured counts as not finished. Writes the plan, and the run
    folders under `runs/`.

    Args:
      plan: the resolved runs.
      workdir: the sweep folder.
      command: the command line, for `sweep.json`.
      options: how many processes train at the same time, each on its share of the machine (1 trains
        in this process; None is the number that was measured to be fastest), and how often a failed
        run is tried again.
      stop: a request to stop, which is checked between dispatches.

    Raises:
      UserError: `workdir` cannot be written, or this machine lacks what `options` asks for.
      Stopped: stopping was requested; says how many of the runs under way have saved.
    """
    require_sharing(options)
    retries = Retries(new_launch(), options.retries)
    with report_disk_errors(workdir):
        stored = write_sweep(plan, workdir, command, retries.launch)
        runs = stored.runs
        with shown(runs) as show_end:
            queue = RunQueue(runs, stored.measure, retries, show_end, stop)
            if queue.skip_settled():
                _train(queue, stored, workdir, options, stop)
    return sum(run.state not in FINISHED for run in runs)


def dry_run(plan: Plan, workdir: Path, command: str, options: Options) -> str:
    """Returns how the machine would be divided, and the folders of the runs."""
    require_sharing(options)
    workers = min(options.workers or default_workers(), len(plan.runs))
    where = "this process" if workers == 1 else f"{workers} processes"
    share = divide_machine(workers)[0] if workers > 1 else whole_machine()
    where += f", {share.threads} threads each,"
    if options.per_gpu is not None:
        where = describe_sharing(options)
    lines = [f"{where} would train in {workdir}:"]
    return "\n".join([*lines, *(f"  runs/{run.name}" for run in plan.runs)])


def _train(
    queue: RunQueue, stored: StoredPlan, workdir: Path, options: Options, stop: StopRequest
) -> None:
    with shared_devices(options, workdir, stored, stop) as shares:
        if len(shares) == 1 and options.per_gpu is None and not options.mps:
            queue.train(partial(_attempt_here, stop=stop))
            return
        pool = [Worker(resources, stop.save_on) for resources in shares]
        saved = supervise(pool, lambda worker: queue.train(worker.attempt), stop)
    if stop.signal and (left := sum(run.state == "running" for run in stored.runs)):
        raise Stopped(stop.signal, f"; {saved} of {left} runs under way have saved")


def _attempt_here(job: Job, report: Report, stop: StopRequest) -> Outcome:
    """Trains in this process, or in a child with the number of threads with which the run began."""
    outcome = attempt(job, report, stop)
    if not isinstance(outcome, OtherThreads):
        return outcome
    outcomes: list[Outcome] = []
    child = Worker(whole_machine(outcome.threads), stop.save_on)
    saved = supervise([child], lambda worker: outcomes.append(worker.attempt(job, report)), stop)
    if stop.signal and not outcomes:
        raise Stopped(stop.signal, f"; {saved} of 1 runs under way have saved")
    return outcomes[0]
