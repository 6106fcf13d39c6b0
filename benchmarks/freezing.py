"""Freezing: what does a step cost, in time and memory, of which only a part trains?

    python benchmarks/freezing.py measure
    python benchmarks/freezing.py report

`measure` goes through the plan of the device it finds, and writes every result to
benchmarks/results/ as soon as it is there; `report` makes docs/freezing.md of all that lies in
that folder. No run is trained to its end, so this is no experiment for `resjax sweep`.

Contenders, which take turns, all with the same network on the same batches, and BN of what is
frozen in evaluation mode:

- all: every layer trains.
- last stage: the last stage and the head train.
- head: the head alone trains, on the features of a network that stays as it is.
"""

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from feeds import ratio, source
from throughput import DOCS, RESULTS, command_line, machine, provenance, table

from resjax.config import Config, default_config, override, resolve
from resjax.disk import write_atomically
from resjax.train.step import Program


class Case(NamedTuple):
    """A network, and what is measured of it."""

    model: str  # a preset
    side: int  # of its images, in pixels
    batch: int
    dtype: str
    steps: int  # of a round
    rounds: int = 5

    def config(self, trains: str) -> Config:
        cifar = self.model.startswith("cifar")
        last = "stage3" if cifar else "stage4"
        thaw = {"all": {"*": 0}, "last stage": {last: 0, "head": 0}, "head": {"head": 0}}[trains]
        settings = {
            "model.name": self.model,
            "model.dtype": self.dtype,
            "data.name": "synthetic_cifar" if cifar else "synthetic_imagenet",
            "data.image_size": self.side,
            "data.feed": "device",
            "data.batch_size": self.batch,
            "transfer.freeze": "*",
            "transfer.thaw": thaw,
        }
        return resolve(override(default_config(), settings))

    def __str__(self) -> str:
        return f"{self.model} {self.dtype}, {self.batch} images of {self.side} px"


CONTENDERS = ("all", "last stage", "head")
PLANS = {
    "gpu": (
        Case("resnet50", 224, 128, "bfloat16", 20),
        Case("cifar_resnet56", 32, 128, "bfloat16", 100),
    ),
    "cpu": (
        Case("cifar_resnet56", 32, 128, "float32", 1),
        Case("resnet50", 128, 16, "float32", 1, 4),
    ),
}


class Contender:
    """A network of which a part trains, compiled."""

    def __init__(self, case: Case, trains: str):
        self._program = Program(case.config(trains))
        self._state = self._program.init(0)
        self._steps = case.steps
        compiled = self._program.compiled(self._state, case.steps)
        kept = jax.tree.leaves(self._state.optimizer)
        self.described = {
            "trainable": self._program.trainable(0),
            "optimizer_bytes": sum(leaf.nbytes for leaf in kept),
            "peak_bytes": compiled.peak_bytes,
            "compile_seconds": compiled.seconds,
        }

    def seconds(self) -> float:
        """Of a step, the mean of a round."""
        start = time.monotonic()
        self._state, metrics = self._program.steps(self._state, self._steps)
        jax.block_until_ready(metrics)
        return (time.monotonic() - start) / self._steps


def measure(cases: Iterable[Case], path: Path) -> None:
    """Measures one case after the other, and writes `path` anew after each."""
    jax.config.update("jax_enable_compilation_cache", False)  # or compiling takes no time
    result: dict[str, Any] = {"provenance": provenance(), "cases": []}
    for case in cases:
        result["cases"].append(compare(case))
        write_atomically(path, json.dumps(result, indent=1) + "\n")


def compare(case: Case) -> dict[str, Any]:
    """One case's record."""
    print(case, flush=True)
    ready = {trains: Contender(case, trains) for trains in CONTENDERS}
    for contender in ready.values():
        contender.seconds()  # the first dispatch is slower
    seconds: dict[str, list[float]] = {trains: [] for trains in ready}
    for _ in range(case.rounds):
        for trains, contender in ready.items():
            seconds[trains].append(contender.seconds())
    for trains, of_rounds in seconds.items():
        print(f"  {trains:>10}: {np.median(of_rounds):.3f} s a step", flush=True)
    return {
        "case": case._asdict(),
        "contenders": {
            trains: {**contender.described, "seconds": seconds[trains]}
            for trains, contender in ready.items()
        },
    }


PREAMBLE = """\
# What freezing saves

Made by `python benchmarks/freezing.py report` from the files of `benchmarks/results/`; the script
says what is measured and how. Seconds are those of a step, the median and range of rounds in which
the contenders take turns; ratios are medians of the rounds' own. Memory is what XLA counts for the
compiled step, the data set in it; the optimiser is SGD with momentum, which keeps one number a
parameter that trains.

Predicted before anything was measured: a step of the head alone costs a third of a full one,
because the backward pass is two of three; its memory is a small part, because nothing is kept for a
backward pass. With the last stage the ratio lies between, nearer to the head's.
"""
HEADS = (
    *("network", "images", "trains", "parameters that train", "seconds a step", "/ all"),
    *("memory, MiB", "optimiser, MiB", "compile s"),
)


def report(results: Path, docs: Path) -> None:
    """Writes freezing.md to `docs`, from the files in `results`."""
    files = [json.loads(path.read_text()) for path in sorted(results.glob("freezing-*.json"))]
    write_atomically(docs / "freezing.md", "\n".join([PREAMBLE, *map(section, files)]))


def section(file: dict[str, Any]) -> str:
    """A result file as Markdown."""
    rows = [row for record in file["cases"] for row in cells(record)]
    parts = f"## {machine(file['provenance'])}", source(file), table(HEADS, rows)
    return "\n\n".join(parts) + "\n"


def cells(record: dict[str, Any]) -> list[list[str]]:
    """A case's rows below `HEADS`."""
    case, every = Case(**record["case"]), record["contenders"]
    return [
        [
            *(f"{case.model} {case.dtype}", f"{case.batch} x {case.side}²", trains),
            *(f"{found['trainable']:,}", seconds(found["seconds"])),
            ratio(found["seconds"], every["all"]["seconds"]),
            *(mebibytes(found["peak_bytes"]), mebibytes(found["optimizer_bytes"])),
            f"{found['compile_seconds']:.1f}",
        ]
        for trains, found in every.items()
    ]


def seconds(values: list[float]) -> str:
    low, middle, high = np.quantile(values, (0, 0.5, 1))
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.2f}"


def main() -> None:
    parser, measuring = command_line(__doc__)
    measuring.add_argument("--only", default="", help="regular expression of the cases to measure")
    asked = parser.parse_args()
    if asked.command == "report":
        report(RESULTS, DOCS)
        return
    plan = PLANS["cpu" if jax.default_backend() == "cpu" else "gpu"]
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    chosen = [case for case in plan if re.search(asked.only, str(case))]
    measure(chosen, RESULTS / f"freezing-{kind}.json")


if __name__ == "__main__":
    main()
