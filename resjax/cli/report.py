"""Writes figures, tables and report.html from run folders."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from resjax.cli.arguments import existing
from resjax.cli.output import print_table
from resjax.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from resjax.run_files import Metric


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=existing, metavar="DIR", help="a sweep folder or a run folder")
    add("--experiment", type=existing, metavar="FILE", help="the experiment whose figures to draw")


def run(args: Namespace) -> None:
    write_report(args.folder, args.experiment)


def write_report(folder: Path, experiment: Path | None = None) -> None:
    """Writes the report of a sweep folder and prints its summary and files."""
    from resjax.analysis import report
    from resjax.analysis.runs import load_curves, load_layers, load_runs, primary_metrics, summarize

    # Reading comes before drawing: missing or damaged files are the user's, the rest is our fault.
    try:
        runs = load_runs(folder)
        load_curves(runs)
        load_layers(runs)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    path = report.write_report(folder, experiment)
    _print_summary(summarize(runs), primary_metrics(runs))
    for figure in sorted((path.parent / "figures").glob("*.png")):
        print(f"figure: {figure}, .pdf, .svg")
    print(f"report: {path}")


def _print_summary(summary: "pd.DataFrame", metrics: "Iterable[Metric]") -> None:
    """Prints means and sample standard deviations over seeds."""
    groups = [name for name in summary if "." in str(name)]
    columns = [(split, metric) for metric in metrics for split in ("train", "test")]
    header = [
        *(str(name).rpartition(".")[2] for name in groups),
        "seeds",
        *(f"{split} {metric.label}" for split, metric in columns),
    ]
    rows = [
        (
            *(str(row[name]) for name in groups),
            str(row["seeds"]),
            *(
                metric.format(*(row[f"{split}_{metric.name}_{kind}"] for kind in ("mean", "std")))
                for split, metric in columns
            ),
        )
        for row in summary.to_dict("records")
    ]
    print_table(header, rows)
