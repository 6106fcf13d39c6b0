"""Compiles training and evaluation for TPUs and GPUs that are not here, and counts their kernels.

    python benchmarks/accelerators.py measure --topology tpu:v5e:2x2
    python benchmarks/accelerators.py report

`measure` compiles the programs that `resjax train` would run, for a topology that its compiler
describes without the hardware, and counts their kernels, memory traffic and collectives; it runs
none of them. It needs the extra `tpu` or `cuda`; `make accelerators` installs it into an
environment of its own. Each case is added to benchmarks/results/ as soon as it is compiled;
`report` writes docs/accelerators.md from all results. `--programs DIR` stores the text of each
compiled program in DIR; a program that is there already is counted again without compilation.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from reporting import (
    DOCS,
    RESULTS,
    ROOT,
    command_line,
    provenance,
    regular_expression,
    source,
    table,
)

from resjax.config import Config, load, override, resolve
from resjax.disk import write_atomically
from resjax.errors import UserError
from resjax.train.plan import plan
from resjax.train.trainer import Executable, Trainer
from resjax.xla.program import KINDS, Kernel, Program
from resjax.xla.target import compiling_for
from resjax.xla.topologies import CHIPS, Chip, describe

MIB = 2**20
PROGRAMS = ("train", "evaluation")


class Case(NamedTuple):
    """A config whose programs are compiled.

    Attributes:
      name: the first cell of its rows.
      config: a file in configs/, perhaps with a variant.
      overrides: values of config fields.
      per_device: images per device; 0 leaves the batch of the config, which is over all devices.
    """

    name: str
    config: str
    overrides: dict[str, Any]
    per_device: int = 0

    def resolved(self, devices: int) -> Config:
        made = resolve(override(load(str(ROOT / "configs" / self.config)), self.overrides))
        if not self.per_device:
            return made
        return replace(made, data=replace(made.data, batch_size=self.per_device * devices))


def cifar(depth: int, suffix: str = "", **overrides: Any) -> Case:
    fields = {"model.depth": depth, "data.name": "synthetic_cifar"}
    return Case(f"ResNet-{depth}{suffix}", "cifar10.py", fields | overrides)


BF16 = {"model.dtype": "bfloat16"}
SCAN = {"model.loop": "scan"}
STREAM = {"data.name": "synthetic_imagenet", "data.feed": "stream", "data.workers": 0}
CASES = (
    Case("quickstart", "quickstart.py", {}),
    cifar(20),
    cifar(20, ", bfloat16", **BF16),
    cifar(20, ", sharded", **{"parallel.shard_parameters": 4}),
    cifar(20, ", pmap", **{"parallel.backend": "pmap"}),
    cifar(20, ", scanned", **SCAN),
    cifar(56),
    cifar(56, ", scanned", **SCAN),
    cifar(110),
    cifar(110, ", scanned", **SCAN),
    cifar(1202),
    Case("ResNet-50, bfloat16", "imagenet.py:v1.5", STREAM | BF16, per_device=256),
)


def measure(cases: Iterable[Case], topology: str, path: Path, programs: Path | None = None) -> None:
    """Compiles and counts the cases, and adds each to the result file as soon as it is done.

    Args:
      cases: the cases to compile.
      topology: a name that `resjax train --topology` accepts.
      path: the result file; its other cases are kept.
      programs: a folder for the texts of compiled programs.

    Raises:
      UserError: there is no such topology, or its compiler is not installed.
    """
    target = describe(topology)
    chip = CHIPS[target.devices[0].device_kind]
    result: dict[str, Any] = {"topology": topology, "cases": {}}
    if path.exists():
        result = json.loads(path.read_text())
    result |= {"chip": chip._asdict(), "devices": len(target.devices), "memory": target.memory}
    for case in cases:
        config = case.resolved(len(target.devices))
        if len(target.devices) % config.parallel.shard_parameters:
            print(f"{case.name}: skipped, {topology} has {len(target.devices)} devices", flush=True)
            continue
        with compiling_for(target):
            record = compile_case(case, topology, config, chip, programs)
        result["cases"][case.name] = record
        order = [each.name for each in CASES]
        known = sorted(result["cases"], key=lambda name: order.index(name) if name in order else -1)
        result["cases"] = {name: result["cases"][name] for name in known}
        write_atomically(path, json.dumps(result, indent=1) + "\n")
        seconds = record["train"]["predicted_seconds"]
        print(f"{case.name}: predicted {1e3 * seconds:.3f} ms per step", flush=True)


def compile_case(
    case: Case, topology: str, config: Config, chip: Chip, programs: Path | None
) -> dict[str, Any]:
    """Returns memory, compile times and counts of the programs of a case."""
    trainer = Trainer(config)
    state, dispatch = trainer.init(config.seed), max(plan(trainer, 0))
    stem = file_name(f"{topology} {case.name}")
    file = programs / f"{stem}.json" if programs else None
    if file and file.exists():
        stored = json.loads(file.read_text())
        texts = {name: file.with_name(f"{stem}-{name}.hlo").read_text() for name in PROGRAMS}
    else:
        command = {"command": f"accelerators.py measure --topology {topology}"}
        origin = provenance("libtpu", "jax-cuda13-plugin") | command
        executables = {
            "train": trainer.compile_dispatch(state, dispatch),
            "evaluation": trainer.compile_evaluation(state),
        }
        stored = {
            "provenance": origin,
            "programs": {name: costs(each) for name, each in executables.items()},
        }
        texts = {name: each.call.as_text() for name, each in executables.items()}
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                write_atomically(file.with_name(f"{stem}-{name}.hlo"), text)
            write_atomically(file, json.dumps(stored, indent=1))
    steps = 1 if trainer.source.streamed else dispatch.steps
    means = jax.tree.leaves_with_path(trainer.shapes.get("batch_stats", {}))
    channels = [leaf for path, leaf in means if path[-1].key == "mean"]
    flops = trainer.step_flops(state, dispatch.phase)
    return {
        "provenance": stored["provenance"],
        "config": {"file": case.config, "overrides": case.overrides},
        "batch": config.data.batch_size,
        "dtype": config.model.dtype,
        "sharded": config.parallel.shard_parameters,
        "steps": steps,
        "flops": flops,
        "norms": sum(leaf.size // leaf.shape[-1] for leaf in channels),
        "norm_channels": sum(leaf.size for leaf in channels),
        **{
            name: stored["programs"][name]
            | counts(Program(text), steps if name == "train" else 1, chip, config.model.dtype)
            for name, text in texts.items()
        },
    }


def file_name(text: str) -> str:
    return re.sub(r"\W+", "-", text)


def costs(made: Executable) -> dict[str, Any]:
    """Returns compile time, memory and XLA's own cost analysis of a program."""
    memory = made.call.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    analysis = made.call.cost_analysis() or {}
    return {
        "compile_seconds": made.compile_seconds,
        "peak_bytes": made.peak_bytes,
        "memory": {name: getattr(memory, f"{name}_size_in_bytes") for name in names},
        "cost": {key: analysis[key] for key in ("flops", "bytes accessed") if key in analysis},
    }


