"""Checks every checkpoint, metrics file and weights folder; exit code 1 if one is damaged."""

from argparse import ArgumentParser, Namespace

from resjax.cli.arguments import existing
from resjax.text import printable


def add_arguments(parser: ArgumentParser) -> None:
    above = "a run, a sweep, or a folder above"
    parser.add_argument("folder", type=existing, metavar="DIR", help=above)


def run(args: Namespace) -> int:
    from resjax.train.verify import verify

    findings = verify(args.folder)
    for finding in findings:
        print(printable(f"{finding.path}: {finding.message}"))
    damaged = sum(finding.damaged for finding in findings)
    print(f"{damaged} damaged" if damaged else "all intact")
    return 1 if damaged else 0
