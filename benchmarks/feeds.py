"""Feeds: is decoding as fast as in PyTorch, what do resident datasets gain, is memory constant?

    python benchmarks/feeds.py measure
    python benchmarks/feeds.py report

`measure` writes each result to benchmarks/results/ at once; `report` writes docs/feeds.md from all
results. The measurements are

- decoding: JPEGs of 500 x 375 pixels, a typical size in ImageNet, through a random resized crop to
  224 pixels. The contenders are `resjax.data.stream`, the same with the worker processes of Grain
  instead of the standard library's, and torchvision's RandomResizedCrop on Pillow images in
  PyTorch's DataLoader (`feeds_torch.py`). They take turns, and all return bytes.
- residence: batches of a small TFDS dataset. A compiled scan samples, gathers and normalizes them
  on the device; the other contenders are Grain over TFDS's data source, and our stream.
- memory: memory of the stream and its workers over 20,000 images.

Photographs are synthetic: smooth shapes of three sizes, and noise. Packages that are not installed
are skipped with a message.
"""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from reporting import DOCS, RESULTS, command_line, machine, provenance, ratio, source, spread, table

from resjax.data.placement import View, random_resized
from resjax.data.stream import SHARED_MEMORY, BatchMaker, BatchRequest, stream
from resjax.data.user_data import FileExamples
from resjax.disk import write_atomically

# Worker processes import this script, so JAX is not imported at the top.

SIZE, BATCH = 224, 64
CROP = View(random_resized, SIZE)


class Plan(NamedTuple):
    """The amount of measurement."""

    photos: int = 256  # files
    repeats: int = 8  # of each file in the dataset, because Grain shuffles small datasets slowly
    workers: tuple[int, ...] = (0, 1, 2)
    batches: int = 16  # per round
    rounds: int = 3  # in each of which every contender is measured once
    memory_images: int = 20_000
    samples: int = 40  # of the memory in use
    resident: str = "fashion_mnist"
    resident_steps: int = 500


def photo(generator: np.random.Generator, width: int = 500, height: int = 375) -> Any:
    """Returns an image that compresses like a photograph, to about 60 kB at quality 90."""
    from PIL import Image

    pixels = 128 + generator.normal(scale=6, size=(height, width, 3))
    for columns, contrast in ((4, 60), (16, 30), (64, 15)):
        rows = columns * height // width
        for channel in range(3):
            shapes = generator.normal(scale=contrast, size=(rows, columns)).astype(np.float32)
            smooth = Image.fromarray(shapes).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(smooth)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def photos(folder: Path, plan: Plan) -> FileExamples:
    generator = np.random.default_rng(0)
    names = [f"{number:04}.jpg" for number in range(plan.photos)]
    for name in names:
        photo(generator).save(folder / name, quality=90)
    return FileExamples(folder, names * plan.repeats, range(plan.photos * plan.repeats))


def rate(batches: Iterator[Any], workers: int, count: int) -> float:
    """Returns images per second, after skipping the batches that were made in advance."""
    for _ in range(2 * workers + 1):
        next(batches)
    start = time.monotonic()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.monotonic() - start)


def order(examples: Any) -> Any:
    import jax

    from resjax.data.ordering import EpochOrder

    return EpochOrder(jax.random.key(0), len(examples))


def ours(examples: FileExamples, workers: int, batches: int) -> float:
    with stream(
        examples, order(examples), batch_size=BATCH, seed=0, crop=CROP, workers=workers
    ) as feed:
        return rate(feed, workers, batches)


def in_grain(examples: FileExamples, workers: int, batches: int) -> float:
    """Measures our order and crop with Grain's worker processes."""
    import grain
    from absl import flags

    flags.FLAGS(["feeds"])  # Grain's workers require parsed flags
    maker = BatchMaker(examples, CROP, 3, 0, "error")
    row = grain.MapDataset.range(len(examples)).shuffle(seed=0).repeat()
    made = row.map_with_index(partial(one_image, maker)).batch(BATCH)
    serial = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
    feed = iter(made.to_iter_dataset(serial).mp_prefetch(options))
    try:
        return rate(feed, workers, batches)
    finally:
        feed.close()