def counts(program: Program, steps: int, chip: Chip, dtype: str) -> dict[str, Any]:
    """Returns counts of a program, per step and device."""
    kernels = program.kernels

    def per_step(values: Iterable[float]) -> float:
        return round(sum(values) / steps, 3)

    types = defaultdict[str, float](float)
    for kernel in kernels:
        if kernel.kind == "convolution":
            types[" x ".join(kernel.dtypes)] += kernel.times / steps
    return {
        "kernels": {kind: per_step(k.times for k in kernels if k.kind == kind) for kind in KINDS},
        "cycles": {
            kind: per_step(k.times * k.cycles for k in kernels if k.kind == kind) for kind in KINDS
        },
        "device_flops": per_step(k.times * k.flops for k in kernels),
        "traffic": per_step(k.times * k.traffic for k in kernels),
        "collectives": collectives(kernels, steps),
        "convolutions": dict(types),
        "costly": costliest(kernels, steps, chip, dtype),
        "predicted_seconds": program.seconds(chip, dtype) / steps,
    }


def collectives(kernels: Sequence[Kernel], steps: int) -> dict[str, dict[str, float]]:
    """Returns number and bytes of collectives per step, by purpose."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"number": 0.0, "bytes": 0.0})
    for kernel in kernels:
        if kernel.kind == "collective":
            entry = found[purpose(kernel)]
            entry["number"] += kernel.times / steps
            entry["bytes"] += kernel.times * kernel.sent / steps
    return {name: {k: round(v, 3) for k, v in entry.items()} for name, entry in found.items()}


def purpose(kernel: Kernel) -> str:
    if "BatchNorm" in kernel.source:
        return "BN, backward" if "transpose(" in kernel.source else "BN, forward"
    return re.sub(r"(-start)?(\.\d+)*$", "", kernel.name)


def costliest(
    kernels: Sequence[Kernel], steps: int, chip: Chip, dtype: str
) -> list[dict[str, Any]]:
    """Returns the ten operations of the traced program with the longest predicted time."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for kernel in kernels:
        layer = re.sub(r"(stage|block|weights|Conv_|BatchNorm_)\d*", r"\1", kernel.source)
        name = re.sub(r"^jit\(\w+\)/(while/body/(closed_call|eval_jaxpr)/)?", "", layer)
        entry = seconds[kernel.kind, name]
        entry[0] += kernel.times * kernel.seconds(chip, dtype) / steps
        entry[1] += kernel.times / steps
    ranked = sorted(seconds.items(), key=lambda item: -item[1][0])[:10]
    return [
        {"kind": kind, "source": name, "seconds": time, "number": round(number, 2)}
        for (kind, name), (time, number) in ranked
    ]


