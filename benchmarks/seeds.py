"""Seeds: what is the fastest way to train several seeds of one config on one device?

    python benchmarks/seeds.py measure --minutes 10
    python benchmarks/seeds.py report

Small networks leave a device idle. `measure` runs the plan of the current device and writes each
result to benchmarks/results/ at once; `report` writes docs/seeds.md from all results. The
contenders take turns and train the same networks on the same batches:

- in turn: one process with the whole machine trains one seed after another, as
  `resjax sweep --workers=1` does.
- vmapped: the states of all seeds are stacked, and `jax.vmap` of the step trains them in one
  dispatch. Convolutions with a kernel per seed become grouped convolutions.
- processes: one process per seed, each with its share of the machine, as in
  `resjax sweep --workers=K`.

All of them use a single device; on a machine with several, make only one of them visible.
"""

import json
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from reporting import (
    DOCS,
    RESULTS,
    ROOT,
    command_line,
    machine,
    provenance,
    ratio,
    results_file,
    source,
    spread,
    table,
)

from resjax.config import Config, load, override, resolve
from resjax.disk import write_atomically
from resjax.sweeps.workers import Resources, default_workers, divide_machine
from resjax.train.state import TrainState, order_key
from resjax.train.step import take_steps
from resjax.train.trainer import Dispatch, Trainer, compile_for


class Case(NamedTuple):
    """A network, the number of seeds and the amount of measurement."""

    file: str  # the name of a config in configs/
    depth: int
    dtype: str
    seeds: int
    steps: int  # per dispatch
    dispatches: int  # per seed and round
    rounds: int = 5

    @property
    def config(self) -> Config:
        settings = {"model.depth": self.depth, "model.dtype": self.dtype}
        if self.file == "cifar10":
            settings["data.name"] = "synthetic_cifar"  # as fast, and always available
        return resolve(override(load(ROOT / "configs" / f"{self.file}.py"), settings))

    @property
    def images(self) -> int:
        """The number of images per round over all seeds."""
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
    """A compiled way to train all seeds of a case."""

    train: Callable[[], list[float]]  # trains for a round; returns each seed's last loss
    compile_seconds: float


def train_round(
    call: Any, state: TrainState, arrays: Any, case: Case
) -> tuple[TrainState, np.ndarray]:
    """Trains for a round and waits for it; returns the new state and the last loss."""
    for _ in range(case.dispatches):
        state, metrics = call(state, arrays)
    loss, weight = metrics["sums"]["loss"]
    return state, np.asarray(loss) / np.asarray(weight)


@contextmanager
def in_turn(case: Case) -> Iterator[Contender]:
    trainer = Trainer(case.config)
    arrays, _ = trainer.source.example_arrays()
    states = [trainer.init(seed) for seed in range(case.seeds)]
    step = trainer.compile_dispatch(states[0], Dispatch(0, case.steps))

    def train() -> list[float]:
        losses = []
        for seed, state in enumerate(states):
            states[seed], loss = train_round(step.call, state, arrays, case)
            losses.append(float(loss))
        return losses

    yield Contender(train, step.compile_seconds)


@contextmanager
def vmapped(case: Case) -> Iterator[Contender]:
    trainer = Trainer(case.config)
    arrays, _ = trainer.source.example_arrays()
    states = map(trainer.init, range(case.seeds))
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def take(state: TrainState, arrays: Any) -> Any:
        drawn = trainer.source.draw(arrays, order_key(state.key), state.step, case.steps)
        return take_steps(trainer.train_step(0, arrays), state, drawn)

    vmapped_steps = jax.jit(jax.vmap(take, in_axes=(0, None)), donate_argnums=0)
    step = compile_for(vmapped_steps, state, arrays)

    def train() -> list[float]:
        nonlocal state
        state, losses = train_round(step.call, state, arrays, case)
        return losses.tolist()

    yield Contender(train, step.compile_seconds)


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
            theirs.close()  # so that the end of the process is noticed
            ending.callback(process.join)
            links.append(ending.enter_context(ours))  # closed first, which stops the process
        compile_seconds = max(link.recv() for link in links)

        def train() -> list[float]:
            for link in links:
                link.send("go")
            return [link.recv() for link in links]

        yield Contender(train, compile_seconds)


def serve(case: Case, seed: int, resources: Resources, link: Connection) -> None:
    """Sends the compile time, then trains for a round and sends the loss per message received."""
    resources.claim()
    jax.config.update("jax_enable_compilation_cache", False)
    trainer = Trainer(case.config)
    arrays, _ = trainer.source.example_arrays()
    state = trainer.init(seed)
    step = trainer.compile_dispatch(state, Dispatch(0, case.steps))
    with suppress(EOFError):  # when the contender stops
        link.send(step.compile_seconds)
        while link.recv():
            state, loss = train_round(step.call, state, arrays, case)
            link.send(float(loss))


CONTENDERS: dict[str, Callable[[Case], AbstractContextManager[Contender]]] = {
    "in turn": in_turn,
    "vmapped": vmapped,
    "processes": processes,
}


def measure(cases: Iterable[Case], path: Path, minutes: float) -> None:
    """Measures each case and rewrites `path` after each."""
    deadline = time.monotonic() + 60 * minutes
    jax.config.update("jax_enable_compilation_cache", False)  # so that compilation takes its time
    result: dict[str, Any] = {
        "provenance": provenance(),
        "default_workers": default_workers(),
        "cases": [],
    }
    for case in cases:
        if time.monotonic() > deadline:
            print(f"{case}: skipped, {minutes:g} minutes are over")
            continue
        result["cases"].append(compare(case))
        write_atomically(path, json.dumps(result, indent=1) + "\n")


