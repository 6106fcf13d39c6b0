"""Computes a network's features, before its head, for images or a dataset."""

import argparse

from resjax.cli.arguments import (
    add_images,
    add_weights,
    batching,
    path_ending_in,
    require_exists,
    require_writable,
)
from resjax.cli.output import notify, notify_skipped
from resjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_weights(parser, "--checkpoint", required=True)
    add_images(parser, "*")
    parser.add_argument("--data", metavar="NAME", help="a dataset in place of images")
    parser.add_argument("--split", help="of --data: train (default), test, or e.g. train[:20%%]")
    parser.add_argument("--stage", help="a stage such as stage3 (default: the last)")
    parser.add_argument(
        "--out",
        type=path_ending_in(".npz", ".parquet"),
        required=True,
        metavar="FILE",
        help="X.npz or X.parquet",
    )


def run(arguments: argparse.Namespace) -> int:
    out = arguments.out
    if bool(arguments.images) == bool(arguments.data):
        raise UserError("`resjax features` needs either images or --data=NAME")
    if arguments.images and arguments.split:
        raise UserError(f"--split={arguments.split} needs --data=NAME")
    require_writable(out.parent, "--out")
    from resjax.inference.features import features, of_dataset, of_files, save_features
    from resjax.train.load_weights import load_weights

    split = arguments.split or "train"
    images = of_dataset(arguments.data, split) if arguments.data else of_files(arguments.images)
    require_exists(arguments.checkpoint)
    weights = load_weights(arguments.checkpoint, arguments.which, notify)
    found = features(weights, images, arguments.stage, **batching(arguments))
    notify_skipped(sorted({*images.origins} - {*found.origins}))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_features(found, out)
    rows, columns = found.values.shape
    print(f"features of {rows:,} images, {columns:,} values each: {out}")
    return 0
