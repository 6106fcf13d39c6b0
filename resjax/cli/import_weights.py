"""Turns weights from torchvision, timm, Hugging Face, Keras or BiT into a weights folder.

WEIGHTS is a file (.pth, .safetensors, .h5, .keras, .npz), a Hugging Face folder, a run folder,
hub:OWNER/NAME or https://...
"""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import fields

from resjax.cli.arguments import add_code, integer, path, require_writable, weights_source
from resjax.cli.output import notify
from resjax.text import printable_lines


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("weights", type=weights_source, metavar="WEIGHTS")
    add("--out", type=path, required=True, metavar="DIR", help="the weights folder to write")
    add("--backbone", action="store_true", help="leave out the head")
    add("--prefix", default="", help="of the network's names in a larger file: backbone.body.")
    add("--key", default="", help="of the state dict in a checkpoint of PyTorch: state_dict_ema")
    add("--class-names", type=path, metavar="FILE", help="a text file, one name per line")
    add("--image-size", type=integer(1), metavar="N", help="side in pixels (default: as published)")
    add_code(parser)
    hidden = parser.add_argument_group("what the file may not show")
    add = hidden.add_argument
    stride = "whether bottlenecks stride in their first 1x1 convolution"
    add("--v1", action=BooleanOptionalAction, help=stride)
    pools = ("max", "average", "blur", "none")
    add("--stem-pool", choices=pools, help="what ends the stem")
    add("--antialias", choices=pools[1:], help="the filter before strides")
    add("--dilated-stages", type=integer(0), metavar="N", help="last stages without strides")
    add("--bn-epsilon", type=float, metavar="X", help="epsilon of the batch norms")
    add("--shortcut", choices=("pad", "pad_center", "none"), help="if none has arrays")


def run(args: Namespace) -> None:
    require_writable(args.out, "--out")
    from resjax.train.load_weights import load_weights
    from resjax.transfer import weights
    from resjax.transfer.assumptions import Hidden
    from resjax.transfer.importing import Options

    options = Options(
        prefix=args.prefix,
        key=args.key,
        hidden=Hidden(**{field.name: getattr(args, field.name) for field in fields(Hidden)}),
        without_head=args.backbone,
        class_names=args.class_names,
        image_size=args.image_size,
    )
    found = load_weights(args.weights, "last", notify, options)
    weights.save(found, args.out)
    print(printable_lines(weights.summarize(found)))
    print(f"weights folder: {args.out}")
