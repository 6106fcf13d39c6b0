"""Writes docs/claims.md: every claim of the experiments beside what the committed runs measured.

    python -m resjax.analysis.claims_page RESULTS EXPERIMENTS PAGE

RESULTS is a folder of sweep folders, whose sweep.json names the experiment; EXPERIMENTS is the
folder of the experiment files. An experiment that is not in it, such as that of the tutorial, is
experiment.py in its sweep folder. The files are executed, so that the page follows from runs and
code alone and a test can say whether it is up to date.
"""

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from resjax.analysis.claims import EXPLANATION, Claim, tally
from resjax.analysis.experiment_figures import experiment_of, load_experiment, load_tables
from resjax.analysis.runs import load_runs
from resjax.disk import write_atomically
from resjax.errors import UserError
from resjax.run_files import planned_experiment

HEADER = """# Claims

This page states what papers claim about residual networks, what they publish, and what the runs in
`experiments/results/` measured. `make claims` writes this page from those runs, and a test checks
that it is up to date; it is not edited by hand.

{explanation}

A verdict holds for the data and the recipe of its row. The networks here are narrow and were
trained for minutes, so a row that disagrees does not refute a paper, and one that agrees does not
confirm it on ImageNet.

{tally}
"""


class Judged(NamedTuple):
    """The claims of one experiment on the runs of one sweep folder."""

    file: Path
    title: str
    recipe: str
    claims: list[Claim]


def judge_results(results: Path, experiments: Path) -> list[Judged]:
    """Judges the claims of all sweep folders below `results`, ordered by experiment and folder.

    Raises:
      UserError: there is no sweep folder, an experiment file is missing or fails, or a run is
        damaged.
    """
    judged = []
    plans = sorted(results.rglob("sweep.json"), key=lambda plan: (planned_experiment(plan), plan))
    if not plans:
        raise UserError(f"{results}: no sweep folder here")
    for plan in plans:
        experiment = load_experiment(experiment_of(plan.parent, experiments))
        if experiment.judge is None:
            continue
        runs = load_runs(plan.parent)
        claims = experiment.claims(load_tables(runs, experiment.file))
        judged.append(Judged(experiment.file, experiment.title, recipe(runs), claims))
    return judged


def recipe(runs: pd.DataFrame) -> str:
    """Returns the data and the recipe of runs: "digits, width 8, 300 steps of 64 images"."""

    def values(column: str) -> str:
        found = sorted(runs[column].dropna().unique()) if column in runs else []
        texts = [f"{x:,.0f}" if isinstance(x, float) else str(x) for x in found]
        return f"{texts[0]} to {texts[-1]}" if len(texts) > 2 else " and ".join(texts)

    parts = [values("data.name"), f"width {values('model.width')}"]
    return ", ".join(
        [*parts, f"{values('train.steps')} steps of {values('data.batch_size')} images"]
    )


def claims_page(results: Path, experiments: Path) -> str:
    """Returns the page as Markdown; see `judge_results`."""
    judged = judge_results(results, experiments)
    everything = [claim for each in judged for claim in each.claims]
    parts = [
        HEADER.format(explanation=textwrap.fill(EXPLANATION, 100), tally=f"{tally(everything)}.")
    ]
    for file in dict.fromkeys(each.file for each in judged):
        of_experiment = [each for each in judged if each.file == file]
        name = file.relative_to(experiments.parent).as_posix()
        parts.append(f"## {of_experiment[0].title}\n\n`{name}`\n")
        parts.append(_table(of_experiment))
    return "\n".join(parts)


def _table(judged: Sequence[Judged]) -> str:
    """Returns the claims as a table; a claim that several data sets test has adjacent rows."""
    header = ("claim", "source", "published", "measured", "data and recipe", "verdict")
    rows: dict[tuple[int, str, int], tuple[str, ...]] = {}
    for each in judged:
        for rank, claim in enumerate(each.claims):
            rows[rank, claim.statement, len(rows)] = (
                *(claim.statement, claim.source, claim.published, claim.measured),
                *(each.recipe, f"**{claim.verdict}**"),
            )
    lines = [header, ("---",) * len(header), *(rows[key] for key in sorted(rows))]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|") or "–"


def main(results: str, experiments: str, page: str) -> None:
    """Writes the page."""
    write_atomically(Path(page), claims_page(Path(results), Path(experiments)))
    print(f"wrote {page}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"claims: {error}")
