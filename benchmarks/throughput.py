"""Throughput: how fast is a step, how much of it does the loop keep, how long does it compile?

    python benchmarks/throughput.py measure --minutes 10
    python benchmarks/throughput.py report

`measure` goes through the plan of the device it finds, and writes every result to
benchmarks/results/ as soon as it is there; `report` makes docs/throughput.md and .svg of all that
lies in that folder. No run is trained, so this is no experiment for `resjax sweep`.

Beside one another stand:

- scan, unroll: the bare step, with a stage's equal blocks in a loop or one after the other.
  Forward, backward and SGD in plain JAX, on one batch that lies on the device.
- single: as scan or unroll, whichever `model.loop = "auto"` chooses, but with one step a dispatch
  where the others take all steps of a measurement in one.
- run: the whole of `resjax train`: data drawn, cropped and flipped, metrics written.
- torch, torch-compiled: the same network and step in PyTorch (`throughput_torch.py`).
- the roofline, computed before anything runs: what arithmetic and memory traffic would allow
  (Williams et al. 2009), by the ceilings that a matrix product and a copy reach on the device.

They take turns, so that what else the machine does meets them all alike. Whatever is not installed
is left out with a word; jax, flax and optax are enough for the bare step.
"""

import argparse
import gc
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from importlib import metadata, util
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

# Memory as it is needed: PyTorch wants some of the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# PyTorch's threads sleep while they wait. Spinning, as they do unasked, they made ResNet-20 four
# times slower on two cores whenever another program wanted one of them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import jaxprs_in_params

from resjax.data import DATASETS, Spec
from resjax.disk import write_atomically
from resjax.machine import available_cores
from resjax.models.count import count
from resjax.models.resnet import build, scans
from resjax.xla.compile_options import quick_compile, step_compile

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"

RATE, DECAY = 0.1, 1e-4  # of SGD; its momentum is 0.9


class Case(NamedTuple):
    """A network, and what is measured of it."""

    model: str  # a preset
    batch: int
    dtype: str
    steps: int  # of one measurement
    rounds: int  # in which the contenders take turns; 0 compiles only
    contenders: tuple[str, ...]

    @property
    def data(self) -> str:
        return "synthetic_cifar" if self.model.startswith("cifar") else "synthetic_imagenet"

    @property
    def depth(self) -> int:
        return int(self.model.rpartition("resnet")[2])

    @property
    def spec(self) -> Spec:
        return DATASETS[self.data]

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} batch {self.batch}"


ALL = ("scan", "unroll", "single", "run", "torch", "torch-compiled")

# What answers the most comes first: the time may not do for all.
PLANS = {
    "gpu": (
        Case("cifar_resnet20", 128, "bfloat16", 200, 5, ALL),
        Case("resnet50", 256, "bfloat16", 20, 5, ALL),
        Case("cifar_resnet56", 128, "bfloat16", 100, 5, ALL),
        Case("cifar_resnet110", 128, "bfloat16", 50, 5, ALL),
        Case("cifar_resnet1202", 128, "bfloat16", 5, 3, ("scan", "run", "torch")),
        Case("cifar_resnet20", 128, "float32", 200, 5, ALL),
        Case("resnet50", 256, "float32", 10, 5, ALL),
        Case("cifar_resnet56", 128, "float32", 100, 5, ALL),
        Case("cifar_resnet110", 128, "float32", 50, 5, ALL),
        Case("cifar_resnet1202", 128, "float32", 5, 3, ("scan", "run", "torch")),
        Case("cifar_resnet1202", 128, "bfloat16", 1, 0, ("unroll",)),
    ),
    # PyTorch is eager here: to compile ResNet-20 took it 55 s on two cores.
    "cpu": (
        Case("cifar_resnet20", 128, "float32", 4, 5, ("scan", "unroll", "single", "run", "torch")),
        Case("cifar_resnet56", 128, "float32", 2, 3, ("scan", "unroll", "single", "torch")),
        Case("cifar_resnet110", 128, "float32", 1, 3, ("scan", "unroll", "torch")),
        Case("cifar_resnet1202", 8, "float32", 1, 3, ("scan", "torch")),
        Case("resnet50", 8, "float32", 1, 3, ("scan", "unroll", "torch")),
    ),
}


