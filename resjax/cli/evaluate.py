"""Evaluates one of a run's checkpoints."""

import argparse

from resjax.cli.arguments import add_workdir, checkpoint
from resjax.cli.output import print_values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, "the run folder")
    parser.add_argument(
        "--checkpoint",
        type=checkpoint,
        default="last",
        metavar="WHICH",
        help="last, best (by the primary test metric), or a step (default: last)",
    )


def run(arguments: argparse.Namespace) -> int:
    from resjax.train.loop import evaluate

    print_values(evaluate(arguments.workdir, arguments.checkpoint))
    return 0
