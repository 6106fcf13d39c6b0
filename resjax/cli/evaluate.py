"""Evaluates one of a run's checkpoints."""

from argparse import ArgumentParser, Namespace

from resjax.cli.arguments import add_which, existing
from resjax.cli.output import print_values


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--workdir", type=existing, required=True, metavar="DIR", help="the run folder")
    add_which(parser, "--checkpoint", "--which")
    what = "the split to evaluate, train without augmentation (default: test)"
    add("--split", choices=("test", "train"), default="test", help=what)


def run(args: Namespace) -> None:
    from resjax.train.loop import evaluate

    print_values(evaluate(args.workdir, args.checkpoint, split=args.split))
