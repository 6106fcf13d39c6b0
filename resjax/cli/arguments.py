"""Arguments that several commands share, and the checks that need no heavy import."""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from resjax.errors import UserError

REMOTE = ("hub:", "https:", "http:")  # sources of weights that are not paths
CONFIG_HELP = "configs/X.py; --config.FIELD=VALUE overrides one field"


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"`{self.prog}`: {message}")


def add_command(
    commands: Any, name: str, doc: str | None, run: Callable[[argparse.Namespace], int | None]
) -> argparse.ArgumentParser:
    """Adds a command whose help is the first line of `doc`; returns its parser."""
    summary = (doc or "").strip().partition("\n")[0]
    parser = commands.add_parser(name, help=summary, description=doc, allow_abbrev=False)
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
        overrides[field.removeprefix("--config.")] = value
    return words, overrides


def integer(minimum: int) -> Callable[[str], int]:
    """Returns an argument type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {minimum}")
        return int(text)

    return parse


def checkpoint(text: str) -> str:
    """An argument type: the name of one of a run's checkpoints."""
    if text not in ("last", "best") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not last, best or a step")
    return text


def existing(text: str) -> Path:
    """An argument type: the path of a file or folder that exists."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return Path(text)


def weights_source(text: str) -> str:
    """An argument type: weights on this machine, or their address."""
    return text if text.startswith(REMOTE) else str(existing(text))


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """Returns the type of `--out`: a writable file, with one of these suffixes or any."""

    def parse(text: str) -> Path:
        path = Path(text)
        if suffixes and path.suffix not in suffixes:
            ends = " or ".join(suffixes)
            raise argparse.ArgumentTypeError(f"{text}: the name must end in {ends}")
        require_writable(path.parent, "--out")
        return path

    return parse


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help=CONFIG_HELP)


def add_workdir(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help=what)


def add_weights(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """Adds the argument `name` for weights, and `--which` of a run's checkpoints to read."""
    source = "a run folder, a weights folder, or a weights file"
    parser.add_argument(name, type=weights_source, metavar="WEIGHTS", help=source, **options)
    add_which(parser, "--which")


def add_which(parser: argparse.ArgumentParser, name: str) -> None:
    which = "a run's checkpoint: last (default), best by the primary test metric, or a step"
    parser.add_argument(name, type=checkpoint, default="last", metavar="WHICH", help=which)


def add_images(parser: argparse.ArgumentParser, number: str) -> None:
    """Adds images and how they are batched; see `batching`."""
    add = parser.add_argument
    add("images", type=Path, nargs=number, metavar="IMAGE", help="an image file or a folder")
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
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in missing:
            path.rmdir()
    except OSError as error:
        raise UserError(f"{option}={folder}: cannot write there: {error.strerror}") from error
