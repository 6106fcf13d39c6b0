"""Streamed batches: their order, their workers, and errors."""

import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resjax.data import stream as streaming
from resjax.data.decoding import decode
from resjax.data.examples import ArrayExamples, BadImageError, DataError, Examples, Split
from resjax.data.ordering import EpochOrder, batch_indices
from resjax.data.placement import View, random_resized
from resjax.data.stream import Batch, Crop, Prefetcher, WorkerError, eval_batches
from resjax.data.user_data import FileExamples

CROP = View(random_resized, 16)
SIZES = st.integers(1, 40)


@pytest.fixture(autouse=True)
def no_process_and_no_file_remains() -> Iterator[None]:
    places = (streaming.SHARED_MEMORY, Path(tempfile.gettempdir()))
    yield
    assert not multiprocessing.active_children()
    assert not [path for place in places for path in place.glob(f"resjax-{os.getpid()}-*")]


def numbered(count: int) -> ArrayExamples:
    """Noise whose labels are indices."""
    images = np.random.default_rng(0).integers(0, 256, (count, 20, 24, 3), np.uint8)
    return ArrayExamples(Split.labeled(images, np.arange(count, dtype=np.int32)), "noise")


def stream(examples: Examples, seed: int = 0, **options: Any) -> Prefetcher:
    order = EpochOrder(jax.random.key(seed), len(examples))
    return streaming.stream(examples, order, seed=seed, **options)


def collect(feed: Prefetcher, batches: int | None = None) -> list[Batch]:
    with feed:
        return list(itertools.islice(feed, batches))


def labels(batches: list[Batch]) -> np.ndarray:
    return np.concatenate([batch.targets["label"] for batch in batches])


def same(ones: list[Batch], others: list[Batch]) -> bool:
    return all(
        (one.arrays[name] == two.arrays[name]).all() and (one.weights == two.weights).all()
        for one, two in zip(ones, others, strict=True)
        for name in one.arrays
    )


def joined(parts: tuple[Batch, ...]) -> Batch:
    images, targets, weights, skipped = zip(*parts, strict=True)
    label = np.concatenate([each["label"] for each in targets])
    return Batch(np.concatenate(images), {"label": label}, np.concatenate(weights), sum(skipped))


def test_batches_follow_the_order_of_resident_datasets() -> None:
    batches = collect(stream(numbered(30), batch_size=7, seed=3, first_step=2, workers=1), 12)
    expected = batch_indices(jax.random.key(3), 2, steps=12, batch_size=7, examples=30)
    assert labels(batches).tolist() == expected.ravel().tolist()


@settings(max_examples=8, deadline=None)
@given(count=SIZES, each=st.integers(1, 8), processes=st.integers(2, 4))
def test_the_parts_of_all_hosts_are_the_batches_of_one(
    count: int, each: int, processes: int
) -> None:
    for feed, batches in (
        (partial(stream, seed=1, first_step=5, crop=CROP), 4),
        (partial(eval_batches, crop=CROP), None),
    ):
        feed = partial(feed, numbered(count), batch_size=each * processes)
        shares = [
            collect(feed(process=process, processes=processes), batches)
            for process in range(processes)
        ]
        united = [joined(parts) for parts in zip(*shares, strict=True)]
        assert same(united, collect(feed(), batches))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    feed = partial(stream, numbered(30), batch_size=7, seed=3, crop=CROP)
    assert same(collect(feed(workers=workers), 12), collect(feed(), 12))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_from_any_step_on_are_those_of_the_whole_run(workers: int) -> None:
    feed = partial(stream, numbered(30), batch_size=7, seed=3, crop=CROP)
    whole = collect(feed(), 12)
    assert same(collect(feed(first_step=6, workers=workers), 6), whole[6:])


def test_a_late_step_is_as_fast_as_the_first() -> None:
    feed = partial(stream, numbered(1000), batch_size=100, seed=0)
    seconds = []
    for first_step in (0, 0, 10**6, 10**9):  # the first compiles
        start = time.monotonic()
        collect(feed(first_step=first_step), 1)
        seconds.append(time.monotonic() - start)
    assert max(seconds[2:]) < seconds[1] + 1  # to walk there would take minutes


