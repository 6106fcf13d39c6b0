"""Throughput: how fast is a training step, how much does the loop cost, how long is compilation?

    python benchmarks/throughput.py measure --minutes 10
    python benchmarks/throughput.py report

`measure` runs the plan of the current device and writes each result to benchmarks/results/ at once;
`report` writes docs/throughput.md and docs/throughput.svg from all results. The contenders are

- scan, unroll: the bare step, with the equal blocks of a stage in a loop or one after another.
  It is forward, backward and SGD in plain JAX, on one batch that stays on the device.
- single: the layout that `model.loop = "auto"` chooses, with one step per dispatch; the other
  contenders run all steps of a measurement in one dispatch.
- run: the whole of `resjax train`: sampling, crops and flips, and metrics.
- torch, torch-compiled: the same network and step in PyTorch (`throughput_torch.py`), in a process
  of its own, without JAX. The others share a process with huge pages, as `resjax train` has them.

They are compared with a roofline (Williams et al. 2009), computed before anything runs: the speed
that arithmetic and memory traffic would allow, given the ceilings that a matrix product and a copy
reach on the device. The contenders take turns, so that other load on the machine affects all of
them alike. Packages that are not installed are skipped with a message; the bare step needs only
jax, flax and optax.
"""

import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

# Memory is allocated on demand, because PyTorch needs memory of the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import jaxprs_in_params
from reporting import (
    DOCS,
    RESULTS,
    command_line,
    machine,
    provenance,
    regular_expression,
    results_file,
    source,
    spread,
    table,
)

from resjax.data import DATASETS, KnownDataset
from resjax.disk import write_atomically
from resjax.machine import HUGE_PAGES, restart_with_huge_pages
from resjax.models.count import count
from resjax.models.resnet import build, uses_scan
from resjax.xla.ceilings import copy_rate, product_rate
from resjax.xla.compile_options import quick_compile, step_compile
from resjax.xla.convolution import as_written

RATE, DECAY = 0.1, 1e-4  # learning rate and weight decay of SGD; the momentum is 0.9


class Case(NamedTuple):
    """A network and the amount of measurement."""

    model: str  # a preset
    batch: int
    dtype: str
    steps: int  # per measurement
    rounds: int  # in each of which every contender is measured once; 0 compiles only
    contenders: tuple[str, ...]

    @property
    def data(self) -> str:
        return "synthetic_cifar" if self.model.startswith("cifar") else "synthetic_imagenet"

    @property
    def depth(self) -> int:
        return int(self.model.rpartition("resnet")[2])

    @property
    def spec(self) -> KnownDataset:
        return DATASETS[self.data]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        assert self.spec.image_shape is not None, f"{self.data} has images of several sizes"
        return self.spec.image_shape

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} batch {self.batch}"


ALL = ("scan", "unroll", "single", "run", "torch", "torch-compiled")

# The most informative cases come first, because time may run out.
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
    # PyTorch is eager here, because it compiled ResNet-20 in 55 s on two cores.
    "cpu": (
        Case("cifar_resnet20", 128, "float32", 8, 5, ("scan", "unroll", "single", "run", "torch")),
        Case("cifar_resnet56", 128, "float32", 8, 3, ("scan", "unroll", "single", "run", "torch")),
        Case("cifar_resnet110", 128, "float32", 4, 3, ("scan", "unroll", "run", "torch")),
        Case("resnet50", 8, "float32", 4, 3, ("scan", "unroll", "single", "run", "torch")),
        Case("cifar_resnet1202", 8, "float32", 2, 3, ("scan", "torch")),
    ),
}


class Contender(NamedTuple):
    """A compiled and warmed-up training step."""

    seconds: Callable[[], float]  # measures the seconds per image over the steps of a case
    compile_seconds: float
    peak_bytes: int | None  # on the device; None if unknown
    parameters: int
    end: Callable[[], object] | None = None  # frees what garbage collection does not


