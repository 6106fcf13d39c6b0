"""Classifies images with a trained network, or draws the masks or boxes that it predicts."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from resjax.cli import arguments
from resjax.cli.output import notify, notify_skipped, print_table
from resjax.errors import UserError

if TYPE_CHECKING:
    from resjax.transfer.weights import Weights


def add_arguments(parser: ArgumentParser) -> None:
    arguments.add_weights(parser, "--checkpoint", "--workdir", required=True)
    arguments.add_images(parser, "+")
    top = arguments.integer(1)
    parser.add_argument("--top", type=top, default=5, metavar="K", help="classes per image")
    score = "the lowest score of a detected object (default: 0.5)"
    parser.add_argument("--min-score", type=arguments.share, default=0.5, metavar="P", help=score)
    file = arguments.output_file(".csv", ".json", "")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--format", choices=("table", "csv", "json"), default="table")
    add("--out", type=file, metavar="FILE", help="X.csv or X.json; for masks and boxes a folder")


def run(args: Namespace) -> None:
    from resjax.disk import write_atomically
    from resjax.inference.predict import FORMATS, predict
    from resjax.train.load_weights import load_weights

    weights = load_weights(args.checkpoint, args.which, notify)
    from resjax.inference.dense import is_dense

    if is_dense(weights):
        _predict_dense(args, weights)
        return
    if args.out and not args.out.suffix:
        raise UserError(f"--out={args.out}: a classifier's predictions go to X.csv or X.json")
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


def _predict_dense(args: Namespace, weights: "Weights") -> None:
    """Writes pictures, masks and JSON to a folder, or prints a table or JSON."""
    from resjax.disk import report_disk_errors
    from resjax.inference import dense

    if args.format == "csv" or (args.out and args.out.suffix):
        raise UserError("masks and boxes are written to a folder (--out=DIR), or --format=json")
    found = dense.predict_dense(weights, args.images, args.min_score, **arguments.batching(args))
    notify_skipped(found.skipped)
    if args.out:
        with report_disk_errors(args.out):
            for path in dense.write_pictures(found, args.out):
                print(f"prediction: {path}")
    elif args.format == "json":
        print(dense.as_json(found), end="")
    else:
        print_table(("image", "class", "found"), list(dense.rows(found)))
