"""Files to start from: a block, a shortcut, an experiment, a diagnostic and a task of your own.

Each kind is the file `my_KIND.py` of this folder, which works as it stands, with its test. They are
written under another name by replacing `my_KIND` and `MyKind` in them.
"""

import importlib.util
import io
import keyword
import re
import tokenize
from pathlib import Path

from resjax.disk import write_atomically
from resjax.errors import UserError

KINDS = ("block", "shortcut", "experiment", "diagnostic", "task")

LOADED = re.compile(r"conftest|test_.*|.*_test|sitecustomize|usercustomize")
"""Matches the names of files that pytest collects as tests, or that it or Python executes."""


def write_starter(kind: str, name: str, folder: Path) -> tuple[Path, Path]:
    """Writes a starting file, `NAME.py`, and its test, `test_NAME.py`.

    Args:
      kind: one of KINDS.
      name: of the module, such as `wide_block`; a class is then called `WideBlock`.
      folder: where to write them.

    Returns:
      Both files.

    Raises:
      UserError: one of them exists, or a module cannot have this name.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"{name!r} cannot be the name of a module; use lower-case letters, digits and "
            f"underscores, such as {_near(name) or f'my_{kind}'}"
        )
    old, new = f"my_{kind}", name
    old_class, new_class = _class_name(old), _class_name(new)
    here = Path(__file__).parent
    files = [(here / f"{test}{old}.py", folder / f"{test}{new}.py") for test in ("", "test_")]
    for _, file in files:
        if file.exists():
            raise UserError(f"{file}: exists already; choose another name than {name}")
    sources = [starter.read_text(encoding="utf-8") for starter, _ in files]
    if used := _use(name, {new, new_class} - {old, old_class}, sources):
        raise UserError(f"{name} is {used}; choose another name, such as my_{name}")
    for (_, file), source in zip(files, sources, strict=True):
        write_atomically(file, source.replace(old, new).replace(old_class, new_class))
    return files[0][1], files[1][1]


def _class_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _near(name: str) -> str:
    """Returns the nearest name that a module can have; it may be empty."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.removesuffix(".py"))
    return re.sub(r"\W+", "_", words, flags=re.ASCII).strip("_0123456789").lower()


def _use(name: str, defined: set[str], sources: list[str]) -> str | None:
    """Returns what a module's name already means, if it means something.

    Args:
      name: of the module.
      defined: the names that the sources are to define.
      sources: of the file and its test.
    """
    if keyword.iskeyword(name):
        return "a word of Python"
    if LOADED.fullmatch(name):
        return "the name of a file that pytest or Python loads by itself"
    found = importlib.util.find_spec(name)
    if found and found.origin:
        return "an installed module"
    for source in sources:
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        if defined & {token.string for token in tokens if token.type == tokenize.NAME}:
            return "a name that the file uses"
    return None