def one_image(maker: BatchMaker, position: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    batch = maker(BatchRequest(position, np.array([index]), 1))
    return batch.images[0], batch.targets["label"][0]


def in_torch(examples: FileExamples, workers: int, batches: int) -> float:
    import feeds_torch

    paths = [examples.root / file for file in examples.files]
    # An epoch has as many images as are used, because PyTorch's workers may abort within an epoch.
    images = (2 * workers + 1 + batches) * BATCH
    epoch = list(itertools.islice(itertools.cycle(paths), images))
    return rate(iter(feeds_torch.loader(epoch, SIZE, BATCH, workers)), workers, batches)


DECODERS: dict[str, Callable[[FileExamples, int, int], float]] = {
    "resjax": ours,
    "Grain's processes": in_grain,
    "PyTorch": in_torch,
}


def decoding(plan: Plan) -> dict[str, Any]:
    """Measures images per second of each decoder by the number of workers."""
    rates: dict[str, dict[int, list[float]]] = {name: {} for name in DECODERS}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        examples = photos(Path(folder), plan)
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / plan.photos
        for _, workers, name in itertools.product(range(plan.rounds), plan.workers, DECODERS):
            try:
                measured = DECODERS[name](examples, workers, plan.batches)
            except ImportError as error:
                failed[name] = str(error)
                continue
            rates[name].setdefault(workers, []).append(measured)
            print(f"decoding, {workers} workers, {name}: {measured:,.0f} images/s", flush=True)
    return {"bytes_per_image": size, "images_per_second": rates, "failed": failed}


def residence(plan: Plan) -> dict[str, Any]:
    """Measures images per second of a small dataset for each feed."""
    from resjax.data.datasets import open_dataset

    feeds: dict[str, Callable[[], float]] = {
        "device-resident": on_device(plan),
        "Grain over tfds.data_source": over_data_source(plan, 0),
        "the same, 16 threads": over_data_source(plan, 16),  # Grain's default
        "resjax's stream": partial(streamed, open_dataset(plan.resident).train, plan),
    }
    rates: dict[str, list[float]] = {name: [] for name in feeds}
    for _, (name, feed) in itertools.product(range(plan.rounds), feeds.items()):
        rates[name].append(feed())
        print(f"residence, {name}: {rates[name][-1]:,.0f} images/s", flush=True)
    return {"dataset": plan.resident, "images_per_second": rates}


def on_device(plan: Plan) -> Callable[[], float]:
    import jax
    import jax.numpy as jnp

    from resjax.data.datasets import load
    from resjax.data.normalization import compute_statistics, normalize
    from resjax.data.ordering import batch_indices

    split = load(plan.resident).train
    of_channels = compute_statistics(split.images, "channel")
    images = jnp.asarray(split.images)
    steps = plan.resident_steps

    @jax.jit
    def run(images: Any, first_step: Any) -> Any:
        def step(_: Any, chosen: Any) -> Any:
            # The batch is the carry of the scan, so the compiler cannot skip it.
            return normalize(images[chosen], of_channels), None

        indices = batch_indices(jax.random.key(0), first_step, steps, BATCH, len(images))
        return jax.lax.scan(step, jnp.zeros((BATCH, *images.shape[1:])), indices)[0]

    run(images, 0).block_until_ready()

    def measured() -> float:
        start = time.monotonic()
        run(images, steps).block_until_ready()
        return steps * BATCH / (time.monotonic() - start)

    return measured


def over_data_source(plan: Plan, threads: int) -> Callable[[], float]:
    import grain
    import tensorflow_datasets as tfds

    source = tfds.data_source(plan.resident, split="train")
    batches = grain.MapDataset.source(source).shuffle(seed=0).repeat().batch(BATCH)

    def measured() -> float:
        feed = iter(batches.to_iter_dataset(grain.ReadOptions(threads, threads)))
        try:
            return rate(feed, threads // 2, plan.batches)
        finally:
            feed.close()

    return measured


def streamed(examples: Any, plan: Plan) -> float:
    with stream(examples, order(examples), batch_size=BATCH, seed=0, channels=1) as feed:
        return rate(feed, 0, plan.batches)


def memory(plan: Plan) -> dict[str, Any]:
    """Samples the memory of the stream's processes from the first batch to the last."""
    workers = max(plan.workers)
    batches = plan.memory_images // BATCH
    sampled = {batches * sample // (plan.samples - 1) for sample in range(plan.samples)}
    mebibytes = []
    with tempfile.TemporaryDirectory() as folder:
        examples = photos(Path(folder), plan)
        with stream(
            examples, order(examples), batch_size=BATCH, seed=0, crop=CROP, workers=workers
        ) as feed:
            for number, _ in enumerate(itertools.islice(feed, batches + 1)):
                if number in sampled:
                    mebibytes.append(used_mebibytes())
    print(f"memory: {mebibytes[0]:,.0f} to {mebibytes[-1]:,.0f} MiB, peak {max(mebibytes):,.0f}")
    return {"images": batches * BATCH, "workers": workers, "mebibytes": mebibytes}


def used_mebibytes() -> float:
    """Returns the memory of this process, its workers and their batches in shared memory.

    On Linux a page that several processes share counts once (PSS).
    """
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    shared = shutil.disk_usage(SHARED_MEMORY).used if SHARED_MEMORY.is_dir() else 0
    return sum(map(_kibibytes, processes)) / 2**10 + shared / 2**20


def _kibibytes(process: int | None) -> int:
    """Returns the memory of a process: its PSS, or its RSS where the system has no /proc."""
    smaps = Path(f"/proc/{process}/smaps_rollup")
    if smaps.exists():
        found = re.search(r"Pss: *(\d+)", smaps.read_text())
        return int(found[1]) if found else 0
    command = ["ps", "-o", "rss=", "-p", str(process)]
    return int(subprocess.run(command, capture_output=True, text=True).stdout or 0)


PARTS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "memory": memory,  # first, while nothing else has been imported
    "decoding": decoding,
    "residence": residence,
}


def measure(plan: Plan, path: Path, parts: Iterable[str] = PARTS) -> None:
    """Measures each of `parts` and rewrites `path` after each; other parts are preserved."""
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in parts:
        found = PARTS[part](plan)
        result[part] = {
            "provenance": provenance("pillow", "grain", "torchvision"),
            "plan": plan._asdict(),
            **found,
        }
        write_atomically(path, json.dumps(result, indent=1) + "\n")


PREAMBLE = f"""\
# Feeds

Written by `python benchmarks/feeds.py report` from the files in `benchmarks/results/`; the script
documents the measurements. Speeds are images per second: the median and range over rounds in which
the contenders take turns. Ratios are medians of the ratios within rounds.

Predicted before anything was measured:

- **decoding**: Pillow needs 0.80 ms to decode a photo and 0.70 ms to resample the crop, in every
  contender. torchvision adds a copy of the crop and random numbers in tensors, together 0.2 ms, so
  resjax should be 1.1 times as fast. Two workers should process nearly twice as many images as one,
  because the main process has little to do.
- **residence**: TFDS's data source reads 1,850 to 3,900 images per second, and a gather on two CPU
  cores 230,000 or more, about 100 times as many.
- **memory**: constant. Two workers use 70 MiB each, the main process, which imports Grain, uses
  250 MiB, and {2 * 2} batches made in advance use {BATCH * SIZE**2 * 3 / 2**20:.0f} MiB each.
"""


def report(results: Path, docs: Path) -> None:
    """Writes feeds.md to `docs` from the files in `results`."""
    files = [json.loads(path.read_text()) for path in sorted(results.glob("feeds-*.json"))]
    write_atomically(docs / "feeds.md", "\n".join([PREAMBLE, *map(section, files)]))


def section(file: dict[str, Any]) -> str:
    """Returns a result file as Markdown."""
    shown = {"decoding": shown_decoding, "residence": shown_residence, "memory": shown_memory}
    paragraphs = [f"## {machine(next(iter(file.values()))['provenance'])}"]
    for part, show in shown.items():
        if part in file:
            paragraphs += [
                f"### {part.capitalize()}",
                *show(file[part]),
                source(file[part]["provenance"]),
            ]
    return "\n\n".join(paragraphs) + "\n"


def shown_decoding(part: dict[str, Any]) -> Iterator[str]:
    rates, workers = part["images_per_second"], [str(count) for count in part["plan"]["workers"]]
    names = [name for name in rates if rates[name]]
    yield table(
        ["workers", *names, *(f"resjax / {name}" for name in names[1:])],
        [
            [
                count,
                *(spread(rates[name][count]) for name in names),
                *(ratio(rates["resjax"][count], rates[name][count]) for name in names[1:]),
            ]
            for count in workers
        ],
    )
    size = part["bytes_per_image"] / 1000
    yield f"Images per second, of {size:.0f} kB each. With 0 workers a thread decodes."
    if {"1", "2"} <= set(workers):
        gains = (f"{name} {ratio(rates[name]['2'], rates[name]['1'])}" for name in names)
        yield f"Speed of two workers relative to one: {', '.join(gains)}."
    yield from (f"No {name}: {why}." for name, why in part["failed"].items())


def shown_residence(part: dict[str, Any]) -> Iterator[str]:
    rates = part["images_per_second"]
    resident = rates["device-resident"]
    rows = [[name, spread(found), ratio(resident, found)] for name, found in rates.items()]
    yield table([part["dataset"], "images per second", "device-resident / this"], rows)


def shown_memory(part: dict[str, Any]) -> Iterator[str]:
    used = part["mebibytes"]
    half = len(used) // 2
    yield (
        f"{part['images']:,} images, {part['workers']} workers, {len(used)} samples: the first "
        f"{used[0]:,.0f} MiB, the last {used[-1]:,.0f}, the peak {max(used):,.0f}; median of the "
        f"first half {median(used[:half]):,.0f}, of the second {median(used[half:]):,.0f}."
    )


def main() -> None:
    parser, measuring = command_line(__doc__)
    measuring.add_argument("--only", choices=PARTS, help="the part to measure")
    measuring.add_argument("--out", type=Path, default=RESULTS / "feeds-cpu.json")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report(RESULTS, DOCS)
    else:
        measure(Plan(), arguments.out, [arguments.only] if arguments.only else PARTS)


if __name__ == "__main__":
    main()