def compare(case: Case) -> dict[str, Any]:
    """Measures all contenders of a case in turns."""
    print(case, flush=True)
    failed: dict[str, str] = {}
    with ExitStack() as ending:
        ready: dict[str, Contender] = {}
        for name, prepare in CONTENDERS.items():
            try:
                ready[name] = ending.enter_context(prepare(case))
                ready[name].train()  # the first dispatch is slower
            except (EOFError, RuntimeError) as error:  # a process ended; too large for the device
                ready.pop(name, None)
                failed[name] = f"{type(error).__name__} {error}".partition("\n")[0].strip()
                print(f"  {name:>9}: skipped, {failed[name]}", flush=True)
        rates: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(case.rounds):
            for name, contender in ready.items():
                start = time.monotonic()
                contender.train()
                rates[name].append(case.images / (time.monotonic() - start))
    for name, measured in rates.items():
        print(f"  {name:>9}: {median(measured):,.0f} images/s", flush=True)
    return {
        "case": case._asdict(),
        "batch": case.config.data.batch_size,
        "compile_seconds": {name: contender.compile_seconds for name, contender in ready.items()},
        "images_per_second": rates,
        "failed": failed,
    }


PREAMBLE = """\
# Several seeds at once

Written by `python benchmarks/seeds.py report` from the files in `benchmarks/results/`; the script
documents the measurements. Speeds are images per second over all seeds: the median and range over
rounds in which the contenders take turns. Ratios are medians of the ratios within rounds. Compile
times are those of training only; processes compile at the same time, and the slowest counts.

Predicted before anything was measured:

- **CPU**: processes win by 1.2 to 1.8, and by more the narrower the network is, because threads
  that share a small convolution mostly wait for each other. vmapped loses, because XLA's fast
  convolutions on CPUs do not support groups.
- **GPU**: vmapped gains most with 8 seeds of the quickstart's network, whose kernels end before the
  next one is launched, and little on CIFAR's, because cuDNN's grouped convolutions are slow.
  Processes gain 1.5 at most, because they use the GPU in turns without NVIDIA's MPS.

On the CPU processes win and vmapped loses, as predicted, so `resjax sweep` trains seeds in
processes and has no option for several seeds in one program. No GPU has been measured: whether
vmapped wins there is open. `resjax sweep --workers-per-gpu=auto` measures how many processes are
fastest on the GPU at hand.
"""
HEADS = (
    *("network", "batch", "dtype", "seeds", "in turn", "vmapped", "/ in turn"),
    *("processes", "/ in turn", "compile s, in turn", "vmapped", "processes"),
)


def report(results: Path, docs: Path) -> None:
    """Writes seeds.md to `docs` from the files in `results`."""
    files = [json.loads(path.read_text()) for path in sorted(results.glob("seeds-*.json"))]
    write_atomically(docs / "seeds.md", "\n".join([PREAMBLE, *map(section, files)]))


def section(file: dict[str, Any]) -> str:
    """Returns a result file as Markdown."""
    paragraphs = [
        f"## {machine(file['provenance'])}",
        source(file["provenance"]),
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
    """Returns the row of a case below `HEADS`."""
    case, seconds = Case(**record["case"]), record["compile_seconds"]
    speeds = {name: spread(rates) for name, rates in record["images_per_second"].items()}
    return [
        *(f"{case.file} depth {case.depth}", str(record["batch"]), case.dtype, str(case.seeds)),
        *(speeds.get("in turn", ""), speeds.get("vmapped", ""), gain(record, "vmapped")),
        *(speeds.get("processes", ""), gain(record, "processes")),
        *(f"{seconds[name]:.1f}" if name in seconds else "" for name in CONTENDERS),
    ]


def gain(record: dict[str, Any], name: str) -> str:
    """Returns a contender's speed relative to in turn, or "" if either of them failed."""
    rates = record["images_per_second"]
    return ratio(rates[name], rates["in turn"]) if {name, "in turn"} <= rates.keys() else ""


def launcher(file: dict[str, Any]) -> str:
    """Describes the default of `resjax sweep` on the machine and its measured gain."""
    workers = file["default_workers"]
    if workers == 1:
        return "Without `--workers`, `resjax sweep` trains one run after another on this machine."
    gains = ", ".join(
        f"{gained} at {record['case']['file']} depth {record['case']['depth']}"
        for record in file["cases"]
        if record["case"]["seeds"] == workers and (gained := gain(record, "processes"))
    )
    started = f"Without `--workers`, `resjax sweep` starts {workers} processes on this machine"
    if not gains:
        return f"{started}; their gain was not measured."
    return f"{started}; their speed relative to in turn: {gains}."


def main() -> None:
    parser, measuring = command_line(__doc__)
    measuring.add_argument("--minutes", type=float, default=10, help="start no case after these")
    measuring.add_argument("--only", default="", help="regular expression that selects cases")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report(RESULTS, DOCS)
        return
    if jax.device_count() > 1:
        parser.error(f"{jax.device_count()} devices; set CUDA_VISIBLE_DEVICES=0 to use one of them")
    plan = PLANS["cpu" if jax.default_backend() == "cpu" else "gpu"]
    chosen = [case for case in plan if re.search(arguments.only, str(case))]
    measure(chosen, results_file("seeds"), arguments.minutes)


if __name__ == "__main__":
    main()
