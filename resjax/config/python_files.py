"""Finds and runs Python files: configs and experiments, the user's and resjax's own."""

import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resjax.config.schema import no_such_field
from resjax.errors import UserError, error_in, first_few
from resjax.models.presets import nearest
from resjax.text import user_path


def shipped(kind: str) -> dict[str, Path]:
    """Returns the files of resjax's own "configs" or "experiments" by name.

    An installed resjax has them inside the package, a checkout beside it.
    """
    package = Path(__file__).parents[1]
    inside, beside = package / kind, package.parent / kind
    folder = inside if inside.is_dir() else beside
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def find_script(text: str, kind: str) -> Path:
    """Returns the Python file that a user typed: its path, or the name of one of resjax's own.

    Args:
      text: such as `my_config.py` or `quickstart`.
      kind: "configs" or "experiments".

    Raises:
      UserError: there is neither such a file nor such a name.
    """
    named = shipped(kind)
    if text in named:
        return named[text]
    path = user_path(text)
    if not path.exists():
        raise _missing(path, named)
    return path


def import_function(path: Path, name: str, contract: str) -> Callable[..., Any]:
    """Executes a Python file and returns its function `name`.

    Args:
      path: the file.
      name: of the function.
      contract: what the function must do, for the message of a file without it.

    Raises:
      UserError: there is no such file or function, or the file raises; the message names file and
        line.
    """
    if path.is_dir():
        files = first_few(sorted(each.name for each in path.glob("*.py")))
        raise UserError(f"{path}: is a folder; name a Python file{': ' * bool(files)}{files}")
    if not path.is_file():
        raise _missing(path)
    # The path is its name, so that the module shadows no other.
    spec = importlib.util.spec_from_file_location(str(path), path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not a Python file; its name must end in .py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with errors_in(path):
        spec.loader.exec_module(module)
    if not callable(function := getattr(module, name, None)):
        raise UserError(f"{path}: has no function {name}(); it must {contract}")
    return function


@contextmanager
def errors_in(path: Path) -> Iterator[None]:
    """Turns what the user's code in `path` raises into a UserError that names file and line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # A locked ConfigDict's own message lists all of its fields.
        if unknown := re.search(r'Key "(.+?)" does not exist and cannot be added', str(error)):
            error = UserError(no_such_field(unknown[1])).with_traceback(error.__traceback__)
        raise UserError(error_in(path, error)) from error


def _missing(path: Path, named: Collection[str] = ()) -> UserError:
    beside = map(str, sorted(path.parent.glob("*.py")))
    meant = path.stem if path.stem in named else path  # configs/X.py, elsewhere, means X
    return UserError(f"{path}: no such file{nearest(meant, [*beside, *named])}")
