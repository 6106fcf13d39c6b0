"""Measures finished runs: calls an experiment's `measure`, and writes what it returns.

The rows are in the file `measurements/EXPERIMENT.json` of the run folder. The file is written whole
after `measure` has returned, so that a run is measured completely or not at all. The file names the
checkpoint and the source of `measure`: if the run goes on, or the source changes, the run is
measured again.
"""

import ast
import hashlib
import math
import sys
import time
import tokenize
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from resjax.disk import report_disk_errors
from resjax.errors import UserError, error_in
from resjax.run_files import (
    LARGEST_STEP,
    DamagedFileError,
    Findings,
    checkpoint_digest,
    experiment_name,
    find_divergence,
    findings_path,
    read_findings,
    read_summary,
)
from resjax.train import records
from resjax.train.lock import Claim, locked
from resjax.train.progress import Warn, print_warning

FUNCTION = "measure"


class Measure(NamedTuple):
    """An experiment's `measure`, which another process can call too.

    Attributes:
      experiment: its name.
      file: the path of the experiment file, for messages.
      source: the text of the file, as it was when the sweep was launched.
      code: digest of `measure` and of what it uses of the file.
    """

    experiment: str
    file: Path
    source: str
    code: str

    @property
    def function(self) -> str:
        """The function and its file, for messages."""
        return f"{FUNCTION}() of {self.file}"


def find_measure(experiment: Path) -> Measure | None:
    """Returns the `measure` of an experiment file, or None if it has none."""
    with tokenize.open(experiment) as file:
        return measure_in(file.read(), experiment_name(experiment), experiment)


def measure_in(source: str, experiment: str, file: Path) -> Measure | None:
    """Returns the `measure` in the text of an experiment file, or None if it has none."""
    used = used_source(source, FUNCTION)
    if used is None:
        return None
    return Measure(experiment, file, source, hashlib.sha256(used.encode()).hexdigest())


def used_source(source: str, name: str) -> str | None:
    """Returns what a definition of a Python file uses of that file, itself included.

    These are its definitions, assignments and imports at the top level, followed by name, in the
    order of the file. Code that is imported from elsewhere is not looked at.

    Args:
      source: the text of the file.
      name: the name of the definition.

    Returns:
      The lines, or None if the file defines no such name.
    """
    defined: dict[str, list[ast.stmt]] = {}
    for statement in ast.parse(source).body:
        for each in _defined_names(statement):
            defined.setdefault(each, []).append(statement)
    if name not in defined:
        return None
    used: set[ast.stmt] = set()
    waiting = [name]
    while waiting:
        for statement in defined.pop(waiting.pop(), ()):
            used.add(statement)
            waiting += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
    lines, chosen = source.splitlines(), list[str]()
    for statement in sorted(used, key=lambda each: each.lineno):
        decorators = getattr(statement, "decorator_list", ())
        first = min([statement.lineno, *(each.lineno for each in decorators)])
        chosen += [line.rstrip() for line in lines[first - 1 : statement.end_lineno]]
    return "\n".join(chosen)


def _defined_names(statement: ast.stmt) -> Iterable[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
        return
    for node in ast.walk(statement):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.FunctionDef(name=name):
                yield name
            case ast.alias(name=name, asname=other):
                yield (other or name).partition(".")[0]


def needs_measuring(measure: Measure, folder: Path, warn: Warn = print_warning) -> bool:
    """Returns whether a finished run has to be measured, perhaps again.

    It is measured again if `measure` has changed or if the run has taken further steps. A run
    without its last checkpoint cannot be measured again: what was measured is kept, with a warning
    if `measure` has changed. A diverged run is not measured.
    """
    with suppress(DamagedFileError):  # which is reported when the run is measured
        if find_divergence(folder):
            return False
    step = int(read_summary(folder / "summary.json")["steps"])
    checkpoint = checkpoint_digest(folder, step)
    found = _findings(measure, folder)
    if found is None or found.step != step:
        return True
    if checkpoint not in ("", found.checkpoint):
        return True
    if found.code != measure.code and not checkpoint:
        warn(
            f"{findings_path(folder, measure.experiment)} was measured before {measure.function} "
            f"changed, and {folder} has no checkpoint to measure it again"
        )
    return found.code != measure.code and bool(checkpoint)


def _findings(measure: Measure, folder: Path) -> Findings | None:
    with suppress(DamagedFileError, FileNotFoundError):
        return read_findings(findings_path(folder, measure.experiment))
    return None


def measure_run(measure: Measure, folder: Path, claim: Claim | None = None) -> None:
    """Measures a finished run and writes what was found.

    Args:
      measure: the experiment's `measure`.
      folder: the run folder.
      claim: the lock of the folder, if this process holds it already; it then stays held.

    Raises:
      UserError: the run cannot be measured, `measure` raises or returns something else, or the
        folder cannot be written.
    """
    from resjax.measurements import FinishedRun  # imports JAX, which takes seconds

    start = time.monotonic()
    with locked(folder, print_warning, claim) as lock:
        if lock:
            lock.note(state="measuring")
        run = FinishedRun(folder, print_warning)
        try:
            rows = _rows(_load(measure)(run))
        except Exception as error:
            raise UserError(error_in(measure.file, error)) from error
        content = {
            "experiment": measure.experiment,
            "step": run.step,
            "checkpoint": run.checkpoint,
            "code": measure.code,
            "seconds": round(time.monotonic() - start, 1),
            "provenance": records.provenance(),
            "rows": rows,
        }
        path = findings_path(folder, measure.experiment)
        if lock:
            lock.require()
        with report_disk_errors(folder):
            path.parent.mkdir(exist_ok=True)
            records.write_json(path, content)


def _load(measure: Measure) -> Any:
    """Returns the function, from the source as it was when the sweep was launched."""
    # The path is the module's name, so that it shadows no other; dataclasses look it up.
    module = sys.modules[str(measure.file)] = ModuleType(str(measure.file))
    module.__file__ = str(measure.file)
    exec(compile(measure.source, measure.file, "exec"), vars(module))
    return getattr(module, FUNCTION)


def _rows(found: Any) -> list[dict[str, Any]]:
    """Returns what `measure` returned as rows of a table of JSON's values."""
    if isinstance(found, Mapping):
        found = [found]
    rows = list(found) if isinstance(found, Iterable) and not isinstance(found, str) else [found]
    for row in rows:
        if not isinstance(row, Mapping):
            raise UserError(
                f"{FUNCTION}() returned {type(row).__name__}; return a dict of values by name, or "
                "a list of such dicts"
            )
        if "folder" in row:
            raise UserError(f"{FUNCTION}() names a value folder, which is the run's own column")
    return [{str(name): _value(str(name), value) for name, value in row.items()} for row in rows]


def _value(name: str, value: Any) -> str | bool | int | float | None:
    """Returns a number, text or boolean as JSON has it; None for a number that is not finite."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # of NumPy or JAX
        value = np.asarray(value).item()
    match value:
        case str() | bool() | None:
            return value
        case int() if abs(value) <= LARGEST_STEP:
            return value
        case int() | float():
            return float(value) if math.isfinite(value) else None
    raise UserError(
        f"{FUNCTION}() returned {name} as {_describe(value)}; values are numbers, texts or booleans"
    )


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"an array of shape {tuple(shape)}"
