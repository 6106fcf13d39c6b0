"""A few training examples as training reads them, for the contact sheet of `resjax data show`."""

import numpy as np

from resjax.config import Config
from resjax.data.normalization import compute_statistics
from resjax.data.sheet import DRAWS, Sample, choose
from resjax.train.init_from_weights import initial_weights, normalization_statistics
from resjax.train.parallel import make_backend
from resjax.train.sources import Streamed, find_stream, load_dataset


def training_sample(config: Config) -> tuple[Sample, str]:
    """Returns a sample of a config's training images, and the line that describes the dataset.

    Subset, size, crop and normalization are those of training; the batch size is ignored.

    Raises:
      UserError: fields contradict each other, or the dataset is missing or damaged.
    """
    data, backend = config.data, make_backend(config)
    if opened := find_stream(config, backend.devices):
        source = Streamed(config, backend, opened)
        chosen = choose(len(opened.train), config.seed)
        originals, crops = source.sample(chosen, DRAWS, config.seed)
        own, names = source.statistics, opened.class_names
        description = source.description
    else:
        dataset = load_dataset(config)
        originals = dataset.train[choose(len(dataset.train), config.seed)]
        crops = {name: np.stack([array] * DRAWS) for name, array in originals.arrays.items()}
        own = compute_statistics(
            dataset.train.images, data.normalization, colors=data.pca_lighting > 0
        )
        names, description = dataset.class_names, f"{data.name}: {dataset}"
    shape = originals.images.shape[1:]
    initial = initial_weights(config, shape[2])
    statistics = normalization_statistics(config, initial, own, shape)
    images = crops.pop("image")
    moved = {name: array for name, array in crops.items() if name != "label"}
    return Sample(originals, images, names, statistics, moved), description
