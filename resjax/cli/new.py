"""Writes a block, shortcut, experiment, diagnostic or task to start from, with its test.

The files NAME.py and test_NAME.py appear in the current folder; nothing is overwritten.
"""

import ast
from argparse import ArgumentParser, Namespace
from pathlib import Path

from resjax.starters import KINDS, write_starter


def add_arguments(parser: ArgumentParser) -> None:
    kinds = f"one of {', '.join(KINDS)}"
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=kinds)
    parser.add_argument("name", metavar="NAME", help="the name of the module, such as my_block")


def run(args: Namespace) -> None:
    file, test = write_starter(args.kind, args.name, Path())
    print(f"{args.kind}: {file}")
    print(f"its test: {test}")
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")), clean=False) or ""
    print(*(line for line in doc.splitlines() if line.startswith("    ")), sep="\n")
