"""A network that has begun to learn digits, and the test digits as files."""

import pytest
from PIL import Image

from resjax.config import default_config, override, resolve
from resjax.data import datasets
from resjax.train.load_weights import load_weights
from resjax.train.loop import train

SMALL = {
    "model.family": "cifar",
    "model.depth": 8,
    "model.width": 4,
    "data.batch_size": 64,
    "train.steps": 60,
    "train.log_every": 20,
    "train.eval_every": 20,
    "train.checkpoint_every": 20,
}


@pytest.fixture(scope="session")
def train_small():
    """A function from overrides and a folder: trains there and returns it."""

    def train_small(workdir, **overrides):
        fields = SMALL | {name.replace("__", "."): value for name, value in overrides.items()}
        train(resolve(override(default_config(), fields)), workdir)
        return workdir

    return train_small


@pytest.fixture(scope="session")
def run(train_small, tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="session")
def weights(run):
    return load_weights(run)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The test images as files, and their labels."""
    folder = tmp_path_factory.mktemp("digits")
    test = datasets.load("digits").test
    images, labels = test.images, test.labels
    paths = []
    for index, image in enumerate(images):
        paths.append(folder / f"{index:03}.png")
        Image.fromarray(image[..., 0]).save(paths[-1])
    return paths, labels
