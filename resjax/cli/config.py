"""Shows every config field: its value, meaning, type, bounds and default.

FILE is a config, such as quickstart; without one, the values are the defaults. Fields that are None
take the value of the architecture model.name, or of the network's family.
"""

import dataclasses
import inspect
import shutil
import textwrap
from argparse import ArgumentParser, Namespace
from typing import Any

from resjax.cli.arguments import CONFIG_HELP
from resjax.config import Config, default_config, from_dict, load, override
from resjax.config.fields import documentation
from resjax.config.schema import FIELDS


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="FILE", help=CONFIG_HELP)


def run(args: Namespace) -> None:
    content = default_config() if args.config is None else load(args.config)
    _print_section(from_dict(override(content, args.overrides).to_dict()), Config())


def _print_section(section: Any, defaults: Any, prefix: str = "") -> None:
    meanings = documentation(type(section))
    for name, value in vars(section).items():
        path, default = f"{prefix}{name}", getattr(defaults, name)
        print()
        if dataclasses.is_dataclass(value):
            _print_filled(f"{path}: {inspect.getdoc(type(value))}")
            _print_section(value, default, f"{path}.")
        else:
            field = FIELDS[path]
            kind = ", ".join(filter(None, (str(field), str(field.bounds))))
            print(f"  {path} = {typed(value)}")
            _print_filled(meanings[name], indent=" " * 6)
            _print_filled(f"({kind}; default: {typed(default)})", indent=" " * 6)


def typed(value: Any) -> str:
    """Returns a value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "()"
    return str(value) or '""'


def _print_filled(text: str, indent: str = "") -> None:
    width = min(shutil.get_terminal_size().columns, 100)
    print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent))
