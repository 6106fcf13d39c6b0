"""Exports a network for use without resjax.

The format `stablehlo` is a program with its weights, `torchvision` a safetensors file with
torchvision's names.
"""

from argparse import ArgumentParser, Namespace

from resjax.cli.arguments import add_weights, output_file
from resjax.cli.output import notify


def add_arguments(parser: ArgumentParser) -> None:
    add_weights(parser, "checkpoint")
    add = parser.add_argument
    add("--format", choices=("stablehlo", "torchvision"), required=True)
    file = "the file to write or replace"
    add("--out", type=output_file(), required=True, metavar="FILE", help=file)


def run(args: Namespace) -> None:
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
