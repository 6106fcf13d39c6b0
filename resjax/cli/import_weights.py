"""Turns weights from torchvision, timm, Hugging Face, Keras or BiT into a weights folder."""

import argparse
from pathlib import Path

from resjax.cli.arguments import integer, require_exists, require_writable
from resjax.cli.output import notify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help=".pth, .safetensors, .h5, .keras, .npz, a Hugging Face folder, a run folder, "
        "hub:OWNER/NAME or https://...",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the weights folder to write"
    )
    parser.add_argument("--backbone", action="store_true", help="leave out the head")
    parser.add_argument(
        "--prefix",
        default="",
        help="prefix of the network's names in a file that holds more, such as backbone.body.",
    )
    parser.add_argument(
        "--v1", action="store_true", help="bottlenecks stride in their first 1x1 convolution"
    )
    parser.add_argument(
        "--class-names", type=Path, metavar="FILE", help="a text file with one class name per line"
    )
    parser.add_argument(
        "--image-size",
        type=integer(1),
        metavar="N",
        help="image side in pixels (default: that of the published evaluation)",
    )


def run(arguments: argparse.Namespace) -> int:
    require_exists(arguments.weights)
    require_writable(arguments.out, "--out")
    from resjax.train.load_weights import load_weights
    from resjax.transfer import weights
    from resjax.transfer.importing import Options

    options = Options(
        prefix=arguments.prefix,
        v1=arguments.v1 or None,
        without_head=arguments.backbone,
        class_names=arguments.class_names,
        image_size=arguments.image_size,
    )
    found = load_weights(arguments.weights, "last", notify, options)
    weights.save(found, arguments.out)
    print(weights.summarize(found))
    print(f"weights folder: {arguments.out}")
    return 0
