"""Evaluates one of a run's checkpoints."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from resjax.cli.arguments import add_which, existing, output_file
from resjax.cli.output import notify, print_values

if TYPE_CHECKING:
    from resjax.inference.coco import Objects


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--workdir", type=existing, required=True, metavar="DIR", help="the run folder")
    add_which(parser, "--checkpoint", "--which")
    what = "the split to evaluate, train without augmentation (default: test)"
    add("--split", choices=("test", "train"), default="test", help=what)
    coco = "of a detector: write COCO's results, and print its exact average precision"
    add("--coco", type=output_file(".json"), metavar="FILE", help=coco)


def run(args: Namespace) -> None:
    from resjax.train.loop import evaluate

    objects = _find_objects(args) if args.coco else None  # refuses other tasks first
    print_values(evaluate(args.workdir, args.checkpoint, split=args.split))
    if objects:
        _evaluate_by_coco(args, objects)


def _find_objects(args: Namespace) -> "Objects":
    from resjax.inference.coco import find_objects
    from resjax.train.loop import restore_run

    return find_objects(*restore_run(args.workdir, args.checkpoint, notify), args.split)


def _evaluate_by_coco(args: Namespace, objects: "Objects") -> None:
    from resjax.disk import report_disk_errors
    from resjax.inference import coco

    args.coco.parent.mkdir(parents=True, exist_ok=True)
    with report_disk_errors(args.coco):
        annotations = coco.write_results(objects, args.coco)
    print(f"detections: {args.coco}\nannotations: {annotations}", flush=True)
    values = coco.average_precision(objects)
    print_values({f"coco_{name}": value for name, value in values.items()})
