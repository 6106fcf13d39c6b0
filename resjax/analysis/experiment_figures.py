"""Loads experiment files, draws their figures of runs and judges their claims.

The file is the user's, so an error in it becomes one line that names the file and the line.
"""

import inspect
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis.claims import Claim
from resjax.analysis.runs import (
    NotMeasuredError,
    Warn,
    load_curves,
    load_layers,
    load_measurements,
)
from resjax.errors import UserError, error_in
from resjax.run_files import experiment_name, planned_experiment

LONGEST_NAME = 100  # of a figure, whose name becomes a file's


class Tables(NamedTuple):
    """The tables that `figures` and `claims` can request by the names of their parameters."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    layers: pd.DataFrame
    measurements: pd.DataFrame


def load_tables(runs: pd.DataFrame, experiment: Path | None, warn: Warn | None = None) -> Tables:
    """Loads the tables of runs; `measurements` has the rows of the experiment's `measure`."""
    name = "" if experiment is None else experiment_name(experiment)
    try:
        measurements = load_measurements(runs, name, warn)
    except NotMeasuredError:  # the runs of another experiment
        measurements = pd.DataFrame(columns=["folder"])
    return Tables(runs, load_curves(runs, warn), load_layers(runs, warn), measurements)


class Experiment(NamedTuple):
    """An experiment file and its functions, each None if the file has none.

    `draw` is its `figures`, `judge` its `claims`.
    """

    file: Path
    title: str
    claim: str
    draw: Callable[..., Any] | None = None
    judge: Callable[..., Any] | None = None
    measure: Callable[..., Any] | None = None

    def lacks_measurements(self, tables: Tables) -> bool:
        """Returns whether no run is measured although `figures` or `claims` takes measurements."""
        functions = filter(None, (self.draw, self.judge))
        takes = any("measurements" in inspect.signature(each).parameters for each in functions)
        return takes and tables.measurements.empty

    def figures(self, tables: Tables) -> dict[str, Figure]:
        """Returns the figures by name; {} if the experiment draws none of its own.

        Raises:
          UserError: the experiment's `figures` raises, or returns something else.
        """
        if self.draw is None:
            return {}
        with _errors_in(self.file):
            drawn = _call("figures", self.draw, tables)
            if not isinstance(drawn, Mapping):
                kind = type(drawn).__name__
                raise UserError(f"figures() returned {kind}; return a dict of figures by name")
            for name, figure in drawn.items():
                if not isinstance(figure, Figure):
                    kind = type(figure).__name__
                    raise UserError(f"figures()[{name!r}] is a {kind}, not a Matplotlib figure")
                if not (isinstance(name, str) and name.replace("-", "_").isidentifier()):
                    raise UserError(f"figures(): {name!r} cannot be the name of a file")
                if len(name) > LONGEST_NAME:
                    raise UserError(f"figures(): the name {name[:20]!r}... is too long for a file")
        return dict(drawn)

    def claims(self, tables: Tables) -> list[Claim]:
        """Returns the experiment's claims with their verdicts; [] if it makes none.

        Raises:
          UserError: the experiment's `claims` raises, or returns something else.
        """
        if self.judge is None:
            return []
        with _errors_in(self.file):
            judged = _call("claims", self.judge, tables)
            is_list = isinstance(judged, Sequence) and not isinstance(judged, Claim)
            if not (is_list and all(isinstance(each, Claim) for each in judged)):
                raise UserError("claims() must return a list of resjax.analysis.claims.Claim")
        return list(judged)

    def try_on(self, tables: Tables) -> tuple[dict[str, Figure], list[Claim]]:
        """Draws the figures of runs and judges the claims; returns both.

        Raises:
          UserError: `figures` or `claims` raises or returns something else, or a figure cannot be
            drawn.
        """
        figures = self.figures(tables)
        for figure in figures.values():
            with _errors_in(self.file):
                figure.draw_without_rendering()
        return figures, self.claims(tables)


def _call(name: str, function: Callable[..., Any], tables: Tables) -> Any:
    """Calls an experiment's function with the tables that its parameters name."""
    parameters = inspect.signature(function).parameters.values()
    if not any(each.name in Tables._fields for each in parameters):
        return function(tables.runs, tables.curves)  # by position, as in earlier versions
    given: dict[str, pd.DataFrame] = {}
    for parameter in parameters:
        if parameter.name in Tables._fields:
            given[parameter.name] = getattr(tables, parameter.name)
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            known = ", ".join(Tables._fields)
            raise UserError(f"{name}() has the parameter {parameter.name!r}; it may take {known}")
    return function(**given)


def experiment_of(sweep: Path, experiments: Path) -> Path:
    """Returns the experiment file of a sweep folder: that in `experiments`, or else its copy."""
    file = experiments / f"{planned_experiment(sweep / 'sweep.json')}.py"
    copy = sweep / "experiment.py"
    return copy if copy.exists() and not file.exists() else file


def load_experiment(file: Path) -> Experiment:
    """Executes an experiment file, as a script that leaves no module and no bytecode behind.

    Raises:
      UserError: there is no such file, or it raises.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such experiment file")
    with _errors_in(file):
        names = runpy.run_path(str(file), run_name="experiment")
    title, _, claim = (names.get("__doc__") or experiment_name(file)).strip().partition("\n")
    functions = map(names.get, ("figures", "claims", "measure"))
    return Experiment(file, title.rstrip("."), claim, *functions)


@contextmanager
def _errors_in(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UserError(error_in(file, error)) from error