def bare_step(case: Case, loop: str, steps_per_dispatch: int | None = None) -> Contender:
    """Returns a step written by hand, without sampling and without metrics except the loss.

    Args:
      case: The case to measure.
      loop: The value of `model.loop`.
      steps_per_dispatch: All steps of the case if None.
    """
    count = steps_per_dispatch or case.steps
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

        if count == 1:  # without a loop, whose cost is part of the measurement
            return step(state, None)
        return jax.lax.scan(step, state, length=count)

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
        for _ in range(case.steps // count):
            state, losses = compiled(state, images, labels)
        losses.block_until_ready()
        return (time.monotonic() - start) / (case.steps * case.batch)

    if case.rounds:
        seconds()
    memory: Any = compiled.memory_analysis()  # its own peak excludes temporary memory on a CPU
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes  # the state is donated
    return Contender(seconds, compile_seconds, peak, parameters)


def whole_run(case: Case) -> Contender:
    """Returns `resjax train` between the first and the third of four lines of metrics.

    The first line includes compilation, the last one evaluation and a checkpoint.
    """
    from resjax.config import default_config, override, resolve
    from resjax.train import records
    from resjax.train.loop import train
    from resjax.train.trainer import Dispatch, trainer_for

    records.provenance()  # raises ImportError, as a run would, if resjax is not installed
    steps = 4 * case.steps
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
    trainer = trainer_for(config)  # cached, so `train` uses it again
    step = trainer.compile_dispatch(trainer.init(config.seed), Dispatch(0, case.steps))

    def seconds() -> float:
        lines: list[float] = []  # the times when they are written
        with tempfile.TemporaryDirectory() as workdir:
            train(config, Path(workdir), on_progress=lambda _: lines.append(time.monotonic()))
        return (lines[2] - lines[0]) / (2 * case.steps * case.batch)

    return Contender(seconds, step.compile_seconds, step.peak_bytes, trainer.counts.parameters)


def in_torch(case: Case, compiled: bool) -> Contender:
    """Returns the same network and step in PyTorch, in a process of its own."""
    settings = {
        "depth": case.depth,
        "small_images": case.model.startswith("cifar"),
        "batch": [case.batch, *case.image_shape],
        "classes": case.spec.classes,
        "bfloat16": case.dtype == "bfloat16",
        "compiled": compiled,
        "steps": case.steps,
        "rate": RATE,
        "decay": DECAY,
    }
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("throughput_torch.py"), json.dumps(settings)],
        env=torch_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )

    def end() -> None:
        process.communicate()
        errors.close()

    def answer() -> Any:
        assert process.stdout is not None
        if line := process.stdout.readline():
            return json.loads(line)
        process.wait()
        errors.seek(0)
        reason = errors.read().rstrip().rpartition("\n")[2]
        end()
        raise RuntimeError(reason)

    def seconds() -> float:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and `answer` says why
            print(file=process.stdin, flush=True)
        return answer()

    return Contender(**answer(), seconds=seconds, end=end)


def torch_environment() -> dict[str, str]:
    """Returns the environment of PyTorch: that of this process, without huge pages."""
    # Threads sleep while they wait. Spinning, PyTorch's default, made ResNet-20 four times slower
    # on two cores whenever another program needed one of them.
    found = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    tunables = found.pop("GLIBC_TUNABLES", "").split(":")
    if others := ":".join(each for each in tunables if not each.startswith(HUGE_PAGES)):
        found["GLIBC_TUNABLES"] = others
    return found


CONTENDERS: dict[str, Callable[[Case], Contender]] = {
    "scan": lambda case: bare_step(case, "scan"),
    "unroll": lambda case: bare_step(case, "unroll"),
    "single": lambda case: bare_step(case, "auto", steps_per_dispatch=1),
    "run": whole_run,
    "torch": lambda case: in_torch(case, compiled=False),
    "torch-compiled": lambda case: in_torch(case, compiled=True),
}


def batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images (n, h, w, c) in float32 and labels (n,)."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((case.batch, *case.image_shape), dtype=np.float32)
    return images, generator.integers(0, case.spec.classes, case.batch, dtype=np.int32)