class Contender(NamedTuple):
    """What is measured: ready to run, compiled and warm."""

    seconds: Callable[[], float]  # an image takes, averaged over a case's steps
    compile_seconds: float
    peak_bytes: int | None  # on the device; None where nobody counts
    parameters: int


def bare_step(case: Case, loop: str, at_once: int | None = None) -> Contender:
    """As one would write it by hand: no data to draw, no metrics but the loss.

    Args:
      case: what to measure.
      loop: the layout of a stage's equal blocks.
      at_once: steps a dispatch takes; all of the case's if None.
    """
    at_once = at_once or case.steps
    model = build(case.model, loop=loop, dtype=case.dtype)
    images, labels = map(jnp.asarray, batch(case))
    init = jax.jit(model.init, compiler_options=quick_compile())
    variables = init(jax.random.key(0), images[:1])
    sgd = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=0.9))

    def dispatch(state: Any, images: Any, labels: Any) -> Any:
        def step(state: Any, _: None) -> Any:
            params, statistics, momentum = state

            def loss_of(params: Any) -> Any:
                variables = {"params": params, "batch_stats": statistics}
                logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return losses.mean(), new["batch_stats"]

            (loss, new), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
            updates, momentum = sgd.update(gradients, momentum, params)
            return (optax.apply_updates(params, updates), new, momentum), loss

        if at_once == 1:  # in no loop: that is part of what is measured
            return step(state, None)
        return jax.lax.scan(step, state, length=at_once)

    params = variables["params"]
    state = (params, variables["batch_stats"], sgd.init(params))
    start = time.monotonic()
    step = jax.jit(dispatch, donate_argnums=0, compiler_options=step_compile())
    compiled = step.lower(state, images, labels).compile()
    compile_seconds = time.monotonic() - start
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))

    def seconds() -> float:
        nonlocal state
        start = time.monotonic()
        for _ in range(case.steps // at_once):
            state, losses = compiled(state, images, labels)
        losses.block_until_ready()
        return (time.monotonic() - start) / (case.steps * case.batch)

    if case.rounds:
        seconds()
    memory = compiled.memory_analysis()  # whose own peak leaves out, on a CPU, what is temporary
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes  # the state is donated
    return Contender(seconds, compile_seconds, peak, parameters)


def whole_run(case: Case) -> Contender:
    """`resjax train`, but for its first dispatch, which compiles, and the evaluation at its end."""
    from resjax.config import default_config, override, resolve
    from resjax.train import records
    from resjax.train.loop import train
    from resjax.train.step import program

    records.provenance()  # which a run begins with; an ImportError where resjax is not installed
    steps = 3 * case.steps
    settings = {
        "model.name": case.model,
        "model.dtype": case.dtype,
        "data.name": case.data,
        "data.batch_size": case.batch,
        "data.crop_padding": 4 if case.data == "synthetic_cifar" else 0,
        "data.flip": True,
        "train.steps": steps,
        "train.log_every": case.steps,
        "train.eval_every": steps,
        "train.checkpoint_every": 0,
        "optimizer.learning_rate": RATE,
        "optimizer.weight_decay": DECAY,
    }
    config = resolve(override(default_config(), settings))
    compiled = program(config)  # which `train` will find again
    state = compiled.init(config.seed)
    start = time.monotonic()
    cost = compiled.compiled(state, case.steps)
    compile_seconds = time.monotonic() - start

    def seconds() -> float:
        with tempfile.TemporaryDirectory() as workdir:
            return 1 / train(config, Path(workdir))["images_per_second"]

    return Contender(seconds, compile_seconds, cost.peak_bytes, compiled.counts.parameters)


def in_torch(case: Case, compiled: bool) -> Contender:
    """The same network in PyTorch."""
    import throughput_torch as theirs
    import torch

    theirs.forget()
    images, labels = batch(case)
    if case.model == "resnet50":
        network = theirs.resnet50(case.spec.classes)
    else:
        network = theirs.cifar(case.depth, 3, 16, case.spec.classes, theirs.basic)
    trainer = theirs.Trainer(
        network,
        (torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels).long()),
        bfloat16=case.dtype == "bfloat16",
        compiled=compiled,
        rate=RATE,
        decay=DECAY,
    )
    start = time.monotonic()
    trainer.steps(1)
    compile_seconds = time.monotonic() - start  # and one step

    def seconds() -> float:
        start = time.monotonic()
        trainer.steps(case.steps)
        return (time.monotonic() - start) / (case.steps * case.batch)

    seconds()  # CUDA graphs are recorded in the first few steps
    return Contender(seconds, compile_seconds, trainer.peak_bytes(), trainer.parameters)


