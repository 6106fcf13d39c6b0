"""The streaming feed: large datasets are read, decoded and cropped on the host, batch by batch.

What a step sees is a pure function of the seed and the step's number, whatever the number of
workers; so there is no state to save, and a run that resumes at any step sees the batches that
would have come. The order is Grain's, whose shuffle finds any element of any epoch by itself: in 5
µs, but in 30 of a thousand examples, and in 1,000 of thirty.

The processes are the standard library's. Grain's (0.2.18) wait for ever when one of them hangs, in
`next` and in `close`; outlive a main process that is killed; and hold JAX, 190 MB each. These hold
NumPy and Pillow, and end with the main process. One that dies is replaced, for what it had to make
can be made again; one that hangs, or that dies again, is an error of one line.
"""

import itertools
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
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
from jaxtyping import Float32, Int32, Int64, UInt8

from resjax.data.datasets import OnBadImage
from resjax.data.decoding import as_image, decode, open_image
from resjax.data.examples import BadImageError, DataError, Example, Examples

if TYPE_CHECKING:
    from PIL.Image import Image

Crop = Callable[["Image", np.random.Generator], UInt8[np.ndarray, "..."]]

AHEAD = 2  # batches that wait or are being made, for every worker
PATIENCE = 300.0  # seconds for a batch
SHARED_MEMORY = Path("/dev/shm")


class Batch(NamedTuple):
    images: UInt8[np.ndarray, "b ..."]  # (b, h, w, c), or of ten crops (b, 10, h, w, c)
    labels: Int32[np.ndarray, "b"]
    # 0 for what fills up an evaluation's last batch, or stands for a bad image; else 1.
    weights: Float32[np.ndarray, "b"]
    skipped: int  # bad images


class WorkerError(DataError):
    """A process that makes batches died or hangs."""


class Share(NamedTuple):
    """What one process has of a global batch."""

    first: int  # position of its first example in the endless row, from which augmentation draws
    indices: Int64[np.ndarray, "b"]  # in the dataset
    counted: int  # how many come before those that fill up


@dataclass(frozen=True)
class Maker:
    """Makes batches; all that a worker has to know."""

    examples: Examples
    crop: Crop | None
    channels: int
    seed: int
    on_bad_image: OnBadImage

    def batch(self, share: Share) -> Batch:
        made = [self.example(*at) for at in enumerate(share.indices.tolist(), share.first)]
        first = made[0]
        for other in made:
            if other.image.shape != first.image.shape:
                raise DataError(
                    f"{other.origin} is {size(other)} pixels, {first.origin} {size(first)}; "
                    "set data.image_size to bring all to one size"
                )
        good = np.array([each.good for each in made[: share.counted]], bool)
        weights = np.zeros(len(made), np.float32)
        weights[: share.counted] = good
        return Batch(
            images=np.stack([each.image for each in made]),
            labels=np.array([each.label for each in made], np.int32),
            weights=weights,
            skipped=int((~good).sum()),
        )

    def example(self, position: int, index: int) -> "Made":
        """The example at `index`, or under "skip" the next good one of the dataset."""
        count = len(self.examples)
        for distance in range(count):
            example = self.examples[(index + distance) % count]
            try:
                image = self.image(example, position)
            except BadImageError:
                if self.on_bad_image == "error":
                    raise
            else:
                return Made(image, example.label, example.origin, good=not distance)
        raise DataError(f"none of {count} images can be decoded, {example.origin} among them")

    def image(self, example: Example, position: int) -> UInt8[np.ndarray, "..."]:
        content, _, origin = example
        if self.crop is None:
            return decode(content, self.channels, origin) if isinstance(content, bytes) else content
        generator = np.random.default_rng((self.seed, position))
        if not isinstance(content, bytes):
            return self.crop(as_image(content), generator)
        image = open_image(content, self.channels, origin, lazily=True)
        try:
            return self.crop(image, generator)
        except OSError as error:
            raise BadImageError(f"{origin}: cannot be decoded: {error}") from error


class Made(NamedTuple):
    image: UInt8[np.ndarray, "..."]
    label: int
    origin: str
    good: bool  # False: it stands for a bad one


def size(example: Made) -> str:
    return "x".join(map(str, example.image.shape))


