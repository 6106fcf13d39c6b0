"""Loads experiment files: their title, their claim and their `figures`.

The file is the user's, so an error in it becomes one line that names the file and the line.
"""

import runpy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis.runs import load_curves, load_runs
from resjax.errors import UserError, error_in

LONGEST_NAME = 100  # of a figure, whose name becomes a file's


class Experiment(NamedTuple):
    """An experiment file."""

    file: Path
    title: str
    claim: str
    draw: Callable[[pd.DataFrame, pd.DataFrame], Mapping[str, Figure]] | None

    def figures(self, runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
        """Returns the figures by name; {} if the experiment draws none of its own.

        Raises:
          UserError: the experiment's `figures` raises, or returns something else.
        """
        if self.draw is None:
            return {}
        with _errors_in(self.file):
            drawn = self.draw(runs, curves)
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

    def try_figures(self, folder: Path) -> None:
        """Draws the figures of the runs in a folder and discards them.

        Raises:
          UserError: `figures` raises or returns something else, or a figure cannot be drawn.
        """
        runs = load_runs(folder)
        for figure in self.figures(runs, load_curves(runs)).values():
            with _errors_in(self.file):
                figure.draw_without_rendering()


def load_experiment(file: Path) -> Experiment:
    """Executes an experiment file, as a script that leaves no module and no bytecode behind.

    Raises:
      UserError: there is no such file, or it raises.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such experiment file")
    with _errors_in(file):
        names = runpy.run_path(str(file), run_name="experiment")
    title, _, claim = (names.get("__doc__") or file.stem).strip().partition("\n")
    return Experiment(file, title.rstrip("."), claim, names.get("figures"))


@contextmanager
def _errors_in(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UserError(error_in(file, error)) from error
