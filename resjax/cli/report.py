"""Writes figures, tables and report.html from run folders.

The figures of a sweep folder are those of the experiment in DIR/experiment.py, which is executed.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from resjax.cli.arguments import existing, experiment_file, path
from resjax.cli.output import notify, print_table


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    folders = (
        "a sweep folder, a run folder, or a folder above; several sweeps have common tables, and "
        "figures of their own"
    )
    add("folders", type=existing, nargs="+", metavar="DIR", help=folders)
    drawn = "the experiment whose figures to draw, of all runs together"
    add("--experiment", type=experiment_file, metavar="FILE", help=drawn)
    out = "the folder to write to (default: DIR, or the folder that holds several)"
    add("--out", type=path, metavar="DIR", help=out)
    add("--bold-best", action="store_true", help="the best of each column in results.tex is bold")


def run(args: Namespace) -> None:
    write_report(args.folders, args.experiment, args.out, args.bold_best)


def write_report(
    folders: Sequence[Path],
    experiment: Path | None = None,
    out: Path | None = None,
    bold_best: bool = False,
) -> None:
    """Writes the report of run folders; prints its summary over seeds and its files."""
    from resjax.analysis import report
    from resjax.analysis.parts import FiguresError
    from resjax.analysis.runs import field_heads, load_runs

    out = report.default_out(folders) if out is None else out
    failure = None
    try:
        report.write_report(
            folders,
            experiment,
            out,
            lambda problem: notify(f"left out: {problem}"),
            announce=lambda file: print(f"experiment: executes {file}", flush=True),
            bold_best=bold_best,
        )
    except FiguresError as error:  # the report is written
        failure = error
    runs = load_runs(*folders, warn=lambda _: None)  # the report has warned
    summary = report.summary_columns(runs)
    header = list(field_heads(list(summary)).values())
    print_table(header, zip(*summary.values(), strict=True))
    print(report.training_metric(runs))
    for sweep, claim in report.read_claims(out):
        of_sweep = f" of {sweep}" if sweep else ""
        print(f"claim{of_sweep}: {claim.verdict}: {claim.statement}: {claim.measured}")
    for figure in sorted((out / "figures").rglob("*.png")):
        print(f"figure: {figure}, .pdf, .svg")
    print(f"tables: {out / 'results.tex'}, results.csv, runs.csv, differences.csv")
    print(f"report: {out / 'report.html'}")
    if failure:
        raise failure
