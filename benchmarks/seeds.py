"""Seeds: small networks leave a device idle; what trains several seeds of one config fastest on it?

    python benchmarks/seeds.py measure --minutes 10
    python benchmarks/seeds.py report

`measure` goes through the plan of the device it finds, and writes every result to
benchmarks/results/ as soon as it is there; `report` makes docs/seeds.md of all that lies in that
folder. No run is trained to its end, so this is no experiment for `resjax sweep`.

Contenders, which take turns, all with the same networks on the same batches:

- in turn: one process on the whole machine trains one seed after the other, as
  `resjax sweep --workers=1` does.
- vmapped: the states of all seeds are stacked, and `jax.vmap` of the step trains them in one
  dispatch. Kernels that have a batch dimension become grouped convolutions.
- processes: a process a seed, each on its share of the machine, as `resjax sweep --workers=K` has.

Everything runs on one device; where there are more, let one of them be seen.
"""

import json
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from feeds import ratio, source, spread
from throughput import DOCS, HERE, RESULTS, command_line, machine, provenance, table

from resjax.config import Config, load, override, resolve
from resjax.disk import write_atomically
from resjax.sweeps.workers import Resources, default_workers, divide_machine
from resjax.train.step import Program, State, compiled
from resjax.train.step import program as program_of

CONFIGS = HERE.parent / "configs"


class Case(NamedTuple):
    """A network, and how many of it are trained."""

    file: str  # the config's, in configs/
    depth: int
    dtype: str
    seeds: int
    steps: int  # of a dispatch
    dispatches: int  # of each seed in a round
    rounds: int = 5

    @property
    def config(self) -> Config:
        settings = {"model.depth": self.depth, "model.dtype": self.dtype}
        if self.file == "cifar10":
            settings["data.name"] = "synthetic_cifar"  # as fast, and always there
        return resolve(override(load(CONFIGS / f"{self.file}.py"), settings))

    @property
    def images(self) -> int:
        """That all seeds together take in a round."""
        return self.seeds * self.dispatches * self.steps * self.config.data.batch_size

    def __str__(self) -> str:
        return f"{self.file} depth {self.depth} {self.dtype}, {self.seeds} seeds"


PLANS = {
    "gpu": [
        Case(file, depth, dtype, seeds, 100, 3)
        for file, depth, dtype in (
            ("cifar10", 20, "bfloat16"),
            ("quickstart", 20, "float32"),
            ("cifar10", 20, "float32"),
        )
        for seeds in (2, 4, 8)
    ],
    "cpu": [
        Case("quickstart", 8, "float32", 2, 25, 4),
        Case("quickstart", 20, "float32", 2, 25, 2),
        Case("quickstart", 56, "float32", 2, 25, 1),
        Case("cifar10", 20, "float32", 2, 2, 1),
    ],
}


class Contender(NamedTuple):
    """A way to train all seeds of a case, compiled."""

    train: Callable[[], list[float]]  # a round; gives every seed's loss in its last dispatch
    compile_seconds: float


def take(call: Any, state: State, program: Program, case: Case) -> tuple[State, np.ndarray]:
    """One round of what `call` trains: the new state, and its loss, for which the host waits."""
    for _ in range(case.dispatches):
        state, metrics = call(state, program.train_split)
    return state, np.asarray(metrics["loss"])


@contextmanager
def in_turn(case: Case) -> Iterator[Contender]:
    program = program_of(case.config)
    states = [program.init(seed) for seed in range(case.seeds)]
    step = program.compiled(states[0], case.steps)

    def train() -> list[float]:
        losses = []
        for seed, state in enumerate(states):
            states[seed], loss = take(step.call, state, program, case)
            losses.append(float(loss))
        return losses

    yield Contender(train, step.seconds)


