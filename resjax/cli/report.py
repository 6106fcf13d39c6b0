"""Writes figures, tables and report.html from run folders."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from resjax.cli.arguments import existing
from resjax.cli.output import print_table


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=existing, metavar="DIR", help="a sweep folder or a run folder")
    add("--experiment", type=existing, metavar="FILE", help="the experiment whose figures to draw")


def run(args: Namespace) -> None:
    write_report(args.folder, args.experiment)


def write_report(folder: Path, experiment: Path | None = None) -> None:
    """Writes the report of a sweep folder; prints its summary over seeds and its files."""
    from resjax.analysis import report
    from resjax.analysis.runs import load_runs

    path = report.write_report(folder, experiment)
    summary = report.summary_columns(load_runs(folder))
    header = [name.rpartition(".")[2] for name in summary]
    print_table(header, zip(*summary.values(), strict=True))
    for figure in sorted((path.parent / "figures").glob("*.png")):
        print(f"figure: {figure}, .pdf, .svg")
    print(f"report: {path}")
