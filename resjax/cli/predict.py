"""Classifies images with a trained network."""

from argparse import ArgumentParser, Namespace

from resjax.cli import arguments
from resjax.cli.output import notify, notify_skipped, print_table


def add_arguments(parser: ArgumentParser) -> None:
    arguments.add_weights(parser, "--checkpoint", "--workdir", required=True)
    arguments.add_images(parser, "+")
    top = arguments.integer(1)
    parser.add_argument("--top", type=top, default=5, metavar="K", help="classes per image")
    file = arguments.output_file(".csv", ".json")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--format", choices=("table", "csv", "json"), default="table")
    add("--out", type=file, metavar="FILE", help="X.csv or X.json")


def run(args: Namespace) -> None:
    from resjax.disk import write_atomically
    from resjax.inference.predict import FORMATS, predict
    from resjax.train.load_weights import load_weights

    weights = load_weights(args.checkpoint, args.which, notify)
    found, skipped = predict(weights, args.images, args.top, **arguments.batching(args))
    notify_skipped(skipped)
    if out := args.out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, FORMATS[out.suffix[1:]](found))
        print(f"predictions: {out}")
    elif args.format == "table":
        rows = [
            (str(each.path), name, f"{100 * probability:.2f} %")
            for each in found
            for name, probability in zip(each.classes, each.probabilities, strict=True)
        ]
        print_table(("image", "class", "probability"), rows)
    else:
        print(FORMATS[args.format](found), end="")
