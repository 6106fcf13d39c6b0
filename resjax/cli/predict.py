"""Classifies images with a trained network."""

import argparse

from resjax.cli.arguments import (
    add_images,
    add_weights,
    batching,
    integer,
    path_ending_in,
    require_exists,
    require_writable,
)
from resjax.cli.output import notify, notify_skipped, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_weights(parser, "--checkpoint", required=True)
    add_images(parser, "+")
    parser.add_argument(
        "--top", type=integer(1), default=5, metavar="K", help="classes per image (default: 5)"
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--format", choices=("table", "csv", "json"), default="table")
    either.add_argument(
        "--out", type=path_ending_in(".csv", ".json"), metavar="FILE", help="X.csv or X.json"
    )


def run(arguments: argparse.Namespace) -> int:
    out = arguments.out
    require_exists(arguments.checkpoint)
    if out:
        require_writable(out.parent, "--out")
    from resjax.disk import write_atomically
    from resjax.inference.predict import FORMATS, predict
    from resjax.train.load_weights import load_weights

    weights = load_weights(arguments.checkpoint, arguments.which, notify)
    found, skipped = predict(weights, arguments.images, arguments.top, **batching(arguments))
    notify_skipped(skipped)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, FORMATS[out.suffix[1:]](found))
        print(f"predictions: {out}")
    elif arguments.format == "table":
        rows = [
            (str(each.path), name, f"{100 * probability:.2f} %")
            for each in found
            for name, probability in zip(each.classes, each.probabilities, strict=True)
        ]
        print_table(("image", "class", "probability"), rows)
    else:
        print(FORMATS[arguments.format](found), end="")
    return 0
