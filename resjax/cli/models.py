"""Lists the published architectures, or the layers of one."""

from argparse import ArgumentParser, Namespace

from resjax.cli.output import print_table
from resjax.errors import UserError
from resjax.models.presets import PRESETS, architecture


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="such as cifar_resnet56")


def run(args: Namespace) -> None:
    if args.name is None:
        _print_architectures()
    else:
        _print_layers(args.name)


def _print_architectures() -> None:
    rows = [
        (
            name,
            str(preset.fields["depth"]),
            f"{preset.parameters:,}",
            f"{preset.macs / 1e6:,.1f} M",
            str(preset.image_size),
            preset.source,
        )
        for name, preset in PRESETS.items()
    ]
    print_table(("name", "depth", "parameters", "MACs", "pixels", "source"), rows)


def _print_layers(name: str) -> None:
    try:
        architecture(name)
    except ValueError as error:
        raise UserError(str(error)) from error
    from resjax.models.count import layers
    from resjax.models.resnet import build

    pixels = PRESETS[name].image_size
    rows = [
        (
            layer.path,
            layer.kind,
            " x ".join(map(str, layer.output)),
            f"{layer.parameters:,}",
            f"{layer.macs:,}",
        )
        for layer in layers(build(name), (pixels, pixels, 3))
    ]
    print_table(("layer", "kind", "output", "parameters", "MACs"), rows)