PREAMBLE = """\
# Accelerators

Written by `python benchmarks/accelerators.py report` from the files in `benchmarks/results/`. The
compilers of TPUs and GPUs run without the hardware; they have compiled the programs that
`resjax train` would run on it. **Nothing on this page was measured on an accelerator**: memory,
kernels, FLOPs, bytes and collectives are read from the compiled programs, and times are
predictions. `make accelerators` compiles the programs again for TPUs, and
`make accelerators EXTRAS=cuda TOPOLOGIES=gpu:h100` for a GPU.

The columns of the tables are:

- **MiB**: the memory of one device in training and in evaluation, with data and parameters.
- **compile s**: the compile times of training and evaluation on the machine that the section names,
  which did other work at the same time.
- **traffic**: the bytes per step from and to a device's main memory, with the padding of a TPU's
  tiles.
- **kernels**: the kernels per step that a device runs one after the other. Prefetches into a TPU's
  fast memory and computations of single numbers run beside them and are left out.
- **at least**: the time of a step's arithmetic at the vendor's peak rate.
- **predicted**: the predicted time of a step. A kernel takes the longest of four times: its
  arithmetic at the peak rate, its traffic at full bandwidth, a launch (2.5 us on a GPU), and the
  cycles that the compiler of TPUs expects. A collective also takes a latency of 5 us (TPU) or 10 us
  (GPU) and the time of sending its bytes at the speed of the links. Launch and latency are
  assumptions.

The ResNets are those of `configs/cifar10.py` on noise in the shape of CIFAR-10, with a batch of 128
over all devices; ResNet-50 is v1.5 of `configs/imagenet.py`, with 256 images per device.

## Findings

The programs of 2026-11-27 (jax 0.10.2; TPU: libtpu 0.0.42.1) show:

- **bfloat16**: with `model.dtype=bfloat16`, no convolution of a network has an operand in float32,
  on TPU and GPU, in training and in evaluation. The two of ResNet-20 on TPUs that have one are the
  products of random crops.
- **The number of kernels limits small networks on a GPU.** At commit 96ed236 a step of ResNet-20 on
  an H100 had 361 kernels, whose launches take 0.90 of the 1.10 ms that are predicted. It has 233
  since, and 0.77 ms are predicted: the arrays of one axis are one array between steps, so one
  kernel updates them all (about 55 fewer), BN sums once per pass (about 45 fewer), it subtracts its
  running mean, and not a pixel of the batch, before it sums (10 fewer), filters of one shape are
  updated by one kernel (14 fewer), and one kernel stores the metrics of a step (3 fewer). Tests
  compare these with the earlier forms on CPU: those of BN are equal but for rounding, the others to
  the bit. ResNet-110 has 1,264 kernels instead of 1,959. Of the 233, 59 are convolutions and matrix
  products, 76 the two-stage sums of BN, 38 its elementwise passes, 19 its inverse deviations, and 7
  the updates of filters. Without gain were: filters of one shape as one array between steps, which
  add as many copies as they save updates; momenta as one array, which adds copies of all filters;
  inverse deviations computed where they are used; and both sums of BN as one reduction of two
  arrays, which XLA gives more traffic. Batches that are drawn and augmented for all steps of a
  dispatch at once save 7 kernels and 2 % of the predicted time, but take 158 MB more memory, and
  8 % more time on v5p.
- **jax 0.12 makes the same programs**: with jax 0.12.0.1 (Python 3.13, commit bfa348c) ResNet-20,
  56 and 110 have 232, 643 and 1,263 kernels on an H100, and 0.76, 2.12 and 4.18 ms are predicted,
  107.7 for ResNet-1202 and 31.8 for ResNet-50. On v5p 1.04 ms are predicted for ResNet-20 (libtpu
  0.0.50.1).
- **Scanned networks are slower**: on a GPU the loop copies parameters in and gradients out, and a
  step of ResNet-20, 56 or 110 has twice as many kernels and takes twice as long as unrolled. So
  `model.loop = "auto"` unrolls up to 100 blocks. ResNet-110, the deepest of these, took 3.2 times
  as long to compile as scanned for the H100, 1.2 times for v5e, and 0.8 times for v5p. On TPUs,
  too, scanned networks of 20, 56 and 110 layers are predicted to take longer than unrolled ones:
  1.2, 1.9 and 2.1 times as long on v5e, and 1.5, 1.8 and 1.9 times on v5p.
- **bfloat16 does not help ResNet-20 on v5p**: 1.11 ms are predicted instead of 1.04, although the
  traffic is half: convolutions take 6 % fewer cycles, but the other kernels 35 % more, since
  conversions in the backward pass of BN are kernels of their own.
- **BN over devices** takes two collectives per layer, one per pass, as on paper. At commit 96ed236
  it took a third, which sent the pixel that BN subtracts from its device to the others: 19 of 60
  collectives of ResNet-20, and about 95 of the 2,210 us that were predicted for a step on v5e.
- **Random crops** are products with matrices of zeros and ones on a TPU. At commit 96ed236 the
  windows were cut image by image, in a loop of small kernels, which took 160 of the 2,210 us. With
  both changes a step of ResNet-20 on v5e is predicted to take 1.72 ms, of ResNet-56 3.93 instead of
  5.54, and of ResNet-110 7.68 instead of 10.9.
- **Sharded parameters** are gathered before each forward pass. At commit 96ed236 the compiler
  sharded activations by channels and rows instead, so that BN alone sent 24 MB, and a step of
  ResNet-20 was predicted to take 7.61 ms on v5e, 3.4 times as long as with replicated parameters.
  It is 1.61 ms now. The scales and biases of a BN layer travel with its sums, so its collectives
  are listed among the others.
- **Batches** are gathered by a sum of all their pixels over devices as 32-bit numbers: 1.57 MB for
  393 kB of pixels per step of ResNet-20, which is more than its gradients (1.08 MB).
"""
REQUIREMENTS = (
    *("network", "batch", "MiB, training", "MiB, evaluation", "compile s", "GFLOP per step"),
    *("traffic, MB", "kernels", "at least, ms", "predicted, ms", "images/s, predicted"),
)
KERNELS = ("network", *KINDS)
COLLECTIVES = (
    *("network", "BN layers", "BN, forward", "BN, backward", "BN on paper", "BN, kB"),
    *("on paper, kB", "others", "others, kB"),
)
COSTS = ("operation of the traced program", "kind", "number", "predicted, us")


