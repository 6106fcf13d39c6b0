"""Where a program's images come from: the device, on which the dataset lies, or a stream.

A small dataset lies on the devices, each holding its part, and batches are drawn in the compiled
step. A large one is read and decoded by worker processes; while a step runs the next batch is on
its way. Both show a step what is a function of the seed and the step's number alone.
"""

import re
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from resjax.config import Config, Data
from resjax.data import crops, datasets
from resjax.data.cache import cached_arrays
from resjax.data.normalization import Statistics, compute_statistics
from resjax.data.stream import Crop, eval_batches, stream
from resjax.errors import UserError
from resjax.machine import available_cores
from resjax.train.parallel import Backend, device_memory

RESIDENT_SHARE = 1 / 4  # of a device's memory, at most
SAMPLE = 2048  # images from which a stream's normalisation is computed

CROPS: dict[str, Callable[..., Any]] = {
    "none": crops.resize_and_center_crop,
    "random_resized": crops.random_resized_crop,
    "scale_jitter": crops.scale_jitter_crop,
    "center": crops.resize_and_center_crop,
    "ten": crops.ten_crop,
}


class Resident:
    """The dataset on the devices."""

    def __init__(self, config: Config, backend: Backend):
        data = config.data
        if asked := [
            f"data.{name}={value}"
            for name, value in (("train_crop", data.train_crop), ("eval_crop", data.eval_crop))
            if value not in ("none", "center")
        ]:
            raise UserError(f"{asked[0]} needs data.feed=stream: it crops images on the host")
        dataset = datasets.load(
            data.name,
            data.train_split,
            data.test_split,
            image_size=data.image_size,
            on_bad_image=data.on_bad_image,
            classes=data.classes,
            per_class=data.per_class,
            subset_seed=data.subset_seed,
        )
        self.class_names = dataset.class_names
        self.classes = len(dataset.class_names)
        self.image_shape = dataset.train.images.shape[1:]
        self.examples = {"train": len(dataset.train.labels), "test": len(dataset.test.labels)}
        self.skipped = dataset.skipped
        self.statistics = compute_statistics(
            dataset.train.images, data.normalization, colors=data.pca_lighting > 0
        )
        self._rows = backend.rows(dataset.train), backend.rows(dataset.test)

    def arrays(self, config: Config) -> tuple[Any, Any]:
        """What a dispatch of steps, and the evaluation, is given beside the state."""
        return self._rows


