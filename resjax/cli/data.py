"""Lists datasets (`list`, or nothing), prepares one, or shows its augmented images."""

from argparse import ArgumentParser, Namespace
from functools import partial
from typing import TYPE_CHECKING

from resjax.cli.arguments import CONFIG_HELP, add_command, output_file, path
from resjax.cli.output import print_table
from resjax.config import default_config, load, override, resolve

if TYPE_CHECKING:
    from resjax.data.prepared import PreparedSet


def add_arguments(parser: ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND")
    add_command(commands, "list", run.__doc__, run)
    prepare = add_command(commands, "prepare", prepare_dataset.__doc__, prepare_dataset)
    prepare.add_argument("name", metavar="NAME", help="such as cifar10, or tfds:NAME")
    archives = "the folder with its archives (default: download them)"
    prepare.add_argument("--from", dest="source", type=path, metavar="DIR", help=archives)
    show = add_command(commands, "show", show_dataset.__doc__, show_dataset)
    add = show.add_argument
    add("name", metavar="NAME", help="such as digits")
    add("--config", metavar="FILE", help=CONFIG_HELP)
    file = output_file(".png", ".pdf", ".svg")
    add("--out", type=file, required=True, metavar="FILE", help="X.png, X.pdf or X.svg")


def run(args: Namespace) -> None:
    """Lists datasets and where they are on this machine."""
    from resjax.data import DATASETS, nuclei
    from resjax.data.prepared import list_prepared

    here = {prepared.name: prepared for prepared in list_prepared()}
    rows: list[tuple[str | int, ...]] = []
    for name, spec in DATASETS.items():
        images = spec.train_images + spec.test_images
        shape = " x ".join(map(str, spec.image_shape or ("sizes differ",)))
        if spec.tfds:
            disk = _on_disk(here.pop(spec.tfds, None))
        elif spec.extra and not nuclei.images_folder():
            disk = "-", f"needs the extra {spec.extra}"
        else:
            disk = "-", "embedded"
        rows.append((name, images, spec.classes, shape, *disk))
    for name, prepared in here.items():
        rows.append((f"tfds:{name}", sum(prepared.images.values()), "", "", *_on_disk(prepared)))
    print_table(("name", "images", "classes", "shape", "on disk", "where"), rows)


def _on_disk(prepared: "PreparedSet | None") -> tuple[str, str]:
    """Returns the size and the folder of a dataset."""
    if prepared is None:
        return "-", "-"
    readable = prepared.format == "array_record"
    note = "" if readable else f" ({prepared.format}: only TensorFlow reads it)"
    return f"{prepared.bytes / 1e6:,.1f} MB", f"{prepared.folder}{note}"


def prepare_dataset(args: Namespace) -> None:
    """Prepares a dataset for reading."""
    from resjax.data.preparation import prepare

    folder = prepare(args.name, args.source, partial(print, flush=True))
    print(f"prepared: {folder}")


def show_dataset(args: Namespace) -> None:
    """Draws training images as a run of the config reads them, beside their augmentations."""
    config = default_config() if args.config is None else load(args.config)
    resolved = resolve(override(config, args.overrides | {"data.name": args.name}))
    from resjax.data.augmentation import Augmentation
    from resjax.data.sheet import sheet
    from resjax.train.training_sample import training_sample

    sample, description = training_sample(resolved)
    print(description, flush=True)
    augmentation = Augmentation.from_config(resolved.data, sample.crops.shape[2:])
    figure = sheet(sample, augmentation, resolved.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    print(f"sheet: {args.out}")