def report(results: Path, docs: Path) -> None:
    """Writes accelerators.md to `docs` from the files in `results`."""
    files = [json.loads(path.read_text()) for path in sorted(results.glob("accelerators-*.json"))]
    write_atomically(docs / "accelerators.md", "\n".join([PREAMBLE, *map(section, files)]))


def section(file: dict[str, Any]) -> str:
    """Returns a result file as Markdown."""
    cases, chip = file["cases"], file["chip"]
    lacking = [case.name for case in CASES if case.name not in cases]
    if file["devices"] == 1:
        lacking = [name for name in lacking if "sharded" not in name]
    origins = [record["provenance"] for record in cases.values()]
    first = min(origins, key=lambda origin: origin["start"])
    paragraphs = [
        f"## {file['devices']} x {chip['kind']} (`{file['topology']}`)",
        f"Compiled on {first['cpu']}, {first['cores']} cores: {source(first)}"
        + "".join(
            f" {name} is of commit {origin['commit'][:7]}{' and changes' * origin['dirty']}."
            for name, origin in zip(cases, origins, strict=True)
            if origin["commit"] != first["commit"]
        )
        + f" Not compiled: {'; '.join(lacking)}." * bool(lacking),
        f"Peak {chip['flops']['bfloat16'] / 1e12:,.0f} TFLOP/s in bfloat16 and "
        f"{chip['flops']['float32'] / 1e12:,.0f} for float32, {chip['bandwidth'] / 1e9:,.0f} GB/s, "
        f"{file['memory'] / 2**30:.2f} GiB per device.",
        table(
            REQUIREMENTS, [requirement_row(name, record, file) for name, record in cases.items()]
        ),
        "Kernels per training step by kind, and the operands of the convolutions:",
        table(
            (*KERNELS, "convolutions"), [kernel_row(name, record) for name, record in cases.items()]
        ),
    ]
    if file["devices"] > 1:
        paragraphs += [
            "Collectives per training step. On paper BN needs two per layer, each of two numbers "
            "per channel: sums in the forward pass, and sums of gradients in the backward pass.",
            table(COLLECTIVES, [collective_row(name, record) for name, record in cases.items()]),
        ]
    name = next((name for name in ("ResNet-20", *cases) if name in cases), None)
    if name is not None:
        paragraphs += [
            f"The operations with the longest predicted time in a step of {name}:",
            table(COSTS, map(cost_row, cases[name]["train"]["costly"])),
        ]
    return "\n\n".join(paragraphs) + "\n"


