"""Freezing: what do time and memory of a step cost when only a part of the network trains?

    python benchmarks/freezing.py measure
    python benchmarks/freezing.py report

`measure` runs the plan of the current device and writes each result to benchmarks/results/ at once;
`report` writes docs/freezing.md from all results. The contenders take turns and train the same
network on the same batches, with BN of frozen layers in evaluation mode:

- all: all layers train.
- last stage: the last stage and the head train.
- head: only the head trains, on the features of a frozen network.
"""

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
from reporting import (
    DOCS,
    RESULTS,
    command_line,
    machine,
    provenance,
    ratio,
    results_file,
    source,
    spread,
    table,
)

from resjax.config import Config, default_config, override, resolve
from resjax.disk import write_atomically
from resjax.train.trainer import Dispatch, StepRunner, Trainer


class Case(NamedTuple):
    """A network and the amount of measurement."""

    model: str  # a preset
    side: int  # of the images, in pixels
    batch: int
    dtype: str
    steps: int  # per round
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
    """The compiled training of a part of a network."""

    def __init__(self, case: Case, trains: str):
        trainer = Trainer(case.config(trains))
        self._state = trainer.init(0)
        self._runner = StepRunner(trainer, seed=0, first_step=0)
        self._dispatch = Dispatch(phase=0, steps=case.steps)
        executable = trainer.compile_dispatch(self._state, self._dispatch)
        opt_state = jax.tree.leaves(self._state.opt_state)
        self.cost = {
            "trainable": trainer.trainable_parameters(phase=0),
            "optimizer_bytes": sum(leaf.nbytes for leaf in opt_state),
            "peak_bytes": executable.peak_bytes,
            "compile_seconds": executable.compile_seconds,
        }

    def seconds(self) -> float:
        """Returns the mean seconds per step of one round."""
        start = time.monotonic()
        self._state, metrics = self._runner.run(self._state, self._dispatch)
        jax.block_until_ready(metrics)
        return (time.monotonic() - start) / self._dispatch.steps


def measure(cases: Iterable[Case], path: Path) -> None:
    """Measures each case and rewrites `path` after each."""
    jax.config.update("jax_enable_compilation_cache", False)  # so that compilation takes its time
    result: dict[str, Any] = {"provenance": provenance(), "cases": []}
    for case in cases:
        result["cases"].append(compare(case))
        write_atomically(path, json.dumps(result, indent=1) + "\n")


def compare(case: Case) -> dict[str, Any]:
    """Measures all contenders of a case in turns."""
    print(case, flush=True)
    ready = {trains: Contender(case, trains) for trains in CONTENDERS}
    for contender in ready.values():
        contender.seconds()  # the first dispatch is slower
    seconds: dict[str, list[float]] = {trains: [] for trains in ready}
    for _ in range(case.rounds):
        for trains, contender in ready.items():
            seconds[trains].append(contender.seconds())
    for trains, measured in seconds.items():
        print(f"  {trains:>10}: {median(measured):.3f} s per step", flush=True)
    return {
        "case": case._asdict(),
        "contenders": {
            trains: {**contender.cost, "seconds": seconds[trains]}
            for trains, contender in ready.items()
        },
    }


PREAMBLE = """\
# The cost of a partly frozen step

Written by `python benchmarks/freezing.py report` from the files in `benchmarks/results/`; the
script documents the measurements. Seconds are per step: the median and range over rounds in which
the contenders take turns. Ratios are medians of the ratios within rounds. Memory is XLA's count for
the compiled step, including the dataset. The optimizer is SGD with momentum, which has one number
per trainable parameter.

Predicted before anything was measured: a step that trains only the head costs a third of a full
step, because the backward pass is two thirds of a step; its memory is a small fraction, because no
activations are stored for a backward pass. With the last stage the ratio is in between, closer to
that of the head.
"""
HEADS = (
    *("network", "images", "trains", "trainable parameters", "seconds per step", "/ all"),
    *("memory, MiB", "optimizer, MiB", "compile s"),
)


def report(results: Path, docs: Path) -> None:
    """Writes freezing.md to `docs` from the files in `results`."""
    files = [json.loads(path.read_text()) for path in sorted(results.glob("freezing-*.json"))]
    write_atomically(docs / "freezing.md", "\n".join([PREAMBLE, *map(section, files)]))


def section(file: dict[str, Any]) -> str:
    """Returns a result file as Markdown."""
    rows = [row for record in file["cases"] for row in cells(record)]
    parts = f"## {machine(file['provenance'])}", source(file["provenance"]), table(HEADS, rows)
    return "\n\n".join(parts) + "\n"


def cells(record: dict[str, Any]) -> list[list[str]]:
    """Returns the rows of a case below `HEADS`."""
    case, contenders = Case(**record["case"]), record["contenders"]
    return [
        [
            *(f"{case.model} {case.dtype}", f"{case.batch} x {case.side}²", trains),
            *(f"{found['trainable']:,}", spread(found["seconds"], digits=3)),
            ratio(found["seconds"], contenders["all"]["seconds"]),
            *(mebibytes(found["peak_bytes"]), mebibytes(found["optimizer_bytes"])),
            f"{found['compile_seconds']:.1f}",
        ]
        for trains, found in contenders.items()
    ]


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.2f}"


def main() -> None:
    parser, measuring = command_line(__doc__)
    measuring.add_argument("--only", default="", help="regular expression that selects cases")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report(RESULTS, DOCS)
        return
    plan = PLANS["cpu" if jax.default_backend() == "cpu" else "gpu"]
    chosen = [case for case in plan if re.search(arguments.only, str(case))]
    measure(chosen, results_file("freezing"))


if __name__ == "__main__":
    main()
