"""Writes figures, tables and report.html from run folders.

The figures of a sweep folder are those of the experiment in DIR/experiment.py, which is executed.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from resjax.cli.arguments import existing, path
from resjax.cli.output import notify, print_table


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    folders = "a sweep folder, a run folder, or a folder above; of several, all runs together"
    add("folders", type=existing, nargs="+", metavar="DIR", help=folders)
    add("--experiment", type=existing, metavar="FILE", help="the experiment whose figures to draw")
    out = "the folder to write to (default: DIR, or the folder that holds several)"
    add("--out", type=path, metavar="DIR", help=out)


def run(args: Namespace) -> None:
    write_report(args.folders, args.experiment, args.out)


def write_report(
    folders: Sequence[Path], experiment: Path | None = None, out: Path | None = None
) -> None:
    """Writes the report of run folders; prints its summary over seeds and its files."""
    from resjax.analysis import report
    from resjax.analysis.runs import load_runs

    if file := experiment or report.find_experiment(folders):
        print(f"experiment: executes {file}", flush=True)
    out = report.default_out(folders) if out is None else out
    failure = None
    try:
        report.write_report(
            folders, experiment, out, lambda problem: notify(f"left out: {problem}")
        )
    except report.FiguresError as error:  # the report is written
        failure = error
    runs = load_runs(*folders, warn=lambda _: None)  # the report has warned
    summary = report.summary_columns(runs)
    header = [name.rpartition(".")[2] for name in summary]
    print_table(header, zip(*summary.values(), strict=True))
    print(report.training_metric(runs))
    for claim in report.read_claims(out):
        print(f"claim: {claim.verdict}: {claim.statement}: {claim.measured}")
    for figure in sorted((out / "figures").glob("*.png")):
        print(f"figure: {figure}, .pdf, .svg")
    print(f"report: {out / 'report.html'}")
    if failure:
        raise failure
