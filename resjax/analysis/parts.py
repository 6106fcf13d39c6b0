"""The parts of a report: all its runs with one experiment, or each sweep with its own."""

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from resjax.analysis.claims import Claim
from resjax.analysis.experiment_figures import Experiment, Tables, load_tables
from resjax.analysis.runs import Sweep, Sweeps, Warn, is_inside, varying
from resjax.disk import write_atomically
from resjax.errors import UserError
from resjax.run_files import DamagedFileError, find_error, read_json_object

NO_FIELD = "–"
"""Stands for the value of a setting that is None or that a sweep's configs do not have."""

MOST_VALUES = 12
"""The most values of a setting that are listed for a sweep."""


class FiguresError(UserError):
    """An experiment's figures could not be drawn, or its claims not be judged.

    The report has the default figures, or no claims.
    """


class Part(NamedTuple):
    """Runs that one experiment draws.

    Attributes:
      name: the name of the sweep; "" if the report has only one part.
      roots: the folders to type for a report of the part.
      file: the experiment, or None for default figures.
      tables: of all runs of the part, also of those that another part has too.
    """

    name: str
    roots: list[Path]
    file: Path | None
    tables: Tables

    @property
    def slug(self) -> str:
        """The name as that of a folder and in an HTML id; "" for the only part."""
        return re.sub(r"[^\w.-]", "_", self.name).lstrip(".")


def load_parts(
    sweeps: Sweeps, roots: list[Path], experiment: Path | None, warn: Warn
) -> list[Part]:
    """Returns the parts of a report on the folders `roots`.

    All runs are one part if an experiment is named, if there is one sweep, or if all sweeps have
    the same experiment and at most one field differs only between the sweeps.
    """
    typed = {root.resolve(): root for root in roots}
    named = {name: typed.get(each.folder, each.folder) for name, each in sweeps.by_name.items()}
    folders = list(named.values()) or roots
    runs = sweeps.runs
    mixed = "sweep" in runs and runs["sweep"].isna().any()  # with run folders by themselves
    file = experiment or find_experiment(roots if mixed else folders)
    together = experiment or mixed or len(folders) == 1 or not sweeps.by_name
    if together or (file and "sweep" not in varying(runs)):
        return [Part("", roots, file, load_tables(runs, file, warn))]
    parts = []
    for name, sweep in sweeps.by_name.items():
        file = find_experiment([named[name]])
        parts.append(Part(name, [named[name]], file, load_tables(sweep.runs, file, warn)))
    return parts


def find_experiment(folders: Sequence[Path]) -> Path | None:
    """Returns the copy of the experiment in the sweep folders, if all of them have the same."""
    copies = [folder / "experiment.py" for folder in folders]
    inside = [copy.is_file() and is_inside(copy, copy.parent) for copy in copies]
    same = all(inside) and len({copy.read_bytes() for copy in copies}) == 1
    return copies[0] if same else None


def differing_settings(sweeps: Sweeps) -> pd.DataFrame:
    """Returns the config fields whose values differ between the sweeps.

    Returns:
      One row per field: `field`, and in a column for each sweep its values as text.
    """
    tables = {name: sweep.runs for name, sweep in sweeps.by_name.items()}
    fields = dict.fromkeys(
        str(name) for runs in tables.values() for name in runs if name == "seed" or "." in str(name)
    )
    rows = []
    for field in fields if len(tables) > 1 else ():
        values = [_values(runs, field) for runs in tables.values()]
        if any(set(each) != set(values[0]) for each in values):
            texts = map(_listed, values)
            rows.append({"field": field, **dict(zip(tables, texts, strict=True))})
    return pd.DataFrame(rows, columns=["field", *tables])


def _values(runs: pd.DataFrame, field: str) -> list[Any]:
    if field not in runs:
        return [NO_FIELD]
    texts = [NO_FIELD if _is_missing(value) else str(value) or '""' for value in runs[field]]
    return list(dict.fromkeys(texts))


def _is_missing(value: Any) -> bool:
    return value is None or value != value


def _listed(values: Sequence[str]) -> str:
    more = [f"and {len(values) - MOST_VALUES} more"] if len(values) > MOST_VALUES else []
    return ", ".join([*values[:MOST_VALUES], *more])


def unstarted(sweep: Sweep) -> int:
    """Returns how many runs of a sweep's plan have no folder yet."""
    listed = read_sweep_json(sweep.folder).get("runs")
    return max(len(listed) - len(sweep.runs), 0) if isinstance(listed, list) else 0


def failed_before_start(sweep: Sweep) -> list[tuple[str, str]]:
    """Returns the names and errors of planned runs that failed before they wrote a config."""
    listed = read_sweep_json(sweep.folder).get("runs")
    found = []
    for run in listed if isinstance(listed, list) else ():
        name = run.get("folder") if isinstance(run, dict) else None
        folder = sweep.folder / str(name)
        error = folder / "error.json"
        if not error.is_file() or (folder / "config.json").exists():
            continue
        if is_inside(error, sweep.folder) and (failure := find_error(folder)):
            found.append((folder.name, failure.error))
    return found


def read_sweep_json(root: Path) -> dict[str, Any]:
    """Returns the content of a folder's sweep.json; {} without a readable one."""
    file = root / "sweep.json"
    with suppress(DamagedFileError, OSError):
        return read_json_object(file) if is_inside(file, root) else {}
    return {}


def judge(experiment: Experiment, tables: Tables) -> tuple[list[Claim], str]:
    """Returns the experiment's claims, and the reason if they could not be judged, else ""."""
    if experiment.lacks_measurements(tables):
        return [], ""
    try:
        return experiment.claims(tables), ""
    except UserError as error:
        return [], str(error)


def warn_of_unmeasured(experiment: Experiment, tables: Tables, warn: Warn) -> None:
    """Warns of finished runs that the experiment has not measured."""
    ended = tables.runs[tables.runs["finished"] & ~tables.runs["diverged"]]
    missing = ~ended["folder"].isin(tables.measurements["folder"])
    if missing.any():
        default = "; the figures are the default ones" * experiment.lacks_measurements(tables)
        warn(
            f"measurements of {missing.sum()} of {len(ended)} finished runs, which measure() of "
            f"{experiment.file} has not seen; `resjax sweep` with the same options measures them"
            f"{default}"
        )


def advice(file: Path | None, roots: Sequence[Path]) -> str:
    """Returns a hint with the command to type after an experiment's figures failed."""
    original = next(
        (source for root in roots if (source := read_sweep_json(root).get("file"))), file
    )
    folders = shlex.join(map(str, roots))
    return (
        f"the runs are kept, and the report was written without them. Fix {original}, then type: "
        f"resjax report {folders} --experiment={shlex.quote(str(original))}"
    )


def refresh_copies(roots: Sequence[Path], experiment: Path) -> None:
    """Replaces the copies of an experiment in sweep folders by its corrected file."""
    for root in roots:
        copy = root / "experiment.py"
        if copy.is_file() and read_sweep_json(root).get("experiment") == experiment.stem:
            write_atomically(copy, experiment.read_bytes())
