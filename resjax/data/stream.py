"""Batches of large datasets: read, decoded and cropped on the host by worker processes.

A batch is a pure function of the seed and the step, whatever the number of workers. So there is no
state to save, and a run that resumes at any step continues with the same batches.

The processes are the standard library's. Grain's (0.2.18) wait forever if one of them hangs, in
`next` and in `close`; outlive a main process that is killed; and import JAX, 190 MB each. These
import NumPy and Pillow and end with the main process. A worker that dies is replaced; one that
hangs, or dies again, is an error.
"""

import itertools
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from jaxtyping import Float32, Int, UInt8

from resjax.data.datasets import OnBadImage
from resjax.data.decoding import as_image, decode, decoding, open_image
from resjax.data.examples import (
    BadImageError,
    DataError,
    Example,
    Examples,
    Targets,
    stack_targets,
)
from resjax.data.placement import View
from resjax.machine import safe_path
from resjax.terminal import group_signals_blocked

if TYPE_CHECKING:
    from PIL.Image import Image

Crop = Callable[["Image", np.random.Generator], UInt8[np.ndarray, "..."]]
Order = Callable[[int, int], Int[np.ndarray, "count"]]  # first position, count -> indices

PREFETCH = 2  # batches per worker that wait or are being made
TIMEOUT_SECONDS = 300.0  # for a batch
DEATH_SECONDS = 2.0  # until all workers of a broken pool have ended
SHARED_MEMORY = Path("/dev/shm")


class Batch(NamedTuple):
    images: UInt8[np.ndarray, "b ..."]  # (b, h, w, c), or (b, 10, h, w, c) with ten crops
    targets: dict[str, np.ndarray]  # by their names in a task's batch, such as label (b,)
    weights: Float32[np.ndarray, "b"]  # 0 for padding and for replaced bad images, else 1
    skipped: int  # bad images

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The images and targets by their names in a task's batch."""
        return {"image": self.images, **self.targets}


class WorkerError(DataError):
    """A worker process died or hangs."""


class BatchRequest(NamedTuple):
    """The part of a global batch that this host makes."""

    first: int  # position of its first example in the sequence of all batches; seeds the crops
    indices: Int[np.ndarray, "b"]  # in the dataset
    valid: int  # number of examples before the padding


@dataclass(frozen=True)
class BatchMaker:
    """Makes batches; workers receive a copy."""

    examples: Examples
    crop: Crop | None
    channels: int
    seed: int
    on_bad_image: OnBadImage

    def __call__(self, request: BatchRequest) -> Batch:
        numbered = enumerate(request.indices.tolist(), request.first)
        read = (self._example(*each) for each in numbered)
        images, targets, examples, good = zip(*read, strict=True)
        for image, example in zip(images, examples, strict=True):
            if image.shape != images[0].shape:
                sizes = ["x".join(map(str, each.shape)) for each in (image, images[0])]
                raise DataError(
                    f"{example.origin} is {sizes[0]} pixels, {examples[0].origin} {sizes[1]}; "
                    "set data.image_size to resize all images"
                )
        weights = np.array(good, np.float32)
        weights[request.valid :] = 0
        skipped = request.valid - int(weights.sum())
        return Batch(np.stack(images), stack_targets(targets), weights, skipped)

    def _example(self, position: int, index: int) -> tuple[np.ndarray, Targets, Example, bool]:
        """Returns an image, its targets and its example, and True.

        With "skip", it returns the next good one and False instead of a bad one.
        """
        count = len(self.examples)
        for distance in range(count):
            try:
                example = self.examples[(index + distance) % count]
                return *self._read(example, position), example, not distance
            except BadImageError as error:
                if self.on_bad_image == "error":
                    raise
                bad = error
        raise DataError(f"none of {count:,} images can be decoded; the last: {bad}")

    def _read(self, example: Example, position: int) -> tuple[UInt8[np.ndarray, "..."], Targets]:
        content, targets, origin = example
        if self.crop is None:
            if isinstance(content, bytes):
                content = decode(content, self.channels, origin)
            return content, targets
        generator = np.random.default_rng((self.seed, position))
        if not isinstance(content, bytes):
            return self._view(as_image(content), targets, generator)
        image = open_image(content, self.channels, origin, lazily=True)
        with decoding(origin):  # happens when the crop is known
            return self._view(image, targets, generator)

    def _view(
        self, image: "Image", targets: Targets, generator: np.random.Generator
    ) -> tuple[UInt8[np.ndarray, "..."], Targets]:
        if isinstance(self.crop, View):
            return self.crop.targeted(image, targets, generator)
        assert self.crop is not None
        return self.crop(image, generator), targets


