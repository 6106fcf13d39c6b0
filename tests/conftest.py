"""Small datasets in TFDS's format and in folders, photographs, and scripts as modules."""

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image
from sklearn.datasets import load_sample_images

# On a shared machine, hypothesis must not fail a slow example.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


ROOT = Path(__file__).parents[1]

# All processes of a session share what they compile, and leave nothing in the user's own cache.
SESSION_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    SESSION_CACHE = tempfile.mkdtemp(prefix="resjax-tests-")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": SESSION_CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
    }

# A test runs what it jits once or twice, and XLA's defaults take several times as long to compile
# it. Tests of what options do to a result name the options; see `default_compile`.
OLD_JAX = version("jax").startswith("0.10.")  # later ones have no such emitters
QUICK_FLAGS = "--xla_backend_optimization_level=0"
if OLD_JAX:
    QUICK_FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK_FLAGS)


def pytest_unconfigure() -> None:
    if SESSION_CACHE:
        shutil.rmtree(SESSION_CACHE, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def quick_trainers() -> Iterator[None]:
    """Compiles steps and evaluations quickly; child processes compile them as users' runs do."""
    from resjax.xla.compile_options import quick_compile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resjax.train.trainer.step_compile", quick_compile)
        yield


@pytest.fixture(scope="session", autouse=True)
def tables_leave_the_users_caches_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.getbasetemp() / "caches"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resjax.analysis.row_cache.user_caches", lambda: folder)
        yield


@pytest.fixture(scope="module")
def compile_as_users() -> Iterator[None]:
    """Compiles steps and evaluations with the options of users' runs, within a test file."""
    from resjax.train.trainer import _cached_trainer
    from resjax.xla.compile_options import step_compile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resjax.train.trainer.step_compile", step_compile)
        _cached_trainer.cache_clear()
        yield
    _cached_trainer.cache_clear()


@pytest.fixture(scope="session")
def default_compile() -> dict[str, Any]:
    """Options of `jax.jit` that are XLA's defaults outside of the tests."""
    options: dict[str, Any] = {"xla_backend_optimization_level": 3}
    return options | ({"xla_cpu_use_fusion_emitters": True} if OLD_JAX else {})


@pytest.fixture(scope="session")
def script() -> Iterator[Callable[[str], ModuleType]]:
    """Imports an experiment or a benchmark by name, so that child processes can too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "experiments")
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts a headless browser; see browser.py."""
    from tests import browser

    with browser.start(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="session")
def float64_trainer() -> Iterator[ModuleType]:
    """Imports tests/float64_trainer.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        yield importlib.import_module("float64_trainer")


@pytest.fixture(scope="session")
def read_within():
    """Reads files in a process of limited memory: `read_within(function, paths, megabytes)`.

    Returns what tests/limits.py prints, by the name of the file.
    """

    def read(function, paths, megabytes):
        script = Path(__file__).parent / "limits.py"
        command = [sys.executable, str(script), function, str(megabytes), *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
        found = [json.loads(line) for line in done.stdout.splitlines()]
        return {Path(each["path"]).name: each for each in found}

    return read


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty folder of prepared datasets."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


@pytest.fixture
def write_set(data_folder):
    """Prepares a dataset with TFDS: `write_set(name, features, splits)`."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    tfds.disable_progress_bar()

    def write(name, features, splits, version="1.0.0", shards=None):
        with registered.skip_registration():

            class Builder(tfds.core.GeneratorBasedBuilder):
                VERSION = tfds.core.Version(version)

                def _info(self):
                    return self.dataset_info_from_configs(
                        features=tfds.features.FeaturesDict(features)
                    )

                def _split_generators(self, dl_manager):
                    return {split: enumerate(records) for split, records in splits.items()}

                def _generate_examples(self):
                    raise NotImplementedError

        Builder.name = name
        config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=shards)
        builder = Builder(data_dir=data_folder, file_format="array_record")
        builder.download_and_prepare(download_config=config)
        return Path(builder.data_path)

    return write


@pytest.fixture
def write_images(write_set):
    """Prepares images and labels with TFDS: `write_images(name, train=records, test=records)`."""
    import tensorflow_datasets as tfds

    def write(name="shapes", shape=(4, 4, 3), classes=3, shards=None, **splits):
        features = {
            "image": tfds.features.Image(shape=shape),
            "label": tfds.features.ClassLabel(num_classes=classes),
        }
        return write_set(name, features, splits, shards=shards)

    return write


@pytest.fixture
def noise():
    """Records for TFDS: `noise(count, shape, classes)`."""

    def records(count, shape=(4, 4, 3), classes=3, seed=0):
        generator = np.random.default_rng(seed)
        images = generator.integers(0, 256, (count, *shape), np.uint8)
        return [
            {"image": io.BytesIO(png(image)), "label": index % classes}
            for index, image in enumerate(images)
        ]

    return records


def png(array, **options):
    file = io.BytesIO()
    Image.fromarray(array.squeeze()).save(file, "PNG", **options)
    return file.getvalue()


@pytest.fixture
def write_folder(tmp_path):
    """Writes image files: `write_folder({"train/cat/1.png": array or bytes})`."""

    def write(files):
        for name, content in files.items():
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else png(content))
        return tmp_path / "images"

    return write


@pytest.fixture(scope="session")
def photos() -> np.ndarray:
    """40 tiles of two of scikit-learn's photographs: (40, 32, 32, 3)."""
    side, (rows, columns) = 32, (13, 20)
    tiles = [
        photo[: rows * side, : columns * side]
        .reshape(rows, side, columns, side, 3)
        .swapaxes(1, 2)
        .reshape(-1, side, side, 3)
        for photo in load_sample_images().images
    ]
    return np.concatenate(tiles)[::13]
