"""Runs an experiment's sweep, then its report.

Every field of the config has an option, such as --config.model.width=8; `resjax config` lists them.
--config.sweep.NAME=VALUE sets a keyword of the experiment's sweep().
"""

import argparse
import sys
from pathlib import Path

from resjax.cli.arguments import add_config, add_workdir, integer, require_writable
from resjax.cli.output import notify
from resjax.cli.report import write_report
from resjax.config import load, override
from resjax.train.signals import stop_on_signals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="experiments/X.py")
    add_config(parser)
    add_workdir(parser, "the sweep folder")
    parser.add_argument(
        "--launcher", choices=("local",), default="local", help="where the runs are trained"
    )
    parser.add_argument(
        "--workers",
        type=integer(1),
        metavar="N",
        help="runs that train at the same time, each on its share of the cores or GPUs "
        "(default: one per GPU, or one per core without a GPU)",
    )


def run(arguments: argparse.Namespace) -> int:
    from resjax.sweeps.experiment import plan

    planned = plan(arguments.experiment, override(load(arguments.config), arguments.overrides))
    require_writable(arguments.workdir)
    from resjax.sweeps.local import launch

    with stop_on_signals(notify=notify) as stop:
        failed = launch(planned, arguments.workdir, arguments.typed, arguments.workers, stop)
    if failed < len(planned.runs):
        write_report(arguments.workdir)
    if failed:
        where = arguments.workdir / "runs" / "*" / "error.txt"
        print(f"resjax: {failed} of {len(planned.runs)} runs failed; see {where}", file=sys.stderr)
    return 1 if failed else 0