class Feed(Iterator[Batch]):
    """Batches in order, made ahead by workers. Close it, or use it in a `with`.

    `next` raises:
      BadImageError: an image cannot be decoded, and is not to be skipped.
      DataError: no image can be decoded, or they have different sizes.
      WorkerError: a worker died or hangs.
    """

    def __init__(self, maker: Maker, shares: Iterator[Share], workers: int):
        self._shares = shares
        self._folder = tempfile.TemporaryDirectory(
            prefix="resjax-feed-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        )
        self._executor: futures.Executor
        self._make: Callable[[Share], Batch | Written]
        self._workers: Mapping[int, BaseProcess] = {}
        if workers:
            self._pool = partial(
                futures.ProcessPoolExecutor,
                workers,
                multiprocessing.get_context("spawn"),
                initializer=begin_worker,
                initargs=(maker, self._folder.name),
            )
            self._begin_workers()
            self._make = make_in_worker
        else:
            self._executor = futures.ThreadPoolExecutor(1)
            self._make = maker.batch
        self._pending: deque[tuple[Share, futures.Future[Batch | Written]]] = deque()
        self._came = False  # a batch, since workers were replaced
        with self._closed_by_errors():
            self._order(itertools.islice(shares, AHEAD * max(workers, 1)))

    def __next__(self) -> Batch:
        if not self._pending:
            self.close()
            raise StopIteration
        with self._closed_by_errors():
            try:
                batch = self._result(self._pending[0][1])
            except BrokenProcessPool:
                self._replace_workers()
                batch = self._result(self._pending[0][1])
            self._pending.popleft()
            self._came = True
            self._order(itertools.islice(self._shares, 1))
        return batch

    def _order(self, shares: Iterable[Share]) -> None:
        for share in shares:
            with interrupt_held():  # by a worker that this starts, too
                try:
                    future = self._executor.submit(self._make, share)
                except BrokenProcessPool as error:  # which the batch's turn will tell
                    future = futures.Future()
                    future.set_exception(error)
            self._pending.append((share, future))

    def _begin_workers(self) -> None:
        self._executor = pool = self._pool()
        self._workers = pool._processes  # public, as `kill_workers`, from Python 3.14 on

    def _replace_workers(self) -> None:
        """A worker died, perhaps for want of memory: others make what it and they had to make."""
        if not self._came:
            raise BrokenProcessPool
        text = f"a worker of the feed died of {self._cause_of_death()}; others take its place"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
        self._end_workers()
        self._begin_workers()
        waiting = [share for share, _ in self._pending]
        self._pending.clear()
        self._came = False
        self._order(waiting)

    def _result(self, future: "futures.Future[Batch | Written]") -> Batch:
        if not futures.wait([future], PATIENCE).done:
            raise WorkerError(
                f"no batch came in {PATIENCE:g} s: a disk or a worker of the feed hangs; "
                "with data.workers=0 Ctrl-C shows where"
            )
        made = future.result()
        return made.read() if isinstance(made, Written) else made

    @contextmanager
    def _closed_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool:
            cause = self._cause_of_death()
            self.close()
            raise WorkerError(
                f"a worker of the feed died of {cause}; its last words, if any, are above; "
                "if memory ran out, lower data.workers or data.batch_size"
            ) from None
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def _cause_of_death(self) -> str:
        """Of the worker that died first: the executor ends the others by SIGTERM."""
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
            worker.kill()  # one that is stopped heeds nothing else
        self._executor.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def interrupt_held() -> Iterator[None]:
    """Ctrl-C reaches all processes, but is the main one's affair: those begun here never see it.

    SIGTERM they must heed, for the executor ends them by it; what a scheduler's ends is replaced.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stream(
    examples: Examples,
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
) -> Feed:
    """The batches of training, from `first_step` on, without end.

    Examples come in an endless row of epochs, each a permutation of all, cut into batches; so every
    example comes exactly once an epoch, and a batch may span the end of one.

    Args:
      examples: of the training split.
      batch_size: of all hosts together; `processes` divides it.
      seed: of the order, and of what `crop` draws.
      first_step: of the batch that comes first; any is as quick.
      crop: of `resjax.data.crops`, with its size bound; must be picklable. None leaves the images
        as they are, which must then have one size.
      channels: 3 is RGB, 1 is grey.
      workers: processes that make batches; 0 is a thread of this process.
      process: this host's number. Host p gets the p-th part of every batch, so all hosts together
        see the batches of one.
      processes: how many hosts there are.
      on_bad_image: "error", or "skip": the next good example of the dataset stands in for it.
    """
    import grain  # takes seconds

    # Epoch e is shuffled by Grain's seed + e: runs of neighbouring seeds would share epochs.
    grain_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    row = grain.MapDataset.range(len(examples)).shuffle(seed=grain_seed).repeat()
    each = batch_size // processes

    def share(step: int) -> Share:
        first = step * batch_size + process * each
        return Share(first, np.array([row[at] for at in range(first, first + each)]), each)

    maker = Maker(examples, crop, channels, seed, on_bad_image)
    return Feed(maker, map(share, itertools.count(first_step)), workers)


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
) -> Feed:
    """The batches of an evaluation: every example once, in order, the last batch filled up.

    Arguments as of `stream`. What fills up, and under "skip" what stands for a bad image, has
    weight 0.
    """
    count = len(examples)
    each = batch_size // processes

    def share(step: int) -> Share:
        first = step * batch_size + process * each
        indices = np.minimum(np.arange(first, first + each), count - 1)
        return Share(first, indices, counted=min(max(count - first, 0), each))

    maker = Maker(examples, crop, channels, 0, on_bad_image)
    return Feed(maker, map(share, range(math.ceil(count / batch_size))), workers)


# What follows runs in a worker, or reads what a worker wrote.

_maker: Maker
_folder: str


class Written(NamedTuple):
    """A batch whose images lie in a file: a pipe would copy them three times, one by one."""

    path: Path
    batch: Batch

    def read(self) -> Batch:
        images = np.load(self.path, mmap_mode="c")
        self.path.unlink()  # the memory stays until the array goes
        return self.batch._replace(images=np.asarray(images))


def begin_worker(maker: Maker, folder: str) -> None:
    global _maker, _folder
    _maker, _folder = maker, folder
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A worker whose main process was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(_folder, ignore_errors=True)
    os._exit(1)


def make_in_worker(share: Share) -> Written:
    batch = _maker.batch(share)
    path = Path(_folder, f"{share.first}.npy")
    try:
        np.save(path, batch.images)
    except OSError as error:
        raise WorkerError(
            f"{path}: {error}; lower data.workers or data.batch_size, or make room there "
            "(of a container: --shm-size)"
        ) from error
    return Written(path, batch._replace(images=batch.images[:0]))
