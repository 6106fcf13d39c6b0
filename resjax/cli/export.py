"""Exports a network for use without resjax."""

import argparse
from pathlib import Path

from resjax.cli.arguments import add_weights, require_exists, require_writable
from resjax.cli.output import notify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_weights(parser, "checkpoint")
    parser.add_argument(
        "--format",
        choices=("stablehlo", "torchvision"),
        required=True,
        help="a program with its weights, or a safetensors file with torchvision's names",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the file to write or replace"
    )


def run(arguments: argparse.Namespace) -> int:
    require_exists(arguments.checkpoint)
    require_writable(arguments.out.parent, "--out")
    from resjax.train.load_weights import load_weights

    weights = load_weights(arguments.checkpoint, arguments.which, notify)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.format == "torchvision":
        from resjax.transfer.exporting import export_torchvision

        export_torchvision(weights, arguments.out)
    else:
        from resjax.inference.program import export_program

        print(f"description: {export_program(weights, arguments.out)}")
    print(f"{arguments.format}: {arguments.out}")
    return 0
