"""A worker of a sweep, which launchers start on this machine or any other that shares the folder.

    python -m resjax.sweeps.worker FOLDER --plan=DIGEST --launch=ID

It trains and measures one run after the other until none is left that no other process holds. Runs
are trained in a child process: one that is lost, because its memory was exhausted for example, is a
failed attempt, and the worker goes on. A signal that ends the worker saves its run first.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from resjax.errors import UserError
from resjax.machine import threads
from resjax.sweeps.failures import Retries
from resjax.sweeps.launchers import Options, per_gpu
from resjax.sweeps.packing import require_sharing, shared_devices
from resjax.sweeps.plan_files import read_plan
from resjax.sweeps.queue import RunQueue
from resjax.sweeps.status import TRIED_AGAIN, RunStatus, print_line
from resjax.sweeps.workers import AnyWorker, Worker, supervise, whole_machine
from resjax.terminal import standard_streams
from resjax.text import printable, printable_lines
from resjax.train.signals import Stopped, StopRequest, signal_names, stop_on_signals


def work(
    folder: Path,
    plan: str,
    launch: str,
    retries: int = 1,
    stop: StopRequest | None = None,
    worker: AnyWorker | None = None,
    sharing: Options | None = None,
) -> int:
    """Trains and measures runs of a plan until none is left; returns how many have ended here.

    Args:
      folder: the sweep folder.
      plan: the digest of the plan.
      launch: the ID of the launch, within which a run is tried at most 1 + `retries` times.
      retries: how often a run that failed is tried again.
      stop: a request to stop.
      worker: trains the runs; by default a child process with all that this process may use.
      sharing: how several runs share each GPU, if they do; see `packing.shared_devices`.

    Raises:
      UserError: the folder has no such plan, or this machine lacks what `sharing` asks for.
      Stopped: stopping was requested; says whether the runs under way have saved.
    """
    if sharing:
        require_sharing(sharing)
    stored = read_plan(folder, plan)
    stop = stop or StopRequest()
    ended: list[RunStatus] = []

    def show_end(run: RunStatus) -> None:
        if run.started is not None:  # by this worker
            print_line(run)
            if run.state != TRIED_AGAIN:
                ended.append(run)

    tried = Retries(launch, retries)
    queue = RunQueue(stored.runs, stored.measure, tried, show_end, stop, wait=False)
    with ExitStack() as ending:
        workers = [worker or Worker(whole_machine(), stop.save_on)]
        if sharing:
            shares = ending.enter_context(shared_devices(sharing, folder, stored, stop, threads()))
            workers = [Worker(share, stop.save_on) for share in shares]
        saved = supervise(workers, lambda worker: queue.train(worker.attempt), stop)
    if stop.signal:
        left = sum(run.state == "running" for run in stored.runs)
        details = f"; the run under way has {'' if saved else 'not '}saved"
        if len(workers) > 1:
            details = f"; {saved} of {left} runs under way have saved"
        raise Stopped(stop.signal, details if left else "")
    return len(ended)


def main(argv: Sequence[str] | None = None, worker: AnyWorker | None = None) -> int:
    """Works on a sweep and returns the exit code: 0, or 128 and the signal that stopped it.

    Args:
      argv: the arguments, by default those of this process.
      worker: trains the runs; see `work`.
    """
    args = _parser().parse_args(argv)
    with standard_streams() as keep_going:
        keep_going()
        try:
            with stop_on_signals(notify=_notify, save_on=args.save_on) as stop:
                sharing = Options(per_gpu=args.workers_per_gpu, mps=args.mps)
                ended = work(
                    args.folder,
                    args.plan,
                    args.launch,
                    args.retries,
                    stop,
                    worker,
                    sharing=sharing if sharing.worker_flags else None,
                )
        except UserError as error:
            _notify(f"error: {printable(str(error))}")
            return 2
        except Stopped as error:
            _notify(f"{error}; another worker goes on from here")
            return error.code
        print(f"{ended} runs ended here; none is left to take")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m resjax.sweeps.worker", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="the sweep folder")
    add("--plan", required=True, metavar="DIGEST", help="the plan, a file of the folder plans")
    add("--launch", required=True, metavar="ID", help="the launch, whose retries are counted")
    add("--retries", type=int, default=1, metavar="N", help="how often a failed run is tried again")
    add("--workers-per-gpu", type=per_gpu, metavar="K", help="see `resjax sweep`")
    add("--mps", action="store_true", help="see `resjax sweep`")
    add("--save-on", type=signal_names, default="HUP", metavar="NAMES", help="see `resjax sweep`")
    return parser


def _notify(text: str) -> None:
    print(printable_lines(f"resjax: {text}"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
