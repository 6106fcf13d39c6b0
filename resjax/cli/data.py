"""Lists datasets (`list`, or nothing), prepares one, or shows its augmented images."""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from resjax.cli.arguments import CONFIG_HELP, add_command, path_ending_in, require_writable
from resjax.cli.output import print_table
from resjax.config import default_config, load, override, resolve

if TYPE_CHECKING:
    from resjax.data.prepared import PreparedSet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND")
    add_command(commands, "list", run.__doc__, run)
    prepare = add_command(commands, "prepare", prepare_dataset.__doc__, prepare_dataset)
    prepare.add_argument("name", metavar="NAME", help="such as cifar10, or tfds:NAME")
    prepare.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR",
        help="the folder with its archives (default: download them)",
    )
    show = add_command(commands, "show", show_dataset.__doc__, show_dataset)
    show.add_argument("name", metavar="NAME", help="such as digits")
    show.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    show.add_argument(
        "--out",
        type=path_ending_in(".png", ".pdf", ".svg"),
        required=True,
        metavar="FILE",
        help="X.png, X.pdf or X.svg",
    )


def run(arguments: argparse.Namespace) -> int:
    """Lists datasets and where they are on this machine."""
    from resjax.data import DATASETS
    from resjax.data.prepared import list_prepared

    here = {prepared.name: prepared for prepared in list_prepared()}
    rows = []
    for name, spec in DATASETS.items():
        prepared = here.pop(spec.tfds, None)
        rows.append(
            (
                name,
                f"{spec.train_images + spec.test_images:,}",
                f"{spec.classes:,}",
                " x ".join(map(str, spec.image_shape or ("sizes differ",))),
                f"{prepared.bytes / 1e6:,.1f} MB" if prepared else "-",
                "embedded" if spec.embedded else _location(prepared),
            )
        )
    for name, prepared in here.items():
        size = f"{prepared.bytes / 1e6:,.1f} MB"
        images = f"{sum(prepared.images.values()):,}"
        rows.append((f"tfds:{name}", images, "", "", size, _location(prepared)))
    print_table(("name", "images", "classes", "shape", "on disk", "where"), rows)
    return 0


def _location(prepared: "PreparedSet | None") -> str:
    if prepared is None:
        return "-"
    foreign = f" ({prepared.format}: only TensorFlow reads it)"
    return f"{prepared.folder}{foreign if prepared.format != 'array_record' else ''}"


def prepare_dataset(arguments: argparse.Namespace) -> int:
    """Prepares a dataset for reading."""
    from resjax.data.preparation import prepare

    folder = prepare(arguments.name, arguments.source, partial(print, flush=True))
    print(f"prepared: {folder}")
    return 0


def show_dataset(arguments: argparse.Namespace) -> int:
    """Draws training images beside their augmentations."""
    config = default_config() if arguments.config is None else load(arguments.config)
    resolved = resolve(override(config, arguments.overrides | {"data.name": arguments.name}))
    require_writable(arguments.out.parent, "--out")
    from resjax.data.augmentation import Augmentation
    from resjax.data.datasets import load as load_data
    from resjax.data.normalization import compute_statistics
    from resjax.data.sheet import sheet

    data = resolved.data
    dataset = load_data(data.name)
    figure = sheet(
        dataset.train,
        dataset.class_names,
        compute_statistics(dataset.train.images, data.normalization, colors=data.pca_lighting > 0),
        Augmentation.from_config(data),
        resolved.seed,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out)
    print(f"sheet: {arguments.out}")
    return 0
