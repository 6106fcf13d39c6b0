"""Bookkeeping: how long do plans, claims, status and tables of thousands of runs take?

    python benchmarks/bookkeeping.py measure
    python benchmarks/bookkeeping.py report

`measure` times what resjax does around the training of 1,000 and of 10,000 runs, and writes the
results to benchmarks/results/; `report` writes docs/bookkeeping.md from all results. Nothing is
trained: the runs that are read are made up, with eight lines of metrics each.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from reporting import DOCS, RESULTS, ROOT, command_line, machine, provenance, source, spread, table

from resjax.analysis.runs import load_curves, load_runs
from resjax.config import load, override
from resjax.disk import write_atomically
from resjax.sweeps.attempts import Job, Report
from resjax.sweeps.experiment import Plan, plan
from resjax.sweeps.failures import Retries
from resjax.sweeps.made_up import made_up_runs
from resjax.sweeps.plan_files import read_plan, write_sweep
from resjax.sweeps.queue import RunQueue
from resjax.sweeps.reading import StatusReader
from resjax.train.lock import try_claim
from resjax.train.signals import StopRequest

SWEEP = '''
from resjax.sweeps import param, product


def sweep(runs=1000):
    """Yields four depths and fifty rates, with as many seeds as make up the number of runs."""
    rates = [round(0.01 * 1.1**power, 6) for power in range(50)]
    yield from product(
        param("model.depth", (8, 14, 20, 26)),
        param("optimizer.learning_rate", rates),
        param("seed", range(runs // 200)),
    )
'''

STEPS = {
    "expand": "expand and name the configurations, and write the plan",
    "read plan": "read the plan, as each worker does",
    "claim": "claim, release and end each run",
    "status": "`resjax status`, all runs finished",
    "status again": "the same with `--watch`, again",
    "table": "`load_runs`, the first time",
    "table again": "`load_runs`, from its cache",
    "curves": "`load_curves` of that table",
}
"""The steps in the order in which they are timed, and the text of each row of the table."""

LIMITS = {"expand, claim": 10, "status": 5, "table": 20, "table again": 5}
"""Seconds that 10,000 runs should take at most."""

Timer = Callable[[str, Callable[[], Any]], Any]


def measure(sizes: Iterable[int], rounds: int, path: Path) -> None:
    """Measures each size and rewrites `path` after each."""
    result: dict[str, Any] = {"provenance": provenance("pandas"), "cases": []}
    for size in sizes:
        print(f"{size:,} runs", flush=True)
        seconds: dict[str, list[float]] = {name: [] for name in STEPS}
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(prefix="resjax-") as folder:
                take_round(size, Path(folder), seconds)
        for name, measured in seconds.items():
            print(f"  {name:>12}: {spread(measured, 2)} s", flush=True)
        result["cases"].append({"runs": size, "seconds": seconds})
        write_atomically(path, json.dumps(result, indent=1) + "\n")


def take_round(size: int, folder: Path, seconds: dict[str, list[float]]) -> None:
    """Runs each of `STEPS` once and appends its seconds."""
    experiment = folder / "many.py"
    experiment.write_text(SWEEP)
    config = override(load(ROOT / "configs" / "quickstart.py"), {"sweep.many": {"runs": size}})

    def timed(name: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = action()
        seconds[name].append(time.perf_counter() - start)
        return result

    def expand() -> tuple[Plan, str]:
        planned = plan(experiment, config)
        return planned, write_sweep(planned, folder / "sweep", "benchmark", "1").digest

    planned, digest = timed("expand", expand)
    stored = timed("read plan", lambda: read_plan(folder / "sweep", digest))
    queue = RunQueue(
        stored.runs, None, Retries("1", 0), lambda run: None, StopRequest(), wait=False
    )
    timed("claim", lambda: queue.train(claim))
    with made_up_runs({run.name: run.config for run in planned.runs}) as finished:
        write_sweep(planned, finished, "benchmark", "1")
        measure_tables(finished, timed)


def claim(job: Job, report: Report) -> None:
    """Claims and releases the folder of a run, as a worker does that trains it."""
    held = try_claim(job.folder)
    assert held is not None
    (job.folder / "metrics.jsonl").touch()  # so that it does not remove the folder
    held.release()


def measure_tables(folder: Path, timed: Timer) -> None:
    reader = StatusReader(folder)
    # Files that were written less than two seconds ago are not cached.
    time.sleep(3)
    [sweep] = timed("status", reader.read)
    assert sweep.counts["finished"] == len(sweep.runs)
    timed("status again", reader.read)
    caches = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory(prefix="resjax-") as empty:
        os.environ["XDG_CACHE_HOME"] = empty
        try:
            runs = timed("table", lambda: load_runs(folder))
            assert len(timed("table again", lambda: load_runs(folder))) == len(sweep.runs)
        finally:
            del os.environ["XDG_CACHE_HOME"]
            if caches is not None:
                os.environ["XDG_CACHE_HOME"] = caches
    timed("curves", lambda: load_curves(runs))


PREAMBLE = """\
# Bookkeeping of many runs

Written by `python benchmarks/bookkeeping.py report` from the files in `benchmarks/results/`; the
script documents the measurements. Each number is the median and range of seconds over rounds, in
one process, on a local disk whose files are in memory. Nothing is trained. The last column is the
ratio of the medians: 10 is linear growth. Before it trains, a launch also tries the figures of the
experiment on made-up runs. That time, which depends on the experiment, is not in the table.
"""


def report(results: Path, docs: Path) -> None:
    """Writes bookkeeping.md to `docs` from the files in `results`."""
    files = [json.loads(path.read_text()) for path in sorted(results.glob("bookkeeping-*.json"))]
    sections = [*map(section, files)] or ["It has not been measured on a quiet machine yet.\n"]
    write_atomically(docs / "bookkeeping.md", "\n".join([PREAMBLE, *sections]))


def section(file: dict[str, Any]) -> str:
    """Returns a result file as Markdown."""
    cases = file["cases"]
    heads = ["seconds", *(f"{case['runs']:,} runs" for case in cases), "growth"]
    rows = [
        [text, *(spread(case["seconds"][name], 2) for case in cases), growth(cases, name)]
        for name, text in STEPS.items()
    ]
    paragraphs = [
        f"## {machine(file['provenance'])}",
        source(file["provenance"]),
        table(heads, rows),
        *limits(cases[-1]),
    ]
    return "\n\n".join(paragraphs) + "\n"


def growth(cases: list[dict[str, Any]], name: str) -> str:
    """Returns the ratio of the median times of the last and the first case."""
    first, last = (middle(case["seconds"][name]) for case in (cases[0], cases[-1]))
    return f"{last / first:.1f}"


def limits(case: dict[str, Any]) -> list[str]:
    """Returns a sentence about the limits, if they are those of this number of runs."""
    if case["runs"] != 10_000:
        return []
    texts = []
    for names, limit in LIMITS.items():
        seconds = sum(middle(case["seconds"][name]) for name in names.split(", "))
        texts.append(f"{names.replace(', ', ' and ')} {seconds:.1f} s (limit {limit} s)")
    return [f"Limits for 10,000 runs: {'; '.join(texts)}."]


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser, measuring = command_line(__doc__)
    measuring.add_argument("--rounds", type=int, default=3)
    measuring.add_argument("--runs", type=int, nargs="+", default=[1000, 10_000])
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure(arguments.runs, arguments.rounds, RESULTS / "bookkeeping-cpu.json")
    report(RESULTS, DOCS)


if __name__ == "__main__":
    main()
