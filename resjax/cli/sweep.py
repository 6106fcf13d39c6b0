"""Runs an experiment's sweep, then its report.

Every field of the config has an option, such as --config.model.width=8; `resjax config` lists them.
--config.sweep.KEYWORD=VALUE sets a keyword of the experiment's sweep().
"""

import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from resjax.cli.arguments import (
    add_config,
    add_save_on,
    add_workdir,
    experiment_file,
    integer,
    require_writable,
)
from resjax.cli.output import notify
from resjax.cli.report import write_report
from resjax.config import load, override
from resjax.config.python_files import shipped
from resjax.errors import UserError
from resjax.run_files import require_kind
from resjax.sweeps.launchers import LAUNCHERS, Options, find_launcher, per_gpu
from resjax.tracking import require_tracker
from resjax.train.signals import stop_on_signals

if TYPE_CHECKING:
    from resjax.sweeps.experiment import Plan


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    own = f"a file, or one of {', '.join(shipped('experiments'))}"
    add("experiment", type=experiment_file, metavar="EXPERIMENT", help=own)
    add_config(parser)
    add_workdir(parser, "the sweep folder")
    add_save_on(parser)
    launchers = f"where the runs are trained: {', '.join(LAUNCHERS)}; --NAME.KEY=VALUE sets it up"
    add("--launcher", choices=LAUNCHERS, default="local", metavar="NAME", help=launchers)
    number = "runs at a time (default: one per GPU or core)"
    add("--workers", type=integer(1), metavar="N", help=number)
    shared = "runs that share a GPU, or auto: measured once, kept in DIR/packing.json"
    add("--workers-per-gpu", type=per_gpu, metavar="K", help=shared)
    add("--mps", action="store_true", help="serve processes that share a GPU by NVIDIA's MPS")
    again = "how often a run that failed is tried again (1)"
    add("--retries", type=integer(0), default=1, metavar="N", help=again)
    add(
        "--wait", action="store_true", help="wait for workers that could go on without this command"
    )
    nodes = "nodes that train a run together (--launcher=slurm)"
    add("--nodes-per-run", type=integer(1), default=1, metavar="N", help=nodes)
    add("--dry-run", action="store_true", help="print what would be launched, and stop")


def _describe_data(planned: "Plan") -> set[str]:
    """Returns a line about each dataset of a sweep.

    Raises:
      UserError: a dataset is not on this machine.
    """
    from resjax.data.datasets import open_dataset

    data = (run.config.data for run in planned.runs)
    used = {(each.name, each.train_split, each.test_split) for each in data}
    return {f"{each[0]}: {open_dataset(*each)}" for each in used}


def run(args: Namespace) -> int:
    from resjax.sweeps.experiment import plan
    from resjax.sweeps.made_up import rehearse

    launcher = find_launcher(args.launcher, args.settings)
    if args.nodes_per_run > 1 and args.launcher != "slurm":
        raise UserError(f"--nodes-per-run needs --launcher=slurm; the launcher is {args.launcher}")
    settings = args.settings.get(args.launcher, {})
    options = Options(
        args.workers,
        args.retries,
        settings,
        args.wait,
        args.nodes_per_run,
        args.workers_per_gpu,
        args.mps,
        args.save_on,
    )
    config = override(load(args.config), args.overrides)
    planned = plan(args.experiment, config, args.config, args.overrides)
    require_kind(args.workdir, "sweep")
    for tracker in {run.config.track for run in planned.runs}:
        require_tracker(tracker)
    require_writable(args.workdir)
    print(planned.description, flush=True)
    rehearse(planned, args.workdir, notify)
    print(*sorted(_describe_data(planned)), sep="\n", flush=True)
    if args.dry_run:
        print(launcher.dry_run(planned, args.workdir, args.typed, options))
        return 0
    with stop_on_signals(notify=notify, save_on=args.save_on) as stop:
        failed = launcher.launch(planned, args.workdir, args.typed, options, stop)
    if failed is None:
        return 0
    summaries = (args.workdir / "runs" / run.name / "summary.json" for run in planned.runs)
    if any(summary.exists() for summary in summaries):
        write_report([args.workdir], args.experiment)
    if failed:
        where = args.workdir / "runs" / "*" / "error.txt"
        print(
            f"resjax: {failed} of {len(planned.runs)} runs are not finished; see {where}",
            file=sys.stderr,
        )
    return 1 if failed else 0
