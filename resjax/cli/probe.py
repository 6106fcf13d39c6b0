"""Trains a classifier on features and tests it on others."""

import argparse
from pathlib import Path

from resjax.cli.output import print_values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("train", type=Path, metavar="TRAIN", help="features to train on")
    parser.add_argument("test", type=Path, metavar="TEST", help="features to test on")
    parser.add_argument(
        "--kind",
        choices=("linear", "knn"),
        default="linear",
        help="logistic regression (default) or nearest neighbors",
    )


def run(arguments: argparse.Namespace) -> int:
    from resjax.inference.features import load_features
    from resjax.inference.probes import probe

    train, test = load_features(arguments.train), load_features(arguments.test)
    print_values(probe(train, test, arguments.kind))
    return 0