class Streamed:
    """The dataset on disk."""

    image_shape: Any

    def __init__(self, config: Config, backend: Backend, opened: datasets.OpenDataset):
        data = config.data
        self._data, self._parts = data, config.train.accumulation_steps
        self._backend, self._opened = backend, opened
        size, shape = data.image_size, opened.image_shape
        if size is None and shape is None:
            raise UserError(
                f"data.name={data.name}: its images may differ in size; set data.image_size, such "
                "as 224"
            )
        if data.image_size is None and (data.train_crop != "none" or data.eval_crop != "center"):
            raise UserError("data.train_crop and data.eval_crop need data.image_size")
        self._workers = available_cores() if data.workers is None else data.workers
        self._channels = shape[2] if shape else 3
        self.image_shape = (size, size, self._channels) if size else shape
        self.class_names = opened.class_names
        self.classes = len(opened.class_names)
        self.examples = {"train": len(opened.train), "test": len(opened.test)}
        self.skipped = 0
        self.statistics = self._statistics()

    def training(self, seed: int, first_step: int) -> Generator[Any, None, None]:
        """Batches on the devices, (parts, batch, ...) each, from a step on."""
        size = self._data.batch_size // self._parts
        feed = stream(
            self._opened.train,
            batch_size=size,
            seed=seed,
            first_step=first_step * self._parts,
            crop=self._crop(self._data.train_crop),
            on_bad_image=self._data.on_bad_image,
            **self._shared(),
        )
        with feed:
            while True:
                parts = [next(feed) for _ in range(self._parts)]
                self.skipped += sum(part.skipped for part in parts)
                images, labels = zip(*((part.images, part.labels) for part in parts), strict=True)
                yield self._backend.batches((np.stack(images), np.stack(labels)))

    def evaluation(self) -> Iterator[Any]:
        """Images, labels and weights on the devices, (1, batch, ...) each."""
        with self._in_order(self._opened.test, self._data.eval_crop) as feed:
            for batch in feed:
                self.skipped += batch.skipped
                arrays = batch.images[None], batch.labels[None], batch.weights[None]
                yield self._backend.batches(arrays)

    def arrays(self, config: Config) -> tuple[Any, Any]:
        """Of the shapes that `training` and `evaluation` give under `config`, to compile for."""
        parts, processes = config.train.accumulation_steps, jax.process_count()
        train = parts, config.data.batch_size // parts // processes
        test = 1, self._eval_batch(config.data) // processes
        crops_of_one = (10,) if self._data.eval_crop == "ten" else ()
        images = np.zeros((*train, *self.image_shape), np.uint8)
        crops = np.zeros((*test, *crops_of_one, *self.image_shape), np.uint8)
        return (
            self._backend.batches((images, np.zeros(train, np.int32))),
            self._backend.batches((crops, np.zeros(test, np.int32), np.zeros(test, np.float32))),
        )

    def _in_order(self, examples: datasets.Examples, crop: str) -> Any:
        return eval_batches(
            examples,
            batch_size=self._eval_batch(self._data),
            crop=self._crop(crop),
            on_bad_image=self._data.on_bad_image,
            **self._shared(),
        )

    def _shared(self) -> dict[str, Any]:
        return {
            "channels": self._channels,
            "workers": self._workers,
            "process": jax.process_index(),
            "processes": jax.process_count(),
        }

    def _crop(self, name: str) -> Crop | None:
        size = self._data.image_size
        return None if size is None else partial(CROPS[name], size=size)

    def _eval_batch(self, data: Data) -> int:
        """A multiple of the devices."""
        devices = self._backend.devices
        return -(-data.eval_batch_size // devices) * devices

    def _statistics(self) -> Statistics:
        """Of a sample of the training split; kept with a prepared set."""
        data, colors = self._data, self._data.pca_lighting > 0

        def computed() -> list[Any]:
            made = compute_statistics(self._sample(), data.normalization, colors=colors)
            return [part for part in made if part is not None]

        folder = datasets.prepared_folder(self._opened.train)
        if folder is None:
            return Statistics(*computed())
        what = f"{data.train_split or 'train'}-{data.image_size}-{data.normalization}"
        key = re.sub(r"[^\w-]+", "_", f"statistics-{what}")
        return Statistics(*cached_arrays(folder, key, Statistics._fields[: 2 + colors], computed))

    def _sample(self) -> Any:
        """Images spread evenly over the training split, as an evaluation crops them."""
        examples = self._opened.train
        count = min(SAMPLE, len(examples))
        spread = Spread(examples, count)
        shared = self._shared() | {"process": 0, "processes": 1}  # the same on every host
        with eval_batches(
            spread,
            batch_size=min(64, count),
            crop=self._crop("center"),
            on_bad_image=self._data.on_bad_image,
            **shared,
        ) as feed:
            return np.concatenate([batch.images[batch.weights > 0] for batch in feed])


class Spread:
    """Some examples of many, evenly spread."""

    def __init__(self, examples: datasets.Examples, count: int):
        self._examples, self._count = examples, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> datasets.Example:
        return self._examples[index * len(self._examples) // self._count]


def source(config: Config, backend: Backend) -> Resident | Streamed:
    """Where the images of a config come from.

    Raises:
      UserError: the config's fields for reading images cannot go together.
      DataError: the dataset is not here or not what it should be.
    """
    data = config.data
    if data.feed == "device":
        return Resident(config, backend)
    opened = datasets.open_dataset(data.name, data.train_split, data.test_split)
    if data.feed == "auto" and _fits(data, opened, backend.devices):
        return Resident(config, backend)
    if data.classes or data.per_class:
        raise UserError(
            f"data.classes and data.per_class cannot choose from {data.name} as a stream, whose "
            "labels are not known before all is read; set data.feed=device"
        )
    return Streamed(config, backend, opened)


def _fits(data: Data, opened: datasets.OpenDataset, devices: int) -> bool:
    """Whether the dataset goes onto the devices, and may."""
    if data.train_crop != "none" or data.eval_crop != "center":
        return False
    if data.image_size:
        pixels = 3 * data.image_size**2
    elif opened.image_shape:
        pixels = int(np.prod(opened.image_shape))
    else:
        return False
    room = device_memory()
    needed = pixels * (len(opened.train) + len(opened.test)) / devices
    return room is None or needed <= RESIDENT_SHARE * room
