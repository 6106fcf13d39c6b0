"""Checks every checkpoint, metrics file and weights folder; exit code 1 if one is damaged."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="a run, a sweep, or any folder above them"
    )


def run(arguments: argparse.Namespace) -> int:
    from resjax.train.verify import verify

    findings = verify(arguments.folder)
    for finding in findings:
        print(f"{finding.path}: {finding.message}")
    damaged = sum(finding.damaged for finding in findings)
    print(f"{damaged} damaged" if damaged else "all intact")
    return 1 if damaged else 0
