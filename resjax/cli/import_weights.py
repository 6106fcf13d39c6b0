"""Turns weights from torchvision, timm, Hugging Face, Keras or BiT into a weights folder.

WEIGHTS is a file (.pth, .safetensors, .h5, .keras, .npz), a Hugging Face folder, a run folder,
hub:OWNER/NAME or https://...
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from resjax.cli.arguments import integer, require_writable, weights_source
from resjax.cli.output import notify


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("weights", type=weights_source, metavar="WEIGHTS")
    add("--out", type=Path, required=True, metavar="DIR", help="the weights folder to write")
    add("--backbone", action="store_true", help="leave out the head")
    add("--prefix", default="", help="of the network's names in a larger file: backbone.body.")
    add("--v1", action="store_true", help="bottlenecks stride in their first 1x1 convolution")
    add("--class-names", type=Path, metavar="FILE", help="a text file, one class name per line")
    add("--image-size", type=integer(1), metavar="N", help="side in pixels (default: as published)")


def run(args: Namespace) -> None:
    require_writable(args.out, "--out")
    from resjax.train.load_weights import load_weights
    from resjax.transfer import weights
    from resjax.transfer.importing import Options

    options = Options(
        prefix=args.prefix,
        v1=args.v1 or None,
        without_head=args.backbone,
        class_names=args.class_names,
        image_size=args.image_size,
    )
    found = load_weights(args.weights, "last", notify, options)
    weights.save(found, args.out)
    print(weights.summarize(found))
    print(f"weights folder: {args.out}")
