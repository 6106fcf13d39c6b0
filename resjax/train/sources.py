"""Sources of batches: a dataset that lies on the devices, or a stream from disk.

A small dataset is resident: each device holds its part, and the compiled step draws batches from
it. A large one is streamed: worker processes read and decode the next batches while a step runs.
Both are the same to the trainer, and in both a batch is a function of the seed and the step alone.
"""

import copy
import itertools
import re
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from resjax.config import Config, Data
from resjax.data import crops, datasets, placement
from resjax.data.cache import cached_arrays
from resjax.data.examples import LABEL, Split
from resjax.data.normalization import Statistics, compute_statistics
from resjax.data.ordering import EpochOrder, batch_indices
from resjax.data.stream import eval_batches, stream
from resjax.errors import UserError
from resjax.machine import available_cores
from resjax.tasks import DatasetInfo, find_task
from resjax.tasks.base import Batch
from resjax.train.parallel import Backend, batch_unit, device_memory
from resjax.train.state import order_key, run_key

RESIDENT_SHARE = 1 / 4  # of a device's memory, at most
SAMPLE = 2048  # images from which the statistics of a stream are computed

PLACES: dict[str, placement.Place] = {
    "random_resized": placement.random_resized,
    "scale_jitter": placement.scale_jitter,
    "large_scale_jitter": placement.large_scale_jitter,
    "center": placement.center,
    "whole": placement.whole,
}

HostBatch = dict[str, np.ndarray]
"""A batch as a task takes it, before its arrays are on the device."""


