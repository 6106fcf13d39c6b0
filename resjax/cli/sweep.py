"""Runs an experiment's sweep, then its report.

Every field of the config has an option, such as --config.model.width=8; `resjax config` lists them.
--config.sweep.KEYWORD=VALUE sets a keyword of the experiment's sweep().
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from resjax.cli.arguments import add_config, add_workdir, integer, require_writable
from resjax.cli.output import notify
from resjax.cli.report import write_report
from resjax.config import load, override
from resjax.train.signals import stop_on_signals


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("experiment", type=Path, metavar="EXPERIMENT", help="experiments/X.py")
    add_config(parser)
    add_workdir(parser, "the sweep folder")
    add("--launcher", choices=("local",), default="local", help="where the runs are trained")
    number = "runs at a time (default: one per GPU or core)"
    add("--workers", type=integer(1), metavar="N", help=number)


def run(args: Namespace) -> int:
    from resjax.sweeps.experiment import plan

    config = override(load(args.config), args.overrides)
    planned = plan(args.experiment, config, args.config, args.overrides)
    require_writable(args.workdir)
    print(planned.description, flush=True)
    from resjax.sweeps.local import launch

    with stop_on_signals(notify=notify) as stop:
        failed = launch(planned, args.workdir, args.typed, args.workers, stop)
    if failed < len(planned.runs):
        write_report(args.workdir)
    if failed:
        where = args.workdir / "runs" / "*" / "error.txt"
        print(f"resjax: {failed} of {len(planned.runs)} runs failed; see {where}", file=sys.stderr)
    return 1 if failed else 0
