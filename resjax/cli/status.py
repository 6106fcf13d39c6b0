"""Shows the state of every run of a sweep: how far it is, where, and why it failed.

It reads run folders only, so it works during a launch, after it, and on any machine that shares
the folder.
"""

import json
import math
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from resjax.cli.arguments import existing
from resjax.text import printable

if TYPE_CHECKING:
    from resjax.sweeps.reading import StatusReader, SweepStatus
    from resjax.sweeps.status import RunStatus

WATCH_SECONDS = 2.0
"""Between two looks of --watch; a lock has to be seen at least once per beat."""

FORMAT = 1
"""The version of the JSON format, which changes if an entry is removed or gets another meaning."""

MOST_LINES = 60
"""Longer lists leave out queued and finished runs."""


class Shown(NamedTuple):
    """The runs that are listed, and a line about the others."""

    runs: "list[RunStatus]"
    left_out: str


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    above = "a sweep, a run, or a folder above several"
    add("folder", type=existing, metavar="DIR", help=above)
    add("--watch", action="store_true", help="show it anew every two seconds")
    add("--json", action="store_true", help="print JSON; with --watch, a line per change")


def run(args: Namespace) -> int:
    from resjax.sweeps.reading import StatusReader

    reader = StatusReader(args.folder)
    if not args.watch:
        sweeps = reader.read()
        print(json.dumps(_content(sweeps), indent=2) if args.json else _text(sweeps, MOST_LINES))
        return 0
    with suppress(KeyboardInterrupt):
        if args.json or not sys.stdout.isatty():
            _print_changes(reader, args.json)
        else:
            _redraw(reader)
        return 0
    return 130


def _looks(reader: "StatusReader") -> "Iterator[list[SweepStatus]]":
    """Yields the sweeps every two seconds until all of their runs have ended."""
    while True:
        start = time.monotonic()
        sweeps = reader.read()
        yield sweeps
        if all(sweep.ended for sweep in sweeps):
            return
        # Looking at many runs on a slow disk may take longer than that.
        time.sleep(max(WATCH_SECONDS, 2 * (time.monotonic() - start)))


def _print_changes(reader: "StatusReader", as_json: bool) -> None:
    """Prints a line whenever something has changed: JSON, or how many runs are in each state."""
    last = ""
    for sweeps in _looks(reader):
        if as_json:
            content = _content(sweeps)
            line, key = json.dumps(content), json.dumps(content["sweeps"])
        else:
            line = key = "\n".join(map(_headline, sweeps))
        if key != last:
            print(line, flush=True)
        last = key


def _redraw(reader: "StatusReader") -> None:
    """Shows as many rows as the terminal has room for, until all runs have ended."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        for sweeps in _looks(reader):
            lines = max(console.height - 2, 5)
            live.update(Text(_text(sweeps, lines, console.width)), refresh=True)


def _text(sweeps: "list[SweepStatus]", most_lines: int, width: int | None = None) -> str:
    """Returns headlines and rows of sweeps, in at most about as many lines."""
    each = max(most_lines // len(sweeps) - 2, 1)
    return "\n".join(line for sweep in sweeps for line in _lines(sweep, each, width))


def _lines(sweep: "SweepStatus", most: int, width: int | None) -> Iterator[str]:
    yield _headline(sweep)
    runs, left_out = _shown(sweep, most)
    rows = [run.cells for run in runs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (printable(cell).ljust(size) for cell, size in zip(row, widths, strict=True))
        line = "  ".join(cell for cell, size in zip(cells, widths, strict=True) if size).rstrip()
        yield f"  {line}"[: width or None]
    if left_out:
        yield f"  {left_out}"


def _shown(sweep: "SweepStatus", most: int) -> Shown:
    """Returns all runs, or, if they are too many, those neither queued nor finished."""
    if len(sweep.runs) <= most:
        return Shown(sweep.runs, "")
    from resjax.sweeps.status import State

    plain = State.QUEUED, State.FINISHED
    runs = [run for run in sweep.runs if run.state not in plain][:most]
    counts = sweep.counts
    for run in runs:
        counts[run.state] -= 1
    others = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
    return Shown(runs, f"and {others}; --json lists all" if runs else "")


def _headline(sweep: "SweepStatus") -> str:
    """Returns, for example, `runs/demo: 18 runs: 3 queued, 2 running, 13 finished; ...`."""
    from resjax.sweeps.status import duration

    counts = ", ".join(f"{count:,} {state}" for state, count in sweep.counts.items() if count)
    number = f"{len(sweep.runs):,} run{'s' * (len(sweep.runs) != 1)}"
    text = f"{printable(str(sweep.folder))}: {number}: {counts or 'none'}"
    left, working = sweep.seconds_left, sweep.working
    if left and working:
        text += f"; about {duration(left)} left with {working} worker{'s' * (working > 1)}"
    elif left:
        text += f"; about {duration(left)} of work left for one worker, and none works on it"
    if sweep.other_runs:
        text += f"; {sweep.other_runs:,} other run folders are of earlier launches"
    return text


def _content(sweeps: "list[SweepStatus]") -> dict[str, Any]:
    """Returns what --json prints; docs/status.md describes it."""
    return {
        "format": FORMAT,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "sweeps": [
            {
                "folder": str(sweep.folder),
                "experiment": sweep.experiment,
                "launch": sweep.launch,
                "counts": sweep.counts,
                "workers": sweep.working,
                "seconds_left": _finite(sweep.seconds_left),
                "other_runs": sweep.other_runs,
                "runs": [_run_content(run) for run in sweep.runs],
            }
            for sweep in sweeps
        ],
    }


def _run_content(run: "RunStatus") -> dict[str, Any]:
    progress, holder = run.progress, run.holder or {}
    return {
        "folder": str(run.folder),
        "state": str(run.state),
        "step": progress.step if progress else None,
        "steps": progress.steps if progress else run.steps,
        "images_per_second": _finite(progress.images_per_second) if progress else None,
        "seconds_left": _finite(run.seconds_left),
        **{name: holder.get(name) for name in ("host", "process", "job", "since")},
        "alive": (run.alive or None) if run.holder is not None else False,
        "beat_seconds": _finite(run.beat_seconds),
        "error": run.error or None,
        "attempts": run.attempts,
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 1)
