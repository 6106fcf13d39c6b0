"""Computes a network's features, before its head, for images or a dataset."""

from argparse import ArgumentParser, Namespace

from resjax.cli import arguments
from resjax.cli.output import notify, notify_skipped
from resjax.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    arguments.add_weights(parser, "--checkpoint", "--workdir", required=True)
    arguments.add_images(parser, "*")
    file = arguments.output_file(".npz", ".parquet")
    add = parser.add_argument
    add("--data", metavar="NAME", help="a dataset in place of images")
    add("--split", help="of --data: train (default), test, or e.g. train[:20%%]")
    add("--stage", help="a stage such as stage3 (default: the last)")
    add("--out", type=file, required=True, metavar="FILE", help="X.npz or X.parquet")


def run(args: Namespace) -> None:
    if bool(args.images) == bool(args.data):
        raise UserError("`resjax features` needs either images or --data=NAME")
    if args.images and args.split:
        raise UserError(f"--split={args.split} needs --data=NAME")
    from resjax.inference.features import features, of_dataset, of_files, save_features
    from resjax.train.load_weights import load_weights

    split = args.split or "train"
    images = of_dataset(args.data, split) if args.data else of_files(args.images)
    if images.description:
        notify(images.description)
    weights = load_weights(args.checkpoint, args.which, notify)
    found = features(weights, images, args.stage, **arguments.batching(args))
    notify_skipped(sorted({*images.origins} - {*found.origins}))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_features(found, args.out)
    rows, columns = found.values.shape
    print(f"features of {rows:,} images, {columns:,} values each: {args.out}")
