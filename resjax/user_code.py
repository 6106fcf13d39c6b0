"""The user's own code: names written `package.module:Name`, and where an error in it was raised."""

import difflib
import functools
import importlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from resjax.errors import UserError, one_line

P = ParamSpec("P")
R = TypeVar("R")

NOT_THE_USERS = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), "<")
INSTALLED = {"site-packages", "dist-packages"}


def import_name(name: str) -> Any:
    """Returns the object of a name such as `my_blocks:ReZeroBlock`.

    Modules in the working directory are found too, which a console script does not search.

    Raises:
      ImportError: the module does not exist, cannot be imported or lacks the name; one line.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    module, _, attribute = name.partition(":")
    try:
        if not all(part.isidentifier() for part in module.split(".")):
            raise ModuleNotFoundError(name=module)
        imported = importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            near = _nearest(module, (path.stem for path in Path().glob("*.py")))
            raise ImportError(f"no module named {error.name!r} here{near}") from error
        if place := _place(error):
            text = error.msg if isinstance(error, SyntaxError) else one_line(error)
            raise ImportError(f"{place}: {text}") from error
        raise
    if not hasattr(imported, attribute):
        near = _nearest(attribute, vars(imported))
        raise ImportError(f"module {module!r} has no attribute {attribute!r}{near}")
    return getattr(imported, attribute)


_trusted: set[str] = set()  # modules that the user has named in this process


def trust(names: Iterable[str]) -> None:
    """Allows files to name code in these modules; a name such as `my_blocks:Block` counts too."""
    _trusted.update(name.partition(":")[0] for name in names)


def require_trusted(names: Iterable[Any], where: str, remedy: str = "add --code={module}") -> None:
    """Checks the names that a file gives, before any of them is imported.

    Args:
      names: ours, or `package.module:Name`.
      where: the file or folder.
      remedy: what the user types to have `{name}` of `{module}` imported.

    Raises:
      UserError: the user has not named the module.
    """
    for name in names:
        module, colon, _ = str(name).partition(":")
        if colon and module not in _trusted:
            typed = remedy.format(module=module, name=name)
            raise UserError(
                f"{where}: names {str(name)[:100]!r}, code that is not part of resjax; if you "
                f"trust it, {typed}"
            )


def describe(error: Exception) -> str | None:
    """Returns block, layer and message of an error, then the frames of the user's files.

    Returns None for an error that went through no file of the user.
    """
    if not (users := users_traceback(error)):
        return None
    blocks = [type(module) for module, _ in _modules(users)][-1:]
    names = [f"{block.__module__}:{block.__qualname__}" for block in blocks]
    layers = [f"layer {'/'.join(path)}" for _, path in _modules(error.__traceback__)][-1:]
    where = ", ".join([*names, *layers]) or _place(error)
    frames = "".join(traceback.format_tb(users)).rstrip()
    return f"{where}: {one_line(error)}\n{frames}"


def shows_users_frames(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function raise errors of the user's code with the frames of the user's files only."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not (text := describe(error)):
                raise
            error.add_note(text.partition("\n")[0])
            raise error.with_traceback(users_traceback(error)) from None

    return wrapper


def users_traceback(error: Exception) -> TracebackType | None:
    """Returns an error's traceback without the frames of resjax and of installed packages."""
    entries, entry = [], error.__traceback__
    while entry:
        if _is_users(entry.tb_frame.f_code.co_filename):
            entries.append(entry)
        entry = entry.tb_next
    linked = None
    for entry in reversed(entries):
        linked = TracebackType(linked, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return linked


def _modules(entries: TracebackType | None) -> list[tuple[Any, tuple[str, ...]]]:
    """Returns the Flax modules whose methods a traceback goes through, and their paths."""
    found = []
    for frame, _ in traceback.walk_tb(entries):
        module = frame.f_locals.get("self")
        if path := getattr(getattr(module, "scope", None), "path", None):
            found.append((module, path))
    return found


def _place(error: Exception) -> str | None:
    """Returns `file:line` of the user's code that raised an error, None if no such code did."""
    if isinstance(error, SyntaxError) and error.filename:
        file, line = error.filename, error.lineno
    elif users := users_traceback(error):
        file, line = traceback.extract_tb(users)[-1][:2]
    else:
        return None
    here = Path.cwd()
    return f"{Path(file).relative_to(here) if here in Path(file).parents else file}:{line}"


def _is_users(file: str) -> bool:
    return not file.startswith(NOT_THE_USERS) and not INSTALLED & {*Path(file).parts}


def _nearest(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