@contextmanager
def vmapped(case: Case) -> Iterator[Contender]:
    program = program_of(case.config)
    state = jax.tree.map(lambda *of: jnp.stack(of), *map(program.init, range(case.seeds)))
    steps = jax.vmap(partial(program.take_steps, steps=case.steps), in_axes=(0, None))
    step = compiled(jax.jit(steps, donate_argnums=0), state, program.train_split)

    def train() -> list[float]:
        nonlocal state
        state, losses = take(step.call, state, program, case)
        return losses.tolist()

    yield Contender(train, step.seconds)


@contextmanager
def processes(case: Case) -> Iterator[Contender]:
    context = multiprocessing.get_context("spawn")
    with ExitStack() as ending:
        links: list[Connection] = []
        for seed, resources in enumerate(divide_machine(case.seeds)):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(case, seed, resources, theirs), daemon=True
            )
            process.start()
            theirs.close()  # or the end of the process would not be seen
            ending.callback(process.join)
            links.append(ending.enter_context(ours))  # closed first, which ends the process
        compile_seconds = max(link.recv() for link in links)

        def train() -> list[float]:
            for link in links:
                link.send("go")
            return [link.recv() for link in links]

        yield Contender(train, compile_seconds)


def serve(case: Case, seed: int, resources: Resources, link: Connection) -> None:
    """A process of `processes`: seconds to compile go out, then a loss for every word come in."""
    resources.claim()
    jax.config.update("jax_enable_compilation_cache", False)
    program = Program(case.config)
    state = program.init(seed)
    step = program.compiled(state, case.steps)
    with suppress(EOFError):  # of the contender's end
        link.send(step.seconds)
        while link.recv():
            state, loss = take(step.call, state, program, case)
            link.send(float(loss))


CONTENDERS: dict[str, Callable[[Case], AbstractContextManager[Contender]]] = {
    "in turn": in_turn,
    "vmapped": vmapped,
    "processes": processes,
}


def measure(cases: Iterable[Case], path: Path, minutes: float) -> None:
    """Measures one case after the other, and writes `path` anew after each."""
    deadline = time.monotonic() + 60 * minutes
    jax.config.update("jax_enable_compilation_cache", False)  # or compiling takes no time
    result: dict[str, Any] = {
        "provenance": provenance(),
        "default_workers": default_workers(),
        "cases": [],
    }
    for case in cases:
        if time.monotonic() > deadline:
            print(f"{case}: left out, {minutes:g} minutes are over")
            continue
        result["cases"].append(compare(case))
        write_atomically(path, json.dumps(result, indent=1) + "\n")


def compare(case: Case) -> dict[str, Any]:
    """One case's record."""
    print(case, flush=True)
    failed: dict[str, str] = {}
    with ExitStack() as ending:
        ready: dict[str, Contender] = {}
        for name, prepare in CONTENDERS.items():
            try:
                ready[name] = ending.enter_context(prepare(case))
                ready[name].train()  # the first dispatch is slower
            except (EOFError, RuntimeError) as error:  # a process is lost; too large for the device
                ready.pop(name, None)
                failed[name] = f"{type(error).__name__} {error}".partition("\n")[0].strip()
                print(f"  {name:>9}: left out, {failed[name]}", flush=True)
        rates: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(case.rounds):
            for name, contender in ready.items():
                start = time.monotonic()
                contender.train()
                rates[name].append(case.images / (time.monotonic() - start))
    for name, of_rounds in rates.items():
        print(f"  {name:>9}: {median(of_rounds):,.0f} images/s", flush=True)
    return {
        "case": case._asdict(),
        "batch": case.config.data.batch_size,
        "compile_seconds": {name: contender.compile_seconds for name, contender in ready.items()},
        "images_per_second": rates,
        "failed": failed,
    }


