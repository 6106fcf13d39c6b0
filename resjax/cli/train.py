"""Trains one network, or resumes it.

Every field of the config has an option, such as --config.model.depth=56; `resjax config` lists
them.
"""

import os
import sys
from argparse import ArgumentParser, Namespace
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from resjax.cli.arguments import add_config, add_save_on, add_workdir, integer, require_writable
from resjax.cli.output import notify, print_table, print_values
from resjax.config import Config, load, override, resolve
from resjax.disk import report_disk_errors
from resjax.errors import UserError
from resjax.machine import threads, use_threads
from resjax.run_files import recorded_threads, require_kind
from resjax.tracking import require_tracker
from resjax.train.signals import stop_on_signals


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add_config(parser)
    add_workdir(parser, "the run folder; required without --dry-run", required=False)
    add_save_on(parser)
    add("--profile", type=integer(1), metavar="N", help="first trace N steps; print what is slow")
    add(
        "--change-schedule",
        action="store_true",
        help="go on though another train.steps changes the learning rates of steps already trained",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print memory, FLOPs and time of the run; train and write nothing",
    )
    devices = "devices for --dry-run: tpu:v5e:2x2, gpu:h100, ... (those here)"
    add("--topology", metavar="NAME", help=devices)
    add("--distributed", action="store_true", help="join the processes of SLURM, MPI or a TPU")
    add("--coordinator", metavar="HOST:PORT", help="address of process 0, to join by hand")
    add("--processes", type=integer(1), metavar="N", help="number of processes")
    add("--process", type=integer(0), metavar="I", help="index of this process, from 0")


def run(args: Namespace) -> None:
    config = resolve(override(load(args.config), args.overrides))
    if args.dry_run:
        _dry_run(config, args)
        return
    if args.topology is not None:
        raise UserError("--topology describes devices that are not here; it needs --dry-run")
    if args.workdir is None:
        raise UserError("`resjax train`: the following arguments are required: --workdir")
    require_kind(args.workdir, "run")
    require_tracker(config.track)
    began = recorded_threads(args.workdir)
    if began not in (None, threads()) and "NPROC" not in os.environ:
        use_threads(began)
    from resjax.train import distributed

    cluster = distributed.Cluster(args.coordinator, args.processes, args.process)
    joins = args.distributed or any(value is not None for value in cluster)
    if joins:
        distributed.join(cluster)
    if not joins or distributed.is_main_process():
        require_writable(args.workdir)
    from resjax.tracking.process import wait_for_followers
    from resjax.train.loop import train
    from resjax.train.progress import console
    from resjax.train.trainer import trainer_for
    from resjax.xla.compilation_cache import enable_compilation_cache

    enable_compilation_cache()
    trainer = trainer_for(config)  # the last checks that can refuse, before anything is written
    trainer.require_layers()
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        distributed.exit_when_peer_is_lost(),
        stop_on_signals(together=joins, notify=notify, save_on=args.save_on) as stop,
    ):
        out = sys.stdout if distributed.is_main_process() else nowhere
        if args.profile:
            _profile(trainer, args.profile, args.workdir / "profile", out)
        announce = partial(print, file=out, flush=True)
        with console(out) as listener:
            summary = train(
                config,
                args.workdir,
                listener,
                announce,
                stop,
                change_schedule=args.change_schedule,
            )
        wait_for_followers()
        print_values(summary, out)
        print(f"best checkpoint: {_best_checkpoint(summary, args.workdir)}", file=out)
        print(f"run folder: {args.workdir}", file=out)


def _best_checkpoint(summary: dict[str, Any], workdir: Path) -> str:
    step = summary["best_test_step"]
    if (workdir / "checkpoints" / str(step)).is_dir():
        return f"step {step}"
    return f"not kept, since none was saved at step {step}; see train.checkpoint_every"


def _dry_run(config: Config, args: Namespace) -> None:
    """Prints memory, FLOPs and time of a run on the devices here, or on those of a topology."""
    if args.distributed or any((args.coordinator, args.processes, args.process is not None)):
        raise UserError(
            "--dry-run compiles for all devices in one process; leave out --distributed, "
            "--coordinator, --processes and --process"
        )
    from resjax.xla.compilation_cache import enable_compilation_cache
    from resjax.xla.target import compiling_for
    from resjax.xla.topologies import describe

    target: AbstractContextManager[None] = nullcontext()
    if args.topology is not None:
        target = compiling_for(describe(args.topology))
    else:
        enable_compilation_cache()  # the run loads the programs that are compiled here
    from resjax.train.dry_run import dry_run  # late, so that a mistake is refused at once

    with target:
        for name, text in dry_run(config, partial(print, flush=True)).items():
            print(f"{name:20}{text}")


def _profile(trainer: Any, steps: int, folder: Path, out: TextIO) -> None:
    """Prints the ten operations that take most of a step's time."""
    from resjax.train.profiling import profile

    with report_disk_errors(folder):
        operations = profile(trainer, steps, folder)[:10]
    rows = [
        (operation.name, f"{1e3 * operation.seconds / steps:.3f} ms", f"{operation.share:.1%}")
        for operation in operations
    ]
    print_table(("operation", "per step", "share"), rows, out)
    print(f"trace, for Perfetto or XProf: {folder}", file=out)
