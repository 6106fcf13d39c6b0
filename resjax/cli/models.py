"""Lists the published architectures, or the layers of one."""

from argparse import ArgumentParser, Namespace

from resjax.cli.output import print_table
from resjax.errors import UserError
from resjax.models.presets import PRESETS, nearest_network


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="such as cifar_resnet56")


def run(args: Namespace) -> None:
    if args.name is None:
        _print_architectures()
    else:
        _print_layers(args.name)


def _print_architectures() -> None:
    rows = []
    for name, preset in PRESETS.items():
        depth, pixels = str(preset.fields["depth"]), str(preset.image_size)
        macs = f"{preset.macs / 1e6:,.1f} M"
        rows.append((name, depth, preset.parameters, macs, pixels, preset.source))
    print_table(("name", "depth", "parameters", "MACs", "pixels", "source"), rows)


def _print_layers(name: str) -> None:
    if name not in PRESETS:
        raise UserError(f"unknown network {name!r}{nearest_network(name)}")
    from resjax.models.count import layers
    from resjax.models.resnet import build

    pixels = PRESETS[name].image_size
    rows = [
        (layer.path, layer.kind, " x ".join(map(str, layer.output)), layer.parameters, layer.macs)
        for layer in layers(build(name), (pixels, pixels, 3))
    ]
    print_table(("layer", "kind", "output", "parameters", "MACs"), rows)
