"""Arguments that several commands share, and the checks that need no heavy import."""

import argparse
import difflib
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from resjax.config.python_files import find_script, shipped
from resjax.config.schema import meant_field
from resjax.errors import UserError
from resjax.models.presets import nearest
from resjax.text import encodable, user_path
from resjax.train.signals import signal_names

REMOTE = ("hub:", "https:", "http:")  # sources of weights that are not paths
CONFIG_HELP = (
    f"a file, or one of {', '.join(shipped('configs'))}; --config.FIELD=VALUE overrides one field"
)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserErrors, with a hint at what was meant."""

    def error(self, message: str) -> NoReturn:
        message = message.replace("ignored explicit argument", "takes no value, not")
        raise UserError(f"`{self.prog}`: {message}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses unknown and abbreviated options before argparse reports missing ones."""
        for word in args or ():
            if word == "--" or (self._subparsers and not word.startswith("-")):
                break
            option = word.partition("=")[0]
            if re.match(r"--?[^\W\d]", option) and option not in self._option_string_actions:
                self._refuse("option", word)
        parsed, extra = super().parse_known_args(args, namespace)
        for word in extra:
            self._refuse("argument", word)
        return parsed, extra

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = ", ".join(action.choices)
            hint = nearest(value, action.choices) or f"; known: {known}"
            raise argparse.ArgumentError(action, f"no such choice: {value!r}{hint}")

    def _refuse(self, kind: str, word: str) -> NoReturn:
        self.error(f"unknown {kind} {word.partition('=')[0]}{self._hint(kind, word)}")

    def _hint(self, kind: str, word: str) -> str:
        """Returns a hint at the option, config field or argument that a word was meant to be."""
        if self._subparsers:
            return "; options follow the command"
        typed, equals, value = word.partition("=")
        takes_config = any(action.dest == "config" for action in self._actions)
        name = typed.lstrip("-").removeprefix("config.").replace("-", "_")
        field = meant_field(name) if takes_config and (equals or kind == "option") else None
        options = [each for each in self._option_string_actions if each not in ("-h", "--help")]
        close = difflib.get_close_matches(typed, options, n=1)
        if field and (not close or field.rpartition(".")[2] == name.rpartition(".")[2]):
            return f"; did you mean --config.{field}{equals}{value}?"
        if close:
            return f"; did you mean {close[0]}?"
        if takes := " ".join(str(action.metavar) for action in self._get_positional_actions()):
            return f"; it takes {takes} without an option"
        return f"; known: {', '.join(options)}" if options else ""


def add_command(
    commands: Any, name: str, doc: str | None, run: Callable[[argparse.Namespace], int | None]
) -> argparse.ArgumentParser:
    """Adds a command whose help is the first line of `doc`; returns its parser."""
    summary = (doc or "").strip().partition("\n")[0]
    parser = commands.add_parser(name, help=summary, description=doc)
    parser.set_defaults(run=run)
    return parser


def split_overrides(typed: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separates `--config.field=value` and `--config.field value` from the other words."""
    words, overrides = [], {}
    remaining = iter(typed)
    for word in remaining:
        field, equals, value = word.partition("=")
        if not field.startswith("--config."):
            words.append(word)
            continue
        if not equals:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise UserError(f"{field} needs a value: {field}=VALUE")
        if field == "--config.":
            raise UserError(f"{word}: names no field; see `resjax config`")
        overrides[field.removeprefix("--config.")] = value
    return words, overrides


def split_settings(
    typed: Sequence[str], names: Iterable[str]
) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Separates `--NAME.key=value`, or `--NAME.key`, from the other words.

    Args:
      typed: the words of a command line.
      names: the names of the launchers.

    Returns:
      The other words, and the settings by launcher; a key without a value has "".
    """
    words, settings = [], dict[str, dict[str, str]]()
    for word in typed:
        option, _, value = word.partition("=")
        name, dot, key = option.removeprefix("--").partition(".")
        if not (dot and option.startswith("--") and name in names):
            words.append(word)
        elif not key:
            raise UserError(f"{word}: names no setting of the launcher {name}")
        else:
            settings.setdefault(name, {})[key] = value
    return words, settings


def integer(minimum: int) -> Callable[[str], int]:
    """Returns an argument type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {minimum}")
        return int(text)

    return parse


def share(text: str) -> float:
    """An argument type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def checkpoint(text: str) -> str:
    """An argument type: the name of one of a run's checkpoints."""
    if text not in ("last", "best") and not text.isdecimal():
        hint = "; --workdir names the run folder" if Path(text).exists() else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not last, best or a step{hint}")
    return text


def path(text: str) -> Path:
    """An argument type: the path of a file or folder. An unset `$DIR` is not the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return user_path(text)


def existing(text: str) -> Path:
    """An argument type: the path of a file or folder that exists."""
    found = path(text)
    if not found.exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return found


def experiment_file(text: str) -> Path:
    """An argument type: the file of an experiment, or the name of one of resjax's own."""
    path(text)
    try:
        return find_script(text, "experiments")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def weights_source(text: str) -> str:
    """An argument type: weights on this machine, or their address."""
    return text if text.startswith(REMOTE) else str(existing(text))


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """Returns the type of `--out`: a writable file, with one of these suffixes or any."""

    def parse(text: str) -> Path:
        file = path(text)
        if suffixes and file.suffix not in suffixes:
            ends = " or ".join(filter(None, suffixes))
            raise argparse.ArgumentTypeError(f"{text}: the name must end in {ends}")
        require_writable(file.parent, "--out")
        return file

    return parse


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help=CONFIG_HELP)