PREAMBLE = """\
# Several seeds at once

Made by `python benchmarks/seeds.py report` from the files of `benchmarks/results/`; the script
says what is measured and how. Speeds are images a second of all seeds together, the median and
range of rounds in which the contenders take turns; ratios are medians of the rounds' own. Compile
times are those of training alone; processes compile at the same time, and the slowest counts.

Predicted before anything was measured:

- **CPU**: processes win, by 1.2 to 1.8 and the more the narrower the network, for threads that
  share a small convolution mostly wait for each other. vmapped loses: XLA's fast code for CPUs
  knows no groups.
- **GPU**: vmapped gains most at 8 seeds of the quickstart's network, whose kernels are over before
  the next is launched, and little on CIFAR's, since cuDNN's grouped convolutions are slow.
  Processes gain 1.5 at most: without NVIDIA's MPS they have the GPU in turn.
"""
HEADS = (
    *("network", "batch", "dtype", "seeds", "in turn", "vmapped", "/ in turn"),
    *("processes", "/ in turn", "compile s, in turn", "vmapped", "processes"),
)


def report(results: Path, docs: Path) -> None:
    """Writes seeds.md to `docs`, from the files in `results`."""
    files = [json.loads(path.read_text()) for path in sorted(results.glob("seeds-*.json"))]
    write_atomically(docs / "seeds.md", "\n".join([PREAMBLE, *map(section, files)]))


def section(file: dict[str, Any]) -> str:
    """A result file as Markdown."""
    paragraphs = [
        f"## {machine(file['provenance'])}",
        source(file),
        table(HEADS, map(cells, file["cases"])),
        launcher(file),
        *(
            f"{Case(**record['case'])}: no {name}, {why}."
            for record in file["cases"]
            for name, why in record["failed"].items()
        ),
    ]
    return "\n\n".join(paragraphs) + "\n"


def cells(record: dict[str, Any]) -> list[str]:
    """A case's row below `HEADS`."""
    case, seconds = Case(**record["case"]), record["compile_seconds"]
    speeds = {name: spread(rates) for name, rates in record["images_per_second"].items()}
    return [
        *(f"{case.file} depth {case.depth}", str(record["batch"]), case.dtype, str(case.seeds)),
        *(speeds.get("in turn", ""), speeds.get("vmapped", ""), gain(record, "vmapped")),
        *(speeds.get("processes", ""), gain(record, "processes")),
        *(f"{seconds[name]:.1f}" if name in seconds else "" for name in CONTENDERS),
    ]


def gain(record: dict[str, Any], name: str) -> str:
    """How many times as fast as in turn a contender is; empty where one of the two failed."""
    rates = record["images_per_second"]
    return ratio(rates[name], rates["in turn"]) if {name, "in turn"} <= rates.keys() else ""


def launcher(file: dict[str, Any]) -> str:
    """What `resjax sweep` does here if nothing is said, and what that was seen to gain."""
    workers = file["default_workers"]
    if workers == 1:
        return "Without `--workers`, `resjax sweep` trains one run after the other here."
    gains = ", ".join(
        f"{gained} at {record['case']['file']} depth {record['case']['depth']}"
        for record in file["cases"]
        if record["case"]["seeds"] == workers and (gained := gain(record, "processes"))
    )
    measured = f"times as fast as in turn: {gains}" if gains else "their gain was not measured"
    return f"Without `--workers`, `resjax sweep` starts {workers} processes here; {measured}."


def main() -> None:
    parser, measuring = command_line(__doc__)
    measuring.add_argument("--minutes", type=float, default=10, help="begin no case after these")
    measuring.add_argument("--only", default="", help="regular expression of the cases to measure")
    asked = parser.parse_args()
    if asked.command == "report":
        report(RESULTS, DOCS)
        return
    if jax.device_count() > 1:
        parser.error(f"{jax.device_count()} devices; let one be seen: CUDA_VISIBLE_DEVICES=0")
    chosen = [
        case
        for case in PLANS["cpu" if jax.default_backend() == "cpu" else "gpu"]
        if re.search(asked.only, str(case))
    ]
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    measure(chosen, RESULTS / f"seeds-{kind}.json", asked.minutes)


if __name__ == "__main__":
    main()