def requirement_row(name: str, record: dict[str, Any], file: dict[str, Any]) -> list[str]:
    """Returns the row of a case below `REQUIREMENTS`."""
    train, evaluation, chip = record["train"], record["evaluation"], file["chip"]
    least = record["flops"] / file["devices"] / chip["flops"][record["dtype"]]
    apart = ("prefetch", "scalar")
    kernels = sum(number for kind, number in train["kernels"].items() if kind not in apart)
    return [
        *(name, f"{record['batch']:,}"),
        *(f"{each['peak_bytes'] / MIB:,.0f}" for each in (train, evaluation)),
        " + ".join(f"{each['compile_seconds']:.0f}" for each in (train, evaluation)),
        *(f"{record['flops'] / 1e9:,.3g}", f"{train['traffic'] / 1e6:,.1f}", f"{kernels:,.0f}"),
        *(f"{1e3 * least:.3g}", f"{1e3 * train['predicted_seconds']:.3g}"),
        f"{record['batch'] / train['predicted_seconds']:,.0f}",
    ]


def kernel_row(name: str, record: dict[str, Any]) -> list[str]:
    """Returns the row of a case below `KERNELS`, and the types of its convolutions."""
    train = record["train"]
    numbers = (f"{train['kernels'][kind]:,.0f}" for kind in KINDS)
    types = ", ".join(f"{n:.0f} {name}" for name, n in sorted(train["convolutions"].items()))
    return [name, *numbers, types]


def collective_row(name: str, record: dict[str, Any]) -> list[str]:
    """Returns the row of a case below `COLLECTIVES`."""
    found, none = dict(record["train"]["collectives"]), {"number": 0, "bytes": 0}
    forward, backward = (found.pop(f"BN, {way}", none) for way in ("forward", "backward"))
    paper = 2 * 2 * 4 * record["norm_channels"]
    return [
        *(name, f"{record['norms']}", f"{forward['number']:.0f}", f"{backward['number']:.0f}"),
        f"{2 * record['norms']}",
        f"{(forward['bytes'] + backward['bytes']) / 1e3:,.1f}",
        f"{paper / 1e3:,.1f}",
        ", ".join(f"{entry['number']:.0f} {kind}" for kind, entry in found.items()),
        f"{sum(entry['bytes'] for entry in found.values()) / 1e3:,.0f}",
    ]


def cost_row(entry: dict[str, Any]) -> list[str]:
    """Returns a row below `COSTS`."""
    name = f"`{entry['source']}`" if entry["source"] else "(without a name)"
    return [name, entry["kind"], f"{entry['number']:g}", f"{1e6 * entry['seconds']:.1f}"]


def main() -> None:
    parser, measuring = command_line(__doc__)
    add = measuring.add_argument
    add("--topology", required=True, help="such as tpu:v5e:2x2 or gpu:h100")
    add("--only", type=regular_expression, default="", help="regular expression that selects cases")
    add("--programs", type=Path, metavar="DIR", help="store programs in DIR, and reuse those there")
    add("--out", type=Path, help="the result file (default: by topology)")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report(RESULTS, DOCS)
        return
    if not (chosen := [case for case in CASES if arguments.only.search(case.name)]):
        parser.error(
            f"--only={arguments.only.pattern} matches none of: {'; '.join(c.name for c in CASES)}"
        )
    topology = arguments.topology
    file = RESULTS / f"accelerators-{file_name(topology)}.json"
    try:
        measure(chosen, topology, arguments.out or file, arguments.programs)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