def add_workdir(parser: argparse.ArgumentParser, what: str, required: bool = True) -> None:
    parser.add_argument("--workdir", type=_workdir, required=required, metavar="DIR", help=what)


def _workdir(text: str) -> Path:
    if encodable(text) != text:  # which JAX and Orbax cannot open
        raise argparse.ArgumentTypeError(f"{encodable(text)}: the name is not UTF-8")
    return path(text)


def add_save_on(parser: argparse.ArgumentParser) -> None:
    """Adds `--save-on`: the signals after which a run saves and goes on."""
    signals = "signals (HUP, USR1, USR2) on which a run saves and goes on; others save and end it"
    parser.add_argument(
        "--save-on", type=signal_names, default="HUP", metavar="NAMES", help=f"{signals} (HUP)"
    )


def add_weights(parser: argparse.ArgumentParser, *names: str, **options: Any) -> None:
    """Adds an argument for weights, and `--which` of a run's checkpoints to read."""
    source = "a run folder, a weights folder, or a weights file"
    parser.add_argument(*names, type=weights_source, metavar="WEIGHTS", help=source, **options)
    add_which(parser, "--which")


def add_which(parser: argparse.ArgumentParser, *names: str) -> None:
    which = "a run's checkpoint: last (default), best by the primary test metric, or a step"
    parser.add_argument(*names, type=checkpoint, default="last", metavar="WHICH", help=which)
    add_code(parser)


def add_code(parser: argparse.ArgumentParser) -> None:
    """Adds `--code`: the modules that a file may name and a command may then import."""
    code = "modules of your own that the file may name, such as my_blocks"
    parser.add_argument("--code", type=modules, default=(), metavar="M,...", help=code)


def modules(text: str) -> tuple[str, ...]:
    """An argument type: names of Python modules, separated by commas."""
    names = tuple(text.split(","))
    if bad := [name for name in names if not all(map(str.isidentifier, name.split(".")))]:
        raise argparse.ArgumentTypeError(f"{bad[0]!r} is not the name of a module")
    return names


def add_images(parser: argparse.ArgumentParser, number: str) -> None:
    """Adds images and how they are batched; see `batching`."""
    add = parser.add_argument
    add("images", type=path, nargs=number, metavar="IMAGE", help="an image file or a folder")
    add("--on-bad-image", choices=("error", "skip"), default="error", help="if one is damaged")
    add("--batch-size", type=integer(1), default=64, metavar="N", help="images per batch")
    add("--workers", type=integer(0), default=0, metavar="N", help="decoding processes; 0 is none")


def batching(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keywords of `resjax.inference.images.each_image` from `add_images`."""
    names = ("batch_size", "on_bad_image", "workers")
    return {name: getattr(args, name) for name in names}


def require_writable(folder: Path, option: str = "--workdir") -> None:
    """Raises UserError if `folder` cannot be written; creates nothing."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for left in reversed(range(10)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    break
            except FileNotFoundError:  # another process checks it too, and has just removed it
                if not left:
                    raise
    except OSError as error:
        raise UserError(
            f"{option}={folder}: cannot write to this folder: {error.strerror}"
        ) from error
    finally:
        for path in missing:
            with suppress(OSError):  # another process has written to it meanwhile
                path.rmdir()