CONTENDERS: dict[str, Callable[[Case], Contender]] = {
    "scan": lambda case: bare_step(case, "scan"),
    "unroll": lambda case: bare_step(case, "unroll"),
    "single": lambda case: bare_step(case, "auto", at_once=1),
    "run": whole_run,
    "torch": lambda case: in_torch(case, compiled=False),
    "torch-compiled": lambda case: in_torch(case, compiled=True),
}


def batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Noise: images (n, h, w, c), float32, and labels (n,)."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((case.batch, *case.spec.image_shape), dtype=np.float32)
    return images, generator.integers(0, case.spec.classes, case.batch, dtype=np.int32)


class Work(NamedTuple):
    """What one step cannot do without."""

    flops: int
    bytes: int


def work(case: Case) -> Work:
    """Counts a step's arithmetic and memory traffic.

    A convolution is computed three times: forward, and for two gradients. Each reads and writes
    memory, and whatever lies between two convolutions is one pass more, in which only BN's means
    have to come first. So a convolution's input goes through memory 3 times (read forward, read for
    the weights' gradient, its own gradient written) and its output 11 times (written, read for the
    statistics, normalised in one reading and writing; backward twice two readings and a writing for
    BN, and a reading for each of the two gradients). Additions of shortcuts are not counted, nor is
    any cache larger than the chip's registers. A parameter is read twice, its gradient written, and
    the optimiser reads three numbers and writes two, all float32.
    """
    model = build(case.model, loop="scan", dtype=case.dtype)
    counts = count(model, case.spec.image_shape)
    images = jax.ShapeDtypeStruct((case.batch, *case.spec.image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    read, written = convolved(jax.make_jaxpr(model.apply)(variables, images).jaxpr)
    activations = (3 * read + 11 * written) * jnp.dtype(case.dtype).itemsize
    return Work(3 * 2 * counts.macs * case.batch, activations + 8 * 4 * counts.parameters)


def convolved(program: Any) -> tuple[int, int]:
    """Numbers that the convolutions of a jaxpr read and write, kernels aside."""
    read = written = 0
    for equation in program.eqns:
        if equation.primitive.name == "conv_general_dilated":
            read += equation.invars[0].aval.size
            written += equation.outvars[0].aval.size
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            inner_read, inner_written = convolved(inner)
            read, written = read + times * inner_read, written + times * inner_written
    return read, written


class Ceilings(NamedTuple):
    """What the device was seen to reach."""

    flops: float  # a second, in a matrix product
    bytes: float  # a second, in a copy, those read and those written

    def images_per_second(self, case: Case, needed: Work) -> float:
        return case.batch / max(needed.flops / self.flops, needed.bytes / self.bytes)


def ceilings(dtype: str, cpu: bool) -> Ceilings:
    side, length = (2048, 2**26) if cpu else (8192, 2**30)
    matrix = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype) / side**0.5
    vector = jnp.zeros(length, dtype)
    moved = 2 * vector.nbytes
    product = jax.jit(jnp.matmul)
    # In place: a new array's pages, which the system first has to find, are slower than memory.
    copy = jax.jit(lambda vector: vector + 1, donate_argnums=0)
    return Ceilings(
        flops=2 * side**3 / fastest(partial(product, matrix), matrix),
        bytes=moved / fastest(copy, vector),
    )


def fastest(call: Callable[[Any], Any], value: Any, repetitions: int = 10) -> float:
    """Seconds of the fastest call, each on what the last one gave: nothing disturbed that one."""
    seconds = []
    for _ in range(1 + repetitions):
        start = time.monotonic()
        value = call(value).block_until_ready()
        seconds.append(time.monotonic() - start)
    return min(seconds[1:])  # the first compiles


def measure(cases: Iterable[Case], path: Path, minutes: float) -> None:
    """Measures one case after the other, and writes `path` anew after each."""
    deadline = time.monotonic() + 60 * minutes
    jax.config.update("jax_enable_compilation_cache", False)  # or compiling takes no time
    result: dict[str, Any] = {"provenance": provenance(), "ceilings": {}, "cases": []}
    for case in cases:
        if time.monotonic() > deadline:
            print(f"{case}: left out, {minutes:g} minutes are over")
            continue
        if case.dtype not in result["ceilings"]:
            cpu = jax.default_backend() == "cpu"
            result["ceilings"][case.dtype] = ceilings(case.dtype, cpu)._asdict()
        ceiling = Ceilings(**result["ceilings"][case.dtype])
        result["cases"].append(compare(case, ceiling))
        write_atomically(path, json.dumps(result, indent=1) + "\n")
        gc.collect()  # the next case wants the memory


def compare(case: Case, ceiling: Ceilings) -> dict[str, Any]:
    """One case's record: predicted, then measured in turns."""
    needed = work(case)
    predicted = ceiling.images_per_second(case, needed)
    print(f"{case}: the roofline is {predicted:,.1f} images/s", flush=True)
    ready: dict[str, Contender] = {}
    failed: dict[str, str] = {}
    for name in case.contenders:
        try:
            ready[name] = CONTENDERS[name](case)
        except (ImportError, RuntimeError) as error:  # not installed; too large for the device
            failed[name] = str(error).partition("\n")[0]
            print(f"  {name:>14}: left out, {failed[name]}", flush=True)
        else:
            print(f"  {name:>14}: compiled in {ready[name].compile_seconds:.1f} s", flush=True)
    assert len({contender.parameters for contender in ready.values()}) < 2, "unequal networks"
    rates: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(case.rounds):
        for name, contender in ready.items():
            rates[name].append(1 / contender.seconds())
    for name in ready if case.rounds else ():
        print(f"  {name:>14}: {median(rates[name]):,.1f} images/s", flush=True)
    blocks = build(case.model).stages
    return {
        "case": case._asdict(),
        "auto": "scan" if scans("auto", blocks) else "unroll",  # what `resjax train` chooses
        "work": needed._asdict(),
        "roofline_images_per_second": predicted,
        "parameters": max((contender.parameters for contender in ready.values()), default=None),
        "contenders": {
            name: {
                "compile_seconds": contender.compile_seconds,
                "peak_bytes": contender.peak_bytes,
                "images_per_second": rates[name],
            }
            for name, contender in ready.items()
        },
        "failed": failed,
    }


def provenance() -> dict[str, Any]:
    """Where the numbers come from; here, not from `resjax.train`, which a bare machine lacks."""
    installed = [
        name for name in ("jax", "jaxlib", "flax", "optax", "torch") if util.find_spec(name)
    ]
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": {name: metadata.version(name) for name in installed},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cpu": cpu_name(),
        "cores": available_cores(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "start": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def git(*words: str) -> str | None:
    """What git says of this checkout; None where there is none."""
    try:
        answer = subprocess.run(
            ["git", *words], cwd=HERE, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def cpu_name() -> str:
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


PREAMBLE = """\
# Throughput

Made by `python benchmarks/throughput.py report` from the files of `benchmarks/results/`; the
script says what is measured and how. Speeds are images a second of training, the median and range
of rounds in which the contenders take turns; ratios are medians of the rounds' own, because what
else a machine does meets the contenders of a round alike. It does not meet the ceilings alike: on a
machine that others use, shares of the roofline are rough.

- **roofline**: the most that arithmetic (a) or memory traffic (m) allows, by counted FLOPs and
  bytes and by ceilings measured on the device. Predicted before anything is measured. Bytes are
  counted as if no cache held an activation, so a CPU, whose caches hold some, can be faster.
- **step**: the bare training step, in the layout that `model.loop = "auto"` has on the device, and
  its share of the roofline.
- **one a dispatch**: the bare step where every step is a dispatch of its own; everywhere else one
  dispatch takes many steps, as `train.log_every` says.
- **run**: the whole of `resjax train`, evaluation, first dispatch and checkpoints apart, and its
  share of the step. What a checkpoint costs is in [chaos.md](chaos.md).
- **PyTorch**: the same network and step, eager or compiled, whichever is faster, and how many times
  as fast ours is.

![Compile time against depth](throughput.svg)
"""
SPEED = (
    *("network", "batch", "dtype", "roofline", "step", "of roofline"),
    *("one a dispatch", "of step", "run", "of step", "PyTorch", "step / PyTorch"),
)
COST = (
    *("network", "batch", "dtype", "compile s, scan", "compile s, unroll"),
    *("peak MiB, scan", "peak MiB, unroll", "peak MiB, PyTorch"),
)


def report(results: Path, docs: Path) -> None:
    """Writes throughput.md and throughput.svg to `docs`, from the files in `results`."""
    files = [json.loads(path.read_text()) for path in sorted(results.glob("throughput-*.json"))]
    write_atomically(docs / "throughput.md", "\n".join([PREAMBLE, *map(section, files)]))
    write_atomically(docs / "throughput.svg", compile_times(files))


def section(file: dict[str, Any]) -> str:
    """A result file as Markdown: where it comes from, ceilings, speed, what it costs."""
    origin, ceilings = file["provenance"], file["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    commit = f"commit {origin['commit']}" if origin["commit"] else "no git checkout"
    changed = " and changes" if origin["dirty"] else ""
    paragraphs = [
        f"## {setup(origin)}",
        f"{origin['start']}, `{' '.join([origin['xla_flags'], origin['command']]).strip()}`; "
        f"{commit}{changed}; Python {origin['python']}, {versions}.",
        *(
            f"Ceilings in {dtype}: {ceiling['flops'] / 1e9:,.0f} GFLOP/s in a matrix product, "
            f"{ceiling['bytes'] / 1e9:,.1f} GB/s in a copy."
            for dtype, ceiling in ceilings.items()
        ),
        table(SPEED, [speed(r, Ceilings(**ceilings[r["case"]["dtype"]])) for r in file["cases"]]),
        table(COST, [cost(record) for record in file["cases"]]),
        *(
            f"{Case(**record['case'])}: no {contender}, {why}."
            for record in file["cases"]
            for contender, why in record["failed"].items()
        ),
    ]
    return "\n\n".join(paragraphs) + "\n"


def stored(record: dict[str, Any]) -> Case:
    fields = record["case"]
    return Case(**fields | {"contenders": tuple(fields["contenders"])})


def machine(origin: dict[str, Any]) -> str:
    cpu = f"{origin['cpu']}, {origin['cores']} cores"
    return cpu if origin["device"] == "cpu" else f"{origin['device']} ({cpu})"


def setup(origin: dict[str, Any]) -> str:
    """The machine, and what compiled: releases of JAX differ more than machines do."""
    return f"{machine(origin)}, jax {'.'.join(origin['versions']['jax'].split('.')[:2])}"


def speed(record: dict[str, Any], ceiling: Ceilings) -> list[str]:
    """A case's cells below `SPEED`."""
    case, needed = stored(record), Work(**record["work"])
    rates = {
        name: np.array(entry["images_per_second"])
        for name, entry in record["contenders"].items()
        if entry["images_per_second"]
    }
    missing = np.array([np.nan])
    step, single, run = (rates.get(name, missing) for name in (record["auto"], "single", "run"))
    theirs = [each for name, each in rates.items() if name.startswith("torch")]
    torch = max(theirs, key=np.median, default=missing)
    roofline = np.array([record["roofline_images_per_second"]])
    bound = "a" if needed.flops / ceiling.flops > needed.bytes / ceiling.bytes else "m"

    def rate(of: Any) -> str:
        digits = 0 if np.median(of) > 100 else 1
        low, middle, high = (f"{q:,.{digits}f}" for q in np.quantile(of, (0, 0.5, 1)))
        return middle if low == high else f"{middle} ({low} to {high})"

    cells = [
        *(case.model, str(case.batch), case.dtype, f"{rate(roofline)} ({bound})"),
        *(rate(step), f"{np.median(step / roofline):.0%}"),
        *(rate(single), f"{np.median(single / step):.0%}"),
        *(rate(run), f"{np.median(run / step):.0%}"),
        *(rate(torch), f"{np.median(step / torch):.2f}"),
    ]
    return ["" if cell.startswith("nan") else cell for cell in cells]


def cost(record: dict[str, Any]) -> list[str]:
    """A case's cells below `COST`."""
    case, contenders = stored(record), record["contenders"]

    def entry(name: str, key: str, unit: float) -> str:
        value = contenders.get(name, {}).get(key)
        return "" if value is None else f"{value / unit:,.{1 if unit == 1 else 0}f}"

    return [
        *(case.model, str(case.batch), case.dtype),
        *(entry(loop, "compile_seconds", 1) for loop in ("scan", "unroll")),
        *(entry(name, "peak_bytes", 2**20) for name in ("scan", "unroll", "torch")),
    ]


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown; the first column to the left, numbers to the right."""
    heads = list(heads)
    rules = [":--", *["--:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows))


def compile_times(files: list[dict[str, Any]]) -> bytes:
    """The figure, as SVG: seconds to compile a CIFAR network's step against its depth."""
    from resjax.analysis import figures as draw

    machines: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        machines.setdefault(setup(file["provenance"]), []).extend(file["cases"])
    every = [stored(record) for cases in machines.values() for record in cases]
    depths = sorted({case.depth for case in every if "cifar" in case.model})
    with draw.style():
        drawn, axes = draw.panels(len(machines), width=draw.COLUMN_WIDTH * min(len(machines), 2))
        for panel, (title, cases) in zip(axes, machines.items(), strict=True):
            panel.set_title(title.partition(" (")[0])
            panel.set(xscale="log", yscale="log", xlabel="depth (layers)")
            dtype = cases[0]["case"]["dtype"]
            panel.set_ylabel(f"compile time, {dtype} (s)")
            cifar = {
                case: record
                for record in cases
                if (case := stored(record)).dtype == dtype and "cifar" in case.model
            }
            for loop, color in draw.colors(("scan", "unroll")).items():
                points = sorted(
                    (case.depth, record["contenders"][loop]["compile_seconds"])
                    for case, record in cifar.items()
                    if loop in record["contenders"]
                )
                if points:
                    panel.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3)
                    beside: Any = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
                    panel.annotate(loop, points[-1], color=color, **beside)
            panel.set_xticks(depths, [str(depth) for depth in depths])
            panel.yaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
            panel.set_ylim(1, 2 * panel.get_ylim()[1])
        content = io.BytesIO()
        # Without a date the same results give the same bytes.
        drawn.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()


def command_line(doc: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of a script that measures and reports, and that of `measure`, for its options."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="measure on this machine")
    commands.add_parser("report", help="make the page in docs/ from all results")
    return parser, measuring


def main() -> None:
    parser, measuring = command_line(__doc__)
    measuring.add_argument("--minutes", type=float, default=30, help="begin no case after these")
    measuring.add_argument("--only", default="", help="regular expression of the cases to measure")
    measuring.add_argument("--out", type=Path, help="of benchmarks/results/ if not given")
    asked = parser.parse_args()
    if asked.command == "report":
        report(RESULTS, DOCS)
        return
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    plan = PLANS["cpu" if jax.default_backend() == "cpu" else "gpu"]
    if not (chosen := [case for case in plan if re.search(asked.only, str(case))]):
        parser.error(f"--only={asked.only} matches none of: {'; '.join(map(str, plan))}")
    measure(chosen, asked.out or RESULTS / f"throughput-{kind}.json", asked.minutes)


if __name__ == "__main__":
    main()