class Prefetcher(Iterator[Batch]):
    """Yields batches in order, which workers make ahead. Close it, or use it in a `with`.

    `next` raises:
      BadImageError: an image cannot be decoded, and bad images are not skipped.
      DataError: no image can be decoded, or images differ in size.
      WorkerError: a worker died or hangs.
    """

    def __init__(self, make: BatchMaker, requests: Iterator[BatchRequest], workers: int):
        self._requests = requests
        self._folder = tempfile.TemporaryDirectory(
            prefix=f"resjax-{os.getpid()}-",
            dir=SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None,
        )
        self._executor: futures.Executor
        self._make: Callable[[BatchRequest], Batch | StoredBatch] = make
        self._workers: Mapping[int, BaseProcess] = {}
        if workers:
            self._pool = partial(
                futures.ProcessPoolExecutor,
                workers,
                multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(make, self._folder.name),
            )
            self._start_workers()
            self._make = _make_in_worker
        else:
            self._executor = futures.ThreadPoolExecutor(1)
        self._pending: deque[tuple[BatchRequest, futures.Future[Batch | StoredBatch]]] = deque()
        self._progressed = False  # whether a batch arrived since workers were replaced
        with self._closing_on_error():
            self._submit(itertools.islice(requests, PREFETCH * max(workers, 1)))

    def __next__(self) -> Batch:
        if not self._pending:
            self.close()
            raise StopIteration
        with self._closing_on_error():
            try:
                batch = self._result(self._pending[0][1])
            except BrokenProcessPool:
                self._replace_workers()
                batch = self._result(self._pending[0][1])
            self._pending.popleft()
            self._progressed = True
            self._submit(itertools.islice(self._requests, 1))
        return batch

    def _submit(self, requests: Iterable[BatchRequest]) -> None:
        for request in requests:
            with safe_path(), group_signals_blocked():  # also in a worker that this starts
                try:
                    future = self._executor.submit(self._make, request)
                except BrokenProcessPool as error:  # handled when it is this batch's turn
                    future = futures.Future()
                    future.set_exception(error)
            self._pending.append((request, future))

    def _start_workers(self) -> None:
        with safe_path():  # of the tracker that counts the pool's semaphores
            self._executor = pool = self._pool()
        self._workers = pool._processes  # Python 3.14 has the public method `kill_workers`

    def _replace_workers(self) -> None:
        """Starts new workers, which make all pending batches, unless they die repeatedly."""
        if not self._progressed:
            raise BrokenProcessPool
        text = f"a data worker died of {self._cause_of_death()} and is replaced"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
        self._end_workers()
        self._start_workers()
        requests = [request for request, _ in self._pending]
        self._pending.clear()
        self._progressed = False
        self._submit(requests)

    def _result(self, future: "futures.Future[Batch | StoredBatch]") -> Batch:
        if not futures.wait([future], TIMEOUT_SECONDS).done:
            raise WorkerError(
                f"no batch arrived in {TIMEOUT_SECONDS:g} s: a disk or a data worker hangs; "
                "with data.workers=0 Ctrl-C shows where"
            )
        result = future.result()
        return result.load() if isinstance(result, StoredBatch) else result

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool:
            cause = self._cause_of_death()
            self.close()
            raise WorkerError(
                f"a data worker died of {cause}; its own message, if any, is above; if memory ran "
                "out, lower data.workers or data.batch_size"
            ) from None
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def _cause_of_death(self) -> str:
        """Returns the cause for the first worker; the executor ends the others with SIGTERM."""
        last = time.monotonic() + DEATH_SECONDS
        for worker in self._workers.values():
            worker.join(max(last - time.monotonic(), 0))  # until then it has no exit code
        codes = {worker.exitcode or 0 for worker in self._workers.values()}
        code = min(codes - {0, -signal.SIGTERM}, default=-signal.SIGTERM)
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def close(self) -> None:
        """Ends the workers, whatever they are doing."""
        self._pending.clear()
        self._end_workers()
        self._folder.cleanup()

    def _end_workers(self) -> None:
        for worker in self._workers.values():
            worker.kill()  # a stopped process ignores other signals
        self._executor.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stream(
    examples: Examples,
    order: Order,
    *,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    crop: Crop | None = None,
    channels: int = 3,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
    on_bad_image: OnBadImage = "error",
) -> Prefetcher:
    """Returns the endless sequence of training batches from `first_step` on.

    Args:
      examples: the training split.
      order: the endless sequence of indices that is cut into batches, an `ordering.EpochOrder`.
      batch_size: global; divisible by `processes`.
      seed: of the crops.
      first_step: of the first batch; later steps are not slower.
      crop: a `placement.View`, which moves masks and boxes too, or a function that crops images
        alone, such as `crops.ten_crop` with its size bound; must be picklable. None leaves the
        images as they are, so they must have one size.
      channels: 3 for RGB, 1 for grayscale.
      workers: number of processes that make batches; 0 uses a thread.
      process: index of this host, which makes the corresponding part of each batch.
      processes: number of hosts.
      on_bad_image: "error", or "skip" to replace a bad image by the next good one of the dataset.
    """
    size = batch_size // processes

    def request(step: int) -> BatchRequest:
        first = step * batch_size + process * size
        return BatchRequest(first, order(first, size), size)

    make = BatchMaker(examples, crop, channels, seed, on_bad_image)
    return Prefetcher(make, map(request, itertools.count(first_step)), workers)