def test_crops_differ_between_epochs_and_runs() -> None:
    feed = partial(stream, numbered(1), batch_size=1, crop=CROP)
    crops = [batch.images.tobytes() for seed in (0, 1) for batch in collect(feed(seed=seed), 3)]
    assert len(set(crops)) == 6


@pytest.mark.parametrize("channels", [1, 3])
def test_without_a_crop_images_are_unchanged(channels: int) -> None:
    examples = numbered(10)
    examples = ArrayExamples(
        Split.labeled(examples.split.images[..., :channels], examples.split.labels), "noise"
    )
    [batch] = collect(stream(examples, batch_size=10, seed=0, channels=channels), 1)
    assert batch.images.dtype == np.uint8
    assert batch.targets["label"].dtype == np.int32
    assert (batch.images == examples.split.images[batch.targets["label"]]).all()
    assert (batch.weights == 1).all()


@settings(max_examples=15, deadline=None)
@given(count=SIZES, batch_size=SIZES)
def test_an_evaluation_has_every_example_once_in_order(count: int, batch_size: int) -> None:
    batches = collect(eval_batches(numbered(count), batch_size=batch_size))
    assert {len(batch.targets["label"]) for batch in batches} == {batch_size}
    weights = np.concatenate([batch.weights for batch in batches])
    assert labels(batches)[weights == 1].tolist() == list(range(count))
    assert weights.sum() == count


@pytest.fixture
def photos(tmp_path: Path) -> FileExamples:
    """Eight JPEGs, of which the second and the last are damaged; labels are indices."""
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.jpg" for number in range(8)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (60, 80, 3), np.uint8)).save(path)
    for damaged in (paths[1], paths[7]):
        damaged.write_bytes(damaged.read_bytes()[:-1500])
    return FileExamples(tmp_path, [path.name for path in paths], range(8))


@pytest.mark.parametrize("crop", [CROP, None])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_an_error_that_names_it(
    photos: FileExamples, workers: int, crop: Crop | None
) -> None:
    with pytest.raises(BadImageError, match=r"/1\.jpg: .*truncated") as raised:
        collect(eval_batches(photos, batch_size=2, crop=crop, workers=workers))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("crop", [CROP, None])
@pytest.mark.parametrize("workers", [0, 1])
def test_skip_replaces_a_bad_image_by_the_next_good_one(
    photos: FileExamples, workers: int, crop: Crop | None
) -> None:
    [batch] = collect(
        stream(photos, batch_size=8, seed=0, crop=crop, workers=workers, on_bad_image="skip"), 1
    )
    assert sorted(batch.targets["label"]) == [0, 0, 2, 2, 3, 4, 5, 6]  # 2 for 1, and 0 for 7
    assert batch.skipped == 2
    if crop is None:
        for image, label in zip(batch.images, batch.targets["label"].tolist(), strict=True):
            path = photos.root / photos.files[label]
            assert (image == decode(path.read_bytes(), 3, "")).all()


def test_a_bad_image_has_no_weight_in_an_evaluation(photos: FileExamples) -> None:
    one, two = collect(eval_batches(photos, batch_size=5, crop=CROP, on_bad_image="skip"))
    assert one.weights.tolist() == [1, 0, 1, 1, 1]
    assert two.weights.tolist() == [1, 1, 0, 0, 0]
    assert (one.skipped, two.skipped) == (1, 1)  # padding is not counted


def test_a_dataset_without_good_images_is_an_error(photos: FileExamples) -> None:
    bad = FileExamples(photos.root, ["1.jpg", "7.jpg"], [0, 1])
    with pytest.raises(DataError, match=r"none of 2 images can be decoded"):
        collect(stream(bad, batch_size=1, seed=0, on_bad_image="skip"), 1)


