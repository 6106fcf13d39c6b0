"""Replays run folders into a tracker: TensorBoard, W&B, or your own.

Replaying again changes nothing: a tracker shows each value of a run once, and the run's digest is
its id. With --follow, runs that are trained meanwhile or start later are followed until Ctrl-C.
W&B writes offline runs for `wandb sync` unless WANDB_MODE=online is set.
"""

import signal
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from resjax.cli.arguments import existing, path, require_writable
from resjax.cli.output import notify
from resjax.errors import UserError
from resjax.text import printable

if TYPE_CHECKING:
    from resjax.tracking import End
    from resjax.tracking.follower import RunFollower

VIEW = {
    "tensorboard": "to view: tensorboard --logdir={folder}",
    "wandb": "to upload: find {folder} -name 'offline-run-*' -exec wandb sync {{}} +",
}


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=existing, metavar="DIR", help="a run, a sweep, or a folder above")
    names = "tensorboard, wandb, or your own as package.module:Name"
    add("--to", required=True, metavar="TRACKER", help=names)
    add("--follow", action="store_true", help="follow runs until Ctrl-C, also those that start")
    out = "one folder for each run here (default: the folder `tracking` in each run folder)"
    add("--out", type=path, metavar="DIR", help=out)
    project = "of W&B (default: WANDB_PROJECT, else resjax)"
    add("--project", default="", metavar="NAME", help=project)


def run(args: Namespace) -> None:
    from resjax.tracking import find_tracker
    from resjax.tracking.follower import Target, track

    target = Target(args.to, find_tracker(args.to, "--to"), args.out, args.project)
    if args.out is not None:
        require_writable(args.out, "--out")
    problems: list[str] = []
    if args.follow:
        print(f"following runs in {args.folder} until Ctrl-C", flush=True)
        with _until_signal() as wait:
            track(args.folder, target, _printer(problems), wait)
        return
    runs = track(args.folder, target, _printer(problems))
    if not runs:
        raise UserError(
            f"{args.folder}: no runs here (a run is a folder with a config.json); --follow waits "
            "for runs that start"
        )
    if len(problems) == runs:
        raise UserError("no run could be tracked" if runs > 1 else "the run could not be tracked")
    if hint := VIEW.get(args.to):
        print(hint.format(folder=args.out or args.folder))


def _printer(problems: list[str]) -> Callable[["RunFollower", Path], None]:
    def report(follower: "RunFollower", folder: Path) -> None:
        if follower.problem:
            problems.append(follower.problem)
            notify(f"left out: {follower.problem}")
        elif follower.unchanged:
            print(printable(f"{folder}: unchanged"), flush=True)
        elif follower.end:
            text = f"{folder}: {follower.steps:,} steps with values, {follower.end.text}"
            print(printable(text), flush=True)

    return report


@contextmanager
def _until_signal() -> Iterator[Callable[[float], "End | None"]]:
    """Yields a function that waits, and returns the state of unfinished runs after a signal."""
    from resjax.tracking.follower import UNFINISHED

    stopped = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in numbers}
    try:
        yield lambda seconds: UNFINISHED if stopped.wait(seconds) else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
