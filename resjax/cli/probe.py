"""Trains a classifier on features and tests it on others.

The kind `linear` is logistic regression, `knn` nearest neighbors.
"""

from argparse import ArgumentParser, Namespace

from resjax.cli.arguments import existing
from resjax.cli.output import print_values


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("train", type=existing, metavar="TRAIN", help="features to train on")
    add("test", type=existing, metavar="TEST", help="features to test on")
    add("--kind", choices=("linear", "knn"), default="linear")


def run(args: Namespace) -> None:
    from resjax.inference.features import load_features
    from resjax.inference.probes import probe

    train, test = load_features(args.train), load_features(args.test)
    print_values(probe(train, test, args.kind))