class BatchSource:
    """The interface of a source.

    Attributes:
      info: what a task knows of the dataset.
      examples: number of examples by split, "train" and "test".
      targets: the entries of a batch beside `image`.
      statistics: for the normalization of images.
      streamed: whether images are decoded, and perhaps cropped, on the host. A stream yields the
        arrays of one step per dispatch; a resident dataset serves any number of steps.
      skipped: number of images that could not be decoded so far.
      description: says in one line how many images and classes there are, how they are split, and
        what was skipped.
    """

    info: DatasetInfo
    examples: dict[str, int]
    targets: tuple[str, ...] = ("label",)
    statistics: Statistics
    streamed: bool
    skipped: int = 0
    description: str

    def __init__(self, config: Config, backend: Backend):
        self._config, self._backend = config, backend

    def with_config(self, config: Config) -> Self:
        """Returns the same source for other batch sizes."""
        changed = copy.copy(self)
        changed._config = config
        return changed

    # On the host: what compiled functions take beside the state.

    def training(self, seed: int, first_step: int) -> Generator[Any, None, None]:
        """Yields the arrays of each dispatch from a step on, forever."""
        raise NotImplementedError

    def evaluation(self, split: str = "test") -> Iterator[Any]:
        """Yields the arrays of each dispatch of one evaluation of a split, "train" or "test"."""
        raise NotImplementedError

    def example_arrays(self) -> tuple[Any, Any]:
        """Returns arrays of the shapes of `training` and `evaluation`, to compile for."""
        raise NotImplementedError

    def evaluation_arrays(self, split: str) -> Any:
        """Returns arrays of the shapes of the evaluation of a split, to compile for."""
        return self.example_arrays()[1]

    def read(self, split: str, count: int | None = None) -> Iterator[HostBatch]:
        """Yields examples on the host as evaluation crops them, in batches of one shape.

        Args:
          split: "train" or "test".
          count: how many examples, spread evenly over the split; None for all.

        Yields:
          `image` in uint8, `label`, and `weight`, which is 0 for padding and for bad images.
        """
        examples = self.examples[split]
        count = min(count or examples, examples)
        batches = -(-count // self._config.data.eval_batch_size)
        chosen = np.arange(count) * examples // count
        return self._read(split, chosen, batch_size=-(-count // batches))

    def _read(
        self, split: str, chosen: Int[np.ndarray, "count"], batch_size: int
    ) -> Iterator[HostBatch]:
        raise NotImplementedError

    # Inside compiled functions: from these arrays to batches.

    def draw(self, arrays: Any, key: Key[Array, ""], first_step: Any, steps: int) -> Any:
        """Returns what `train_batch` takes, with leading axes (steps, parts)."""
        raise NotImplementedError

    def train_batch(self, arrays: Any, drawn: Any) -> Batch:
        """Returns this device's shard of a batch, or of a part of it: `image` and `label`."""
        return drawn

    def eval_draws(self, arrays: Any, split: str = "test") -> Any:
        """Returns what `eval_batch` takes, with a leading axis of batches."""
        return arrays

    def eval_batch(self, arrays: Any, drawn: Any, split: str = "test") -> Batch:
        """Returns this device's shard of a batch: `image`, `label`, and `weight` 0 or 1."""
        return drawn


class Resident(BatchSource):
    """The dataset on the devices."""

    streamed = False

    def __init__(self, config: Config, backend: Backend):
        super().__init__(config, backend)
        data, dataset = config.data, load_dataset(config)
        height, width, channels = dataset.train.images.shape[1:]
        self.info = DatasetInfo(tuple(dataset.class_names), (height, width, channels))
        self.examples = {"train": len(dataset.train), "test": len(dataset.test)}
        self.targets = tuple(dataset.train.targets)
        self.skipped = dataset.skipped
        self.description = f"{data.name}: {dataset}"
        self.statistics = compute_statistics(
            dataset.train.images, data.normalization, colors=data.pca_lighting > 0
        )
        self._arrays = tuple(
            backend.shard_dataset(split.arrays) for split in (dataset.train, dataset.test)
        )

    def training(self, seed: int, first_step: int) -> Generator[Any, None, None]:
        while True:
            yield self._arrays[0]

    def evaluation(self, split: str = "test") -> Iterator[Any]:
        yield self.evaluation_arrays(split)

    def example_arrays(self) -> tuple[Any, Any]:
        return self._arrays[0], self._arrays[1]

    def evaluation_arrays(self, split: str) -> Any:
        return self._arrays[("train", "test").index(split)]

    def _read(
        self, split: str, chosen: Int[np.ndarray, "count"], batch_size: int
    ) -> Iterator[HostBatch]:
        arrays = getattr(load_dataset(self._config), split).arrays
        for first in range(0, len(chosen), batch_size):
            indices = np.resize(own := chosen[first : first + batch_size], batch_size)
            weight = (np.arange(batch_size) < len(own)).astype(np.float32)
            yield {**{name: array[indices] for name, array in arrays.items()}, "weight": weight}

    def draw(
        self, arrays: Any, key: Key[Array, ""], first_step: Any, steps: int
    ) -> Int[Array, "steps parts batch"]:
        size = self._config.data.batch_size
        indices = batch_indices(key, first_step, steps, size, self.examples["train"])
        return indices.reshape(steps, self._config.train.accumulation_steps, -1)

    def train_batch(self, arrays: Any, drawn: Int[Array, "batch"]) -> Batch:
        return self._backend.gather_batch(arrays, drawn)

    def eval_draws(self, arrays: Any, split: str = "test") -> Int[Array, "batches batch"]:
        """Returns positions; those past the last example fill the last batch."""
        examples, devices = self.examples[split], self._backend.devices
        batches = -(-examples // self._config.data.eval_batch_size)
        size = -(-examples // (batches * devices)) * devices
        return jnp.arange(batches * size).reshape(batches, size)

    def eval_batch(self, arrays: Any, drawn: Int[Array, "batch"], split: str = "test") -> Batch:
        last = self.examples[split] - 1
        batch = self._backend.gather_batch(arrays, jnp.minimum(drawn, last))
        weight = (self._backend.local_shard(drawn) <= last).astype(jnp.float32)
        return {**batch, "weight": weight}


class Streamed(BatchSource):
    """The dataset on disk."""

    streamed = True

    def __init__(self, config: Config, backend: Backend, opened: datasets.OpenDataset):
        super().__init__(config, backend)
        self._opened, data = opened, config.data
        size, shape = data.image_size, opened.image_shape
        if size is None and shape is None:
            raise UserError(
                f"data.name={data.name}: its images may differ in size; set data.image_size, for "
                "example 224"
            )
        if size is None and (data.train_crop != "none" or data.eval_crop != "center"):
            raise UserError("data.train_crop and data.eval_crop need data.image_size")
        if data.train_crop == "scale_jitter" and size and size > (least := crops.SHORTER_SIDES[0]):
            raise UserError(
                f"data.train_crop=scale_jitter resizes the shorter side to {least} pixels or more, "
                f"so data.image_size={size} does not fit; use random_resized or large_scale_jitter"
            )
        self._workers = available_cores() if data.workers is None else data.workers
        self._channels = shape[2] if shape else 3
        image_shape: Any = (size, size, self._channels) if size else shape
        self.info = DatasetInfo(tuple(opened.class_names), image_shape)
        self.examples = {"train": len(opened.train), "test": len(opened.test)}
        self.targets = opened.targets
        if data.eval_crop == "ten" and self.targets != LABEL:
            raise UserError(
                f"data.eval_crop=ten: ten crops have one {' and '.join(self.targets)} each; use "
                "center or whole"
            )
        self.description = f"{data.name}: {opened}"
        self.statistics = self._statistics()

    @property
    def _data(self) -> Data:
        return self._config.data

    @property
    def _parts(self) -> int:
        return self._config.train.accumulation_steps

    def training(self, seed: int, first_step: int) -> Generator[Any, None, None]:
        batches = stream(
            self._opened.train,
            EpochOrder(order_key(run_key(jax.random.key(seed))), self.examples["train"]),
            batch_size=self._data.batch_size // self._parts,
            seed=seed,
            first_step=first_step * self._parts,
            **self._reading(self._data.train_crop),
        )
        with batches:
            while True:
                parts = [next(batches) for _ in range(self._parts)]
                self.skipped += sum(part.skipped for part in parts)
                arrays = jax.tree.map(lambda *each: np.stack(each), *(p.arrays for p in parts))
                yield self._backend.place_batches(arrays)

    def evaluation(self, split: str = "test") -> Iterator[Any]:
        examples = {"train": self._opened.train, "test": self._opened.test}[split]
        reading = self._reading(self._data.eval_crop)
        with eval_batches(examples, batch_size=self._eval_batch_size(), **reading) as batches:
            for batch in batches:
                self.skipped += batch.skipped
                arrays = {**batch.arrays, "weight": batch.weights}
                yield self._backend.place_batches(jax.tree.map(lambda array: array[None], arrays))

    def _read(
        self, split: str, chosen: Int[np.ndarray, "count"], batch_size: int
    ) -> Iterator[HostBatch]:
        reading = self._reading(self._data.eval_crop) | {"process": 0, "processes": 1}
        examples = Chosen(getattr(self._opened, split), chosen)
        with eval_batches(examples, batch_size=batch_size, **reading) as batches:
            for batch in batches:
                yield {**batch.arrays, "weight": batch.weights}

    def example_arrays(self) -> tuple[Any, Any]:
        processes = jax.process_count()
        train = self._parts, self._data.batch_size // self._parts // processes
        test = 1, self._eval_batch_size() // processes
        crops_per_image = (10,) if self._data.eval_crop == "ten" else ()
        shape = self.info.image_shape
        return self._backend.place_batches(
            (
                {"image": np.zeros((*train, *shape), np.uint8), **self._no_targets(train)},
                {
                    "image": np.zeros((*test, *crops_per_image, *shape), np.uint8),
                    **self._no_targets(test),
                    "weight": np.zeros(test, np.float32),
                },
            )
        )

    def _no_targets(self, examples: tuple[int, ...]) -> HostBatch:
        return datasets.empty_targets(self._opened, self.info.image_shape, examples)

    def draw(self, arrays: Any, key: Key[Array, ""], first_step: Any, steps: int) -> Any:
        return jax.tree.map(lambda parts: parts[None], arrays)

    def _reading(self, crop: str) -> dict[str, Any]:
        """Returns the options that all streams share."""
        size = self._data.image_size
        if crop == "none":
            crop = "center" if self._data.eval_crop == "ten" else self._data.eval_crop
        crop_image: Any = None
        if size is not None and crop == "ten":
            crop_image = partial(crops.ten_crop, size=size)
        elif size is not None:
            crop_image = placement.View(PLACES[crop], size)
        return {
            "crop": crop_image,
            "on_bad_image": self._data.on_bad_image,
            "channels": self._channels,
            "workers": self._workers,
            "process": jax.process_index(),
            "processes": jax.process_count(),
        }

    def sample(
        self, indices: Int[np.ndarray, "n"], draws: int, seed: int
    ) -> tuple[Split, dict[str, np.ndarray]]:
        """Returns training examples as evaluation crops them, and `draws` training batches."""
        chosen, count = Chosen(self._opened.train, indices), len(indices)
        reading = {"batch_size": count, "process": 0, "processes": 1, "workers": 0}
        with eval_batches(chosen, **self._reading("none") | reading) as batches:
            (original,) = batches
        crop = self._reading(self._data.train_crop) | reading
        with stream(chosen, lambda _, size: np.arange(size), seed=seed, **crop) as batches:
            crops = [batch.arrays for batch in itertools.islice(batches, draws)]
        together = jax.tree.map(lambda *each: np.stack(each), *crops)
        return Split(original.images, original.targets), together

    def _eval_batch_size(self) -> int:
        """Returns the size, at most the test split, rounded up to a multiple of the devices."""
        devices = self._backend.devices
        return -(-min(self._data.eval_batch_size, self.examples["test"]) // devices) * devices

    def _statistics(self) -> Statistics:
        """Returns the statistics of a sample of the training split, cached with a prepared set."""
        data, colors = self._data, self._data.pca_lighting > 0

        def computed() -> dict[str, Any]:
            made = compute_statistics(self._sample(), data.normalization, colors=colors)
            return {name: part for name, part in made._asdict().items() if part is not None}

        folder = datasets.prepared_folder(self._opened.train)
        if folder is None:
            return Statistics(**computed())
        what = f"{data.train_split or 'train'}-{data.image_size}-{data.normalization}"
        key = re.sub(r"[^\w-]+", "_", f"statistics-{what}{'-colors' * colors}")
        return Statistics(**cached_arrays(folder, key, computed))

    def _sample(self) -> Any:
        """Returns images spread evenly over the training split, cropped as for evaluation."""
        count = min(SAMPLE, len(self._opened.train))
        reading = self._reading("center") | {"process": 0, "processes": 1}  # the same on every host
        spread = Chosen(self._opened.train, np.arange(count) * len(self._opened.train) // count)
        with eval_batches(spread, batch_size=min(64, count), **reading) as batches:
            return np.concatenate([batch.images[batch.weights > 0] for batch in batches])


class Chosen:
    """Some of the examples."""

    def __init__(self, examples: datasets.Examples, indices: Int[np.ndarray, "n"]):
        self._examples, self._indices = examples, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> datasets.Example:
        return self._examples[int(self._indices[index])]


def load_dataset(config: Config) -> datasets.Dataset:
    """Loads the dataset of a config with the targets of its task, for devices.

    Raises:
      UserError: the dataset is missing or damaged, or the config crops images on the host.
    """
    data = config.data
    for name, value in (("train_crop", data.train_crop), ("eval_crop", data.eval_crop)):
        if value not in ("none", "center", "whole"):
            raise UserError(
                f"data.{name}={value} needs data.feed=stream: it crops images on the host"
            )
    if data.eval_crop == "whole" and not data.image_size:
        raise UserError(
            "data.eval_crop=whole pads images to squares of data.image_size; set it too"
        )
    return datasets.load(
        data.name,
        data.train_split,
        data.test_split,
        targets=find_task(config.task.name).targets,
        image_size=data.image_size,
        whole_images=data.eval_crop == "whole",
        on_bad_image=data.on_bad_image,
        classes=data.classes,
        per_class=data.per_class,
        subset_seed=data.subset_seed,
    )


def make_source(config: Config, backend: Backend) -> BatchSource:
    """Returns the source of a config: resident if `data.feed` says so, or if the dataset fits.

    Raises:
      UserError: fields for reading images contradict each other, the dataset is missing or damaged,
        or its training split is smaller than a batch.
    """
    opened = find_stream(config, backend.devices)
    source = Streamed(config, backend, opened) if opened else Resident(config, backend)
    size, examples = config.data.batch_size, source.examples["train"]
    if size > examples:
        chosen = " after data.classes and data.per_class"
        unit = batch_unit(config, backend.devices)
        raise UserError(
            f"data.batch_size={size} is larger than the training split of {config.data.name}, "
            f"{examples:,} images{chosen * bool(config.data.classes or config.data.per_class)}; "
            f"the largest batch is {examples // unit * unit or f'below the smallest one, {unit}'}"
        )
    return source


def feed(source: BatchSource) -> str:
    """Returns the value of `data.feed`, device or stream, that makes such a source."""
    return "stream" if source.streamed else "device"


def find_stream(config: Config, devices: int) -> datasets.OpenDataset | None:
    """Returns the dataset of a config if it is streamed, or None if it is resident.

    Raises:
      UserError: the dataset is missing or damaged, or a stream cannot be cut to a subset.
    """
    data = config.data
    if data.feed == "device":
        return None
    opened = datasets.open_dataset(
        data.name, data.train_split, data.test_split, targets=find_task(config.task.name).targets
    )
    if data.feed == "auto" and _fits(data, opened, devices):
        return None
    if data.classes or data.per_class:
        raise UserError(
            f"data.classes and data.per_class cannot choose from {data.name} as a stream, whose "
            "labels are not known before all is read; set data.feed=device"
        )
    return opened


def _fits(data: Data, opened: datasets.OpenDataset, devices: int) -> bool:
    """Returns whether the dataset can be resident: nothing is cropped on the host, and it fits."""
    if data.train_crop != "none" or data.eval_crop == "ten":
        return False
    if data.image_size:
        pixels = 3 * data.image_size**2
    elif opened.image_shape:
        pixels = int(np.prod(opened.image_shape))
    else:
        return False
    if "mask" in opened.targets:
        pixels += pixels // 3  # one channel beside three
    memory = device_memory()
    needed = pixels * (len(opened.train) + len(opened.test)) / devices
    return memory is None or needed <= RESIDENT_SHARE * memory
