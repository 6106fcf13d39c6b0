"""The local launcher: trains the runs of a plan on this machine, one or several at a time.

A run is identified by its config, so launching again skips finished runs and resumes the others.
If the experiment has a `measure`, each run is measured by the process that has trained it, and a
finished run that is not measured yet by the next launch. A run that fails leaves its traceback in
`error.txt`; the other runs go on. Several launches may work in one folder at the same time.
"""

from functools import partial
from pathlib import Path

from resjax.disk import report_disk_errors
from resjax.sweeps.attempts import Job, OtherThreads, Outcome, Report, attempt
from resjax.sweeps.experiment import Plan
from resjax.sweeps.failures import Retries
from resjax.sweeps.launchers import Options
from resjax.sweeps.plan_files import new_launch, write_sweep
from resjax.sweeps.queue import RunQueue
from resjax.sweeps.status import FINISHED, RunStatus, shown
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
      UserError: `workdir` cannot be written.
      Stopped: stopping was requested; says how many of the runs under way have saved.
    """
    retries = Retries(new_launch(), options.retries)
    with report_disk_errors(workdir):
        stored = write_sweep(plan, workdir, command, retries.launch)
        runs = stored.runs
        with shown(runs) as show_end:
            queue = RunQueue(runs, stored.measure, retries, show_end, stop)
            if queue.skip_settled():
                _train(queue, runs, _workers(options, len(runs)), stop)
    return sum(run.state not in FINISHED for run in runs)


def dry_run(plan: Plan, workdir: Path, command: str, options: Options) -> str:
    """Returns how the machine would be divided, and the folders of the runs."""
    workers = _workers(options, len(plan.runs))
    share = divide_machine(workers)[0] if workers > 1 else whole_machine()
    where = f"{workers} processes" if workers > 1 else "this process"
    lines = [f"{where}, {share.threads} threads each, would train in {workdir}:"]
    return "\n".join([*lines, *(f"  runs/{run.name}" for run in plan.runs)])


def _workers(options: Options, runs: int) -> int:
    # The number of cores per run must not depend on how many runs are waiting.
    return min(options.workers or default_workers(), runs)


def _train(queue: RunQueue, runs: list[RunStatus], workers: int, stop: StopRequest) -> None:
    if workers == 1:
        queue.train(partial(_attempt_here, stop=stop))
        return
    pool = [Worker(resources, stop.save_on) for resources in divide_machine(workers)]
    saved = supervise(pool, lambda worker: queue.train(worker.attempt), stop)
    if stop.signal and (left := sum(run.state == "running" for run in runs)):
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