class Work(NamedTuple):
    """The arithmetic and memory traffic that a step needs at least."""

    flops: int
    bytes: int


def work(case: Case) -> Work:
    """Counts the arithmetic and memory traffic of a step.

    A convolution is computed three times: forward and for two gradients. Each time reads and writes
    memory, and the operations between two convolutions need one more pass, before which only the
    means of BN must be known. The input of a convolution thus moves through memory 3 times (read
    forward, read for the gradient of the weights, its own gradient written), and its output 11
    times (written, read for the statistics, normalized in one read and one write; backward, two
    reads and one write twice for BN, and one read for each of the two gradients). The additions of
    shortcuts are not counted, and no cache larger than the chip's registers is assumed. A parameter
    is read twice and its gradient written, and the optimizer reads three numbers and writes two,
    all in float32.
    """
    model = build(case.model, loop="scan", dtype=case.dtype)
    counts = count(model, case.image_shape)
    images = jax.ShapeDtypeStruct((case.batch, *case.image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    with as_written():
        program = jax.make_jaxpr(model.apply)(variables, images)
    read, written = convolved(program.jaxpr)
    activations = (3 * read + 11 * written) * jnp.dtype(case.dtype).itemsize
    return Work(3 * 2 * counts.macs * case.batch, activations + 8 * 4 * counts.parameters)


def convolved(program: Any) -> tuple[int, int]:
    """Returns how many activations the convolutions of a jaxpr read and write."""
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
    """The highest measured speeds of the device."""

    flops: float  # FLOP/s of a matrix product
    bytes: float  # bytes per second, read and written, of a copy

    def images_per_second(self, case: Case, needed: Work) -> float:
        return case.batch / max(needed.flops / self.flops, needed.bytes / self.bytes)


def ceilings(dtype: str, cpu: bool) -> Ceilings:
    side, length = (2048, 2**26) if cpu else (8192, 2**30)
    return Ceilings(flops=product_rate(dtype, side), bytes=copy_rate(dtype, length))


def measure(cases: Iterable[Case], path: Path, minutes: float) -> None:
    """Measures each case and rewrites `path` after each."""
    deadline = time.monotonic() + 60 * minutes
    jax.config.update("jax_enable_compilation_cache", False)  # so that compilation takes its time
    result: dict[str, Any] = {"provenance": provenance(), "ceilings": {}, "cases": []}
    for case in cases:
        if time.monotonic() > deadline:
            print(f"{case}: skipped, {minutes:g} minutes are over")
            continue
        if case.dtype not in result["ceilings"]:
            cpu = jax.default_backend() == "cpu"
            result["ceilings"][case.dtype] = ceilings(case.dtype, cpu)._asdict()
        ceiling = Ceilings(**result["ceilings"][case.dtype])
        result["cases"].append(compare(case, ceiling))
        write_atomically(path, json.dumps(result, indent=1) + "\n")
        gc.collect()  # frees memory for the next case


def compare(case: Case, ceiling: Ceilings) -> dict[str, Any]:
    """Predicts the speed of a case, then measures all contenders in turns."""
    needed = work(case)
    predicted = ceiling.images_per_second(case, needed)
    print(f"{case}: the roofline is {predicted:,.1f} images/s", flush=True)
    ready: dict[str, Contender] = {}
    failed: dict[str, str] = {}
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        for name in case.contenders:
            try:
                ready[name] = CONTENDERS[name](case)
            except (ImportError, RuntimeError) as error:  # not installed; too large for the device
                failed[name] = str(error).partition("\n")[0]
                print(f"  {name:>14}: skipped, {failed[name]}", flush=True)
                continue
            if end := ready[name].end:
                stack.callback(end)
            rates[name] = []
            print(f"  {name:>14}: compiled in {ready[name].compile_seconds:.1f} s", flush=True)
        assert len({contender.parameters for contender in ready.values()}) < 2, "unequal networks"
        for _ in range(case.rounds):
            for name, contender in ready.items():
                if jax.default_backend() == "cpu":
                    contender.seconds()  # brings back memory that the machine returned to its host
                rates[name].append(1 / contender.seconds())
    for name in ready if case.rounds else ():
        print(f"  {name:>14}: {median(rates[name]):,.1f} images/s", flush=True)
    blocks = build(case.model).stages
    return {
        "case": case._asdict(),
        "auto": "scan" if uses_scan("auto", blocks) else "unroll",  # as in `resjax train`
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


PREAMBLE = """\
# Throughput

Written by `python benchmarks/throughput.py report` from the files in `benchmarks/results/`; the
script documents the measurements. Speeds are training images per second: the median and range over
rounds in which the contenders take turns. Ratios are medians of the ratios within rounds, because
other load on the machine affects all contenders of a round alike. It does not affect the ceilings
in the same way, so shares of the roofline are rough on a machine with other users.

On CPU each turn begins with a warm-up. A virtual machine may return memory that is free for two
seconds to its host, and on the one measured here the first access to returned pages of 2 MB takes
about twenty times as long. The contenders of commit 850e6dc shared one process, without huge pages
and warm-ups, and its runs include an evaluation.

- **roofline**: the highest speed that arithmetic (a) or memory traffic (m) allows, from counted
  FLOPs and bytes and from ceilings measured on the device. It is predicted before anything is
  measured. Bytes are counted as if no cache held an activation, so a CPU, whose caches hold some,
  can be faster.
- **step**: the bare training step, in the layout that `model.loop = "auto"` chooses on the device,
  and its share of the roofline.
- **one per dispatch**: the bare step with one dispatch per step. Everywhere else one dispatch runs
  many steps; `resjax train` ends a dispatch at `train.log_every` steps, and earlier if it is
  estimated to take more than four seconds. On CPU each dispatch allocates its memory anew, and
  the first access to each page takes time.
- **run**: the whole of `resjax train` except evaluation, the first dispatch and checkpoints, and
  its share of the step. The cost of a checkpoint is in [chaos.md](chaos.md).
- **PyTorch**: the same network and step, eager or compiled, whichever is faster, and the speed of
  resjax relative to it. It runs in a process of its own with the memory allocator's defaults;
  resjax asks Linux for pages of 2 MB, as the command `resjax train` does.

![Compile time against depth](throughput.svg)

## Forms of layers on CPU

The time of a layer in another form relative to the present one: `python benchmarks/convolutions.py`
on 2 cores of an AMD EPYC, jax 0.10.2 and 0.12.0.1, 2026-11-27, commit 021247a.

The present forms:

- **A 1x1 convolution is a matrix product.** As a convolution it takes 1.9 to 4.5 times as long,
  forward and both gradients.
- **Gradients of strided convolutions have no zeros.** With zeros between the pixels of the output's
  gradient, that of the kernel takes 2.7 to 3.4 times as long and that of the images 1.3 to 3.1.
- **A maximum over windows is one over columns and then rows.** Flax's takes 2.7 to 3.5 times as
  long, forward and gradient.

Forms that are not used:

- **The gradient of a 3x3 kernel** as nine products of shifted images: 0.9 with 32 channels, 1.5 to
  2.7 with 16, 64 and 256. As one product of unfolded patches: 1.5 to 3.5. As one product of images
  shifted by columns and output gradients shifted by rows: 0.6 to 0.7 with 32 channels, 1.2 to 2.0
  with others. For two columns at once: 0.55 with 32 channels, 1.1 to 1.35 with others, but 0.94
  with 32 channels on one thread.
- **Winograd's F(2x2, 3x3)** as 16 matrix products: 2.0 to 2.7 with 32 channels, 0.9 to 1.4 with 64,
  and with 256 0.95 (jax 0.10) and 0.65 (jax 0.12).
- **oneDNN**, an experimental option of XLA that jax 0.10 ignores: 0.96 to 1.14 for 3x3
  convolutions and 0.95 to 1.45 for the gradients of their kernels.
"""
SPEED = (
    *("network", "batch", "dtype", "roofline", "step", "of roofline"),
    *("one per dispatch", "of step", "run", "of step", "PyTorch", "step / PyTorch"),
)
COST = (
    *("network", "batch", "dtype", "compile s, scan", "compile s, unroll"),
    *("peak MiB, scan", "peak MiB, unroll", "peak MiB, PyTorch"),
)


def report(results: Path, docs: Path) -> None:
    """Writes throughput.md and throughput.svg to `docs` from the files in `results`."""
    files = [json.loads(path.read_text()) for path in sorted(results.glob("throughput-*.json"))]
    write_atomically(docs / "throughput.md", "\n".join([PREAMBLE, *map(section, files)]))
    write_atomically(docs / "throughput.svg", compile_times(files))


def section(file: dict[str, Any]) -> str:
    """Returns a result file as Markdown: provenance, ceilings, speeds and costs."""
    origin, ceilings = file["provenance"], file["ceilings"]
    paragraphs = [
        f"## {setup(origin)}",
        source(origin),
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


def case_of(record: dict[str, Any]) -> Case:
    fields = record["case"]
    return Case(**fields | {"contenders": tuple(fields["contenders"])})


def setup(origin: dict[str, Any]) -> str:
    """Returns machine and JAX release; releases differ more than machines do."""
    return f"{machine(origin)}, jax {'.'.join(origin['versions']['jax'].split('.')[:2])}"


def speed(record: dict[str, Any], ceiling: Ceilings) -> list[str]:
    """Returns the row of a case below `SPEED`."""
    case, needed = case_of(record), Work(**record["work"])
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

    def rate(values: Any) -> str:
        text = spread(values, digits=0 if np.median(values) > 100 else 1)
        return text if len(set(values)) > 1 else text.partition(" ")[0]

    cells = [
        *(case.model, str(case.batch), case.dtype, f"{rate(roofline)} ({bound})"),
        *(rate(step), f"{np.median(step / roofline):.0%}"),
        *(rate(single), f"{np.median(single / step):.0%}"),
        *(rate(run), f"{np.median(run / step):.0%}"),
        *(rate(torch), f"{np.median(step / torch):.2f}"),
    ]
    return ["" if cell.startswith("nan") else cell for cell in cells]


def cost(record: dict[str, Any]) -> list[str]:
    """Returns the row of a case below `COST`."""
    case, contenders = case_of(record), record["contenders"]

    def entry(name: str, key: str, unit: float) -> str:
        value = contenders.get(name, {}).get(key)
        return "" if value is None else f"{value / unit:,.{1 if unit == 1 else 0}f}"

    return [
        *(case.model, str(case.batch), case.dtype),
        *(entry(loop, "compile_seconds", 1) for loop in ("scan", "unroll")),
        *(entry(name, "peak_bytes", 2**20) for name in ("scan", "unroll", "torch")),
    ]


def compile_times(files: list[dict[str, Any]]) -> bytes:
    """Returns a figure as SVG: compile time of a step of CIFAR networks against their depth."""
    from resjax.analysis import figures as draw

    machines: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        machines.setdefault(setup(file["provenance"]), []).extend(file["cases"])
    every = [case_of(record) for cases in machines.values() for record in cases]
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
                if (case := case_of(record)).dtype == dtype and "cifar" in case.model
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
        # Without a date the same results yield the same bytes.
        drawn.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()


def main() -> None:
    parser, measuring = command_line(__doc__)
    measuring.add_argument("--minutes", type=float, default=30, help="start no case after these")
    measuring.add_argument(
        "--only", type=regular_expression, default="", help="regular expression that selects cases"
    )
    measuring.add_argument("--out", type=Path, help="the result file (default: by device)")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report(RESULTS, DOCS)
        return
    restart_with_huge_pages()
    plan = PLANS["cpu" if jax.default_backend() == "cpu" else "gpu"]
    if not (chosen := [case for case in plan if arguments.only.search(str(case))]):
        parser.error(
            f"--only={arguments.only.pattern} matches none of: {'; '.join(map(str, plan))}"
        )
    measure(chosen, arguments.out or results_file("throughput"), arguments.minutes)


if __name__ == "__main__":
    main()
