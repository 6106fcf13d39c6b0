"""The `resjax` command: one module per command, with `add_arguments(parser)` and `run(arguments)`.

The first line of a command's module docstring is its help. Commands import JAX, pandas and
Matplotlib only when they run, so that help, tables and refused mistakes answer at once. A user's
mistake ends in one line and exit code 2. An error in the user's own code is shown with the frames
of the user's files only; a fault in resjax keeps its traceback.
"""

import argparse
import errno
import shlex
import signal
import sys
from collections.abc import Sequence

from resjax import __version__
from resjax.cli import (
    config,
    data,
    evaluate,
    export,
    features,
    import_weights,
    models,
    new,
    predict,
    probe,
    report,
    status,
    sweep,
    track,
    train,
    verify,
)
from resjax.cli.arguments import Parser, add_command, split_overrides, split_settings
from resjax.cli.output import notify
from resjax.errors import UserError
from resjax.sweeps.launchers import LAUNCHERS
from resjax.terminal import standard_streams
from resjax.text import printable
from resjax.train.signals import Stopped
from resjax.user_code import describe, trust

COMMANDS = {
    "train": train,
    "sweep": sweep,
    "status": status,
    "report": report,
    "track": track,
    "evaluate": evaluate,
    "predict": predict,
    "features": features,
    "probe": probe,
    "import": import_weights,
    "export": export,
    "verify": verify,
    "models": models,
    "data": data,
    "config": config,
    "new": new,
}


REFUSED_BY_THE_SYSTEM = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    typed = list(sys.argv[1:] if argv is None else argv)
    with standard_streams() as keep_going:
        try:
            arguments = _parse(typed)
            trust(getattr(arguments, "code", ()))
            if _writes_files(arguments):
                keep_going()
            code = arguments.run(arguments) or 0
            sys.stdout.flush()
            return code
        except UserError as error:
            print(f"resjax: error: {printable(str(error))}", file=sys.stderr)
            return 2
        except Stopped as error:
            print(f"resjax: {error}; the same command goes on from here", file=sys.stderr)
            return error.code
        except KeyboardInterrupt:
            print("resjax: interrupted; the same command goes on from here", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
            return 128 + signal.SIGPIPE
        except Exception as error:
            if lacking := _lacking_device():
                print(f"resjax: error: {lacking}", file=sys.stderr)
                return 2
            if isinstance(error, OSError) and error.errno in REFUSED_BY_THE_SYSTEM:
                notify(f"error: {error.filename or 'a file'}: {error.strerror}")
                return 2
            if not (text := describe(error)):
                raise
            notify(f"error in {text}")
            return 1


def _writes_files(arguments: argparse.Namespace) -> bool:
    """Returns whether a command writes files, so that it goes on without a terminal."""
    names = arguments.command, getattr(arguments, "data_command", None)
    always = names[0] in ("train", "sweep", "report", "track") or names == ("data", "prepare")
    return always or getattr(arguments, "out", None) is not None


def _lacking_device() -> UserError | None:
    """Returns why JAX does not start, if that is why a command failed."""
    if "jax" in sys.modules:
        from resjax.xla.devices import require_devices

        try:
            require_devices()
        except UserError as error:
            return error
    return None


def make_parser() -> Parser:
    """Returns the parser of all commands."""
    parser = Parser(prog="resjax", description="Residual-network experiments in JAX and Flax.")
    parser.add_argument("--version", action="version", version=f"resjax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(add_command(commands, name, module.__doc__, module.run))
    return parser


def _parse(typed: list[str]) -> argparse.Namespace:
    parser = make_parser()
    words, overrides = split_overrides(typed)
    words, settings = split_settings(words, LAUNCHERS)
    arguments = parser.parse_args(words or ["--help"])
    if overrides and "config" not in arguments:
        raise UserError(f"`resjax {arguments.command}` takes no --config.{next(iter(overrides))}")
    if settings and "launcher" not in arguments:
        raise UserError(f"`resjax {arguments.command}` takes no settings of a launcher")
    arguments.overrides, arguments.settings = overrides, settings
    arguments.typed = shlex.join(["resjax", *typed])
    return arguments
