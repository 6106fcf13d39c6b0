"""Exports a network for use without resjax.

The format `stablehlo` is a program with its weights, `torchvision` a safetensors file with
torchvision's names.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from resjax.cli.arguments import add_weights, require_writable
from resjax.cli.output import notify


def add_arguments(parser: ArgumentParser) -> None:
    add_weights(parser, "checkpoint")
    add = parser.add_argument
    add("--format", choices=("stablehlo", "torchvision"), required=True)
    add("--out", type=Path, required=True, metavar="FILE", help="the file to write or replace")


def run(args: Namespace) -> None:
    require_writable(args.out.parent, "--out")
    from resjax.train.load_weights import load_weights

    weights = load_weights(args.checkpoint, args.which, notify)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.format == "torchvision":
        from resjax.transfer.exporting import export_torchvision

        export_torchvision(weights, args.out)
    else:
        from resjax.inference.program import export_program

        print(f"description: {export_program(weights, args.out)}")
    print(f"{args.format}: {args.out}")