def eval_batches(
    examples: Examples,
    *,
    batch_size: int,
    crop: Crop | None = None,
    channels: int = 3,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
    on_bad_image: OnBadImage = "error",
) -> Prefetcher:
    """Returns batches with every example once, in order, the last one padded.

    The arguments are those of `stream`. Padding and replaced bad images have weight 0.
    """
    count = len(examples)
    size = batch_size // processes

    def request(step: int) -> BatchRequest:
        first = step * batch_size + process * size
        indices = np.minimum(np.arange(first, first + size), count - 1)
        return BatchRequest(first, indices, valid=min(max(count - first, 0), size))

    make = BatchMaker(examples, crop, channels, 0, on_bad_image)
    return Prefetcher(make, map(request, range(math.ceil(count / batch_size))), workers)


# The rest of this file runs in workers, except StoredBatch.load.

_maker: BatchMaker
_folder: str


class StoredBatch(NamedTuple):
    """A batch whose images are in a file, because a pipe would copy them three times."""

    path: Path
    batch: Batch

    def load(self) -> Batch:
        images = np.load(self.path, mmap_mode="c")
        self.path.unlink()  # the memory remains until the array is deleted
        return self.batch._replace(images=np.asarray(images))


def _start_worker(maker: BatchMaker, folder: str) -> None:
    global _maker, _folder
    _maker, _folder = maker, folder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when the main process is killed; otherwise it would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(_folder, ignore_errors=True)
    os._exit(1)


def _make_in_worker(request: BatchRequest) -> StoredBatch:
    batch = _maker(request)
    path = Path(_folder, f"{request.first}.npy")
    try:
        np.save(path, batch.images)
    except OSError as error:
        raise WorkerError(
            f"{path}: {error}; lower data.workers or data.batch_size, or make room there "
            "(in a container: --shm-size)"
        ) from error
    return StoredBatch(path, batch._replace(images=batch.images[:0]))