def test_images_of_different_sizes_are_an_error_that_names_the_setting(tmp_path: Path) -> None:
    for name, size in (("a.png", (20, 30)), ("b.png", (20, 31))):
        Image.new("RGB", size).save(tmp_path / name)
    examples = FileExamples(tmp_path, ["a.png", "b.png"], [0, 1])
    with pytest.raises(DataError, match=r"b\.png is 31x20x3 .*a\.png 30x20x3.*data\.image_size"):
        collect(eval_batches(examples, batch_size=2))


def kill_workers() -> None:
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_workers_that_die_are_replaced_and_batches_stay_the_same(sent: signal.Signals) -> None:
    expected = collect(stream(numbered(30), batch_size=7, seed=0), 40)
    with stream(numbered(30), batch_size=7, seed=0, workers=2) as feed:
        found = list(itertools.islice(feed, 10))
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, sent)
        with pytest.warns(RuntimeWarning, match=f"died of {sent.name} and is replaced"):
            found += itertools.islice(feed, 30)
    assert same(found, expected)


def test_workers_that_die_again_before_a_batch_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with stream(numbered(30), batch_size=7, seed=0, workers=1) as feed:
        next(feed)
        # The replaced worker exits when it makes a batch.
        monkeypatch.setattr(feed, "_make", os._exit)
        feed._requests = itertools.repeat(3)
        feed._pending = deque((3, future) for _, future in feed._pending)
        kill_workers()
        start = time.monotonic()
        with (
            pytest.warns(RuntimeWarning),
            pytest.raises(WorkerError, match="a data worker died of") as raised,
        ):
            collect(feed, 100)
    assert time.monotonic() - start < 20
    assert "\n" not in str(raised.value)


def test_a_worker_that_hangs_is_an_error_and_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with stream(numbered(30), batch_size=7, seed=0, workers=2) as feed:
        next(feed)
        monkeypatch.setattr(streaming, "TIMEOUT_SECONDS", 1.0)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(WorkerError, match="no batch arrived in 1 s"):
            collect(feed, 100)
    assert time.monotonic() - start < 5


def test_workers_ignore_ctrl_c() -> None:
    with stream(numbered(30), batch_size=7, seed=0, workers=2) as feed:
        next(feed)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
        assert len(collect(feed, 20)) == 20


def test_a_full_disk_is_an_error_that_says_how_to_fix_it() -> None:
    """Limits the size of files, here and in workers, to that of two images."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 20 * 24 * 3, limits[1]))
    try:
        with pytest.raises(WorkerError, match=r"resjax-.*lower data\.workers"):
            collect(stream(numbered(30), batch_size=7, seed=0, workers=1), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


SCRIPT = """
import multiprocessing, signal, time
import numpy as np
from resjax.data.examples import ArrayExamples, Split
from resjax.data.placement import View, random_resized
from resjax.data.stream import stream

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's is ignored
split = Split.labeled(np.zeros((30, 20, 24, 3), np.uint8), np.zeros(30, np.int32))
def order(first, count):
    return np.arange(first, first + count) % 30

with stream(ArrayExamples(split, "black"), order, batch_size=7, seed=0, workers=2) as feed:
    next(feed)
    workers = [child.pid for child in multiprocessing.active_children()]
    print(feed._folder.name, *workers, flush=True)
    while True:
        next(feed)
"""


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")  # of a zombie, where nobody reaps orphans
        return status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_and_no_file_outlives_the_main_process(ending: signal.Signals) -> None:
    """As from a terminal, whose Ctrl-C reaches every process; SIGKILL reaches the main one."""
    main = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with main:
        assert main.stdout is not None
        folder, *workers = main.stdout.readline().split()
        assert len(workers) == 2
        (os.killpg if ending == signal.SIGINT else os.kill)(main.pid, ending)
        _, said = main.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while not all(gone(int(worker)) for worker in workers) or Path(folder).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if ending == signal.SIGINT:
        assert said.count("Traceback") == 1  # the main process's own
        assert said.rstrip().endswith("KeyboardInterrupt")
