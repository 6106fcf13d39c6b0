"""Reads Keras's weights as arrays named `LAYER/kernel`, `LAYER/gamma`, ... from any of its layouts.

Keras 1 and 2, and the files of `keras.applications`, have one group per layer, whose attributes are
the names of its weights. `.weights.h5` of Keras 3 has groups named by class and counter, whose
variables are numbered, and holds the layer's name as an attribute. A `.keras` file is a zip of
these weights and the model's config.json (keras-team/keras `saving/saving_lib.py` and
`legacy/saving/legacy_h5_format.py`).

A separate process reads each file first, because the HDF5 library may crash or loop on a damaged
one: of 1,420 copies of two small files, each with 1 to 16 bytes changed, it crashed on one and took
more than 5 s for two (h5py 3.16.0, Linux).
"""

import io
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from resjax.errors import UserError, one_line
from resjax.machine import module_search_path
from resjax.transfer.zipped import Archive

WEIGHTS, CONFIG = "model.weights.h5", "config.json"  # within a .keras file

# The variables of a layer in the order of their numbers, by its class as in the name of its group.
_VARIABLES = {
    "conv2d": ("kernel", "bias"),
    "dense": ("kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
}
# Keras 1 wrote other names; its `running_std` holds variances.
_OLD_NAMES = {
    "W": "kernel",
    "b": "bias",
    "running_mean": "moving_mean",
    "running_std": "moving_variance",
}

_TRIAL = """
import sys, pathlib
sys.path[:] = sys.argv[2:]
from resjax.transfer import keras_file
sys.exit(keras_file.try_out(pathlib.Path(sys.argv[1])))
"""
_REFUSED = 2  # exit code of a trial
_SECONDS, _SECONDS_PER_BYTE = 20, 1 / 10e6  # limits of a trial, which reads 300 MB per second

_Json = Mapping[str, Any]


# The arrays, with the file's types, and the model's config, which is empty if the file has none.
KerasFile = tuple[dict[str, np.ndarray], _Json]


def read(path: Path) -> KerasFile:
    """Reads a `.keras` file, or a `.h5` file of weights or of a whole model.

    Raises:
      UserError: h5py is not installed; the file is damaged, holds no weights, or does not name
        their layers.
    """
    try:
        import h5py  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{path}: Keras files need h5py; install it with pip install 'resjax[keras]'"
        ) from error
    # Isolated (-I), so that it imports nothing from the current folder.
    command = [sys.executable, "-I", "-c", _TRIAL, str(path.absolute()), *module_search_path()]
    limit = _SECONDS + _SECONDS_PER_BYTE * path.stat().st_size
    try:
        trial = subprocess.run(command, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{path}: is damaged: the HDF5 library does not finish reading it"
        ) from None
    if trial.returncode < 0:  # a signal
        raise UserError(f"{path}: is damaged: the HDF5 library crashes on it")
    if trial.returncode == _REFUSED:
        raise UserError(trial.stdout.decode())
    return _read(path)


def try_out(path: Path) -> int:
    """Reads a file, or prints why it is refused; returns the exit code of its own process."""
    try:
        _read(path)
    except UserError as error:
        sys.stdout.buffer.write(str(error).encode())
        return _REFUSED
    return 0


def _read(path: Path) -> KerasFile:
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            return _read_zip(Archive(path, file))
    return _read_h5(path)


def _read_zip(archive: Archive) -> KerasFile:
    config = _config(archive.read(CONFIG), archive.path)
    weights = archive.read(WEIGHTS)
    with _open(archive.path, io.BytesIO(weights)) as root:
        return _arrays(root, archive.path, len(weights), config), config


def _read_h5(path: Path) -> KerasFile:
    with _open(path, path) as root:
        config = _config(root.attrs.get("model_config", "{}"), path)
        return _arrays(root, path, path.stat().st_size, config), config


def _config(content: Any, path: Path) -> _Json:
    try:
        config = json.loads(content)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged: the model's config is not JSON") from error
    return config if isinstance(config, dict) else {}


@contextmanager
def _open(path: Path, file: Path | BinaryIO) -> Iterator[Any]:
    import h5py

    try:
        with h5py.File(file, "r") as root:
            yield root
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: truncated or damaged HDF5 file ({one_line(error)})") from error


def _arrays(root: Any, path: Path, size: int, config: _Json) -> dict[str, np.ndarray]:
    items = _items(root)
    if "model_weights" in items:
        root = items["model_weights"]
        items = _items(root)
    if "layer_names" in root.attrs:
        keys = dict(_by_name(map(_text, root.attrs["layer_names"]), items, path))
    else:
        keys = dict(_by_number(items, _layer_names(config), path))
    found = {name: _find(items, key, path) for name, key in keys.items()}
    if not found:
        raise UserError(f"{path}: holds no Keras weights: it names no layers")
    for key, item in zip(keys.values(), found.values(), strict=True):
        if not _is_plain(item):
            raise UserError(f"{path}: {key[:80]!r} is not a plain array; refused")
    if sum(dataset.nbytes for dataset in found.values()) > size:
        raise UserError(f"{path}: its arrays would fill more memory than the file; refused")
    return {name: dataset[()] for name, dataset in found.items()}


def _items(root: Any) -> dict[str, Any]:
    """Returns the groups and datasets below a group by path, each of them once.

    HDF5's visit follows no external or soft link, which could lead to any file or nowhere.
    """
    items: dict[str, Any] = {}
    root.visititems(items.__setitem__)
    return items


def _find(items: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in items:
        raise UserError(f"{path}: is damaged: it lacks {key[:80]!r}, or has a link there; refused")
    return items[key]


def _is_plain(item: Any) -> bool:
    """Returns whether an item is an array that Keras could have written.

    External storage and virtual datasets could read any file that the author names; compressed
    datasets may grow without bound.
    """
    import h5py

    plain = isinstance(item, h5py.Dataset) and item.dtype.kind in "biufc"
    return plain and item.chunks is None and not item.external and not item.is_virtual


def _by_name(
    layers: Iterable[str], items: Mapping[str, Any], path: Path
) -> Iterator[tuple[str, str]]:
    """Yields the weights of Keras 1 and 2, with their paths: each layer's group lists them."""
    for layer in layers:
        weights = [_text(name) for name in _find(items, layer, path).attrs["weight_names"]]
        modules = {name.rpartition("/")[0] for name in weights}
        # A nested model has several layers. A layer that was created twice in a session has
        # `conv1_1/kernel:0` in the group `conv1`.
        single = len(modules) == 1 and "/" not in modules.copy().pop()
        for name in weights:
            module, _, variable = name.rpartition("/")
            owner = layer if single else module.rpartition("/")[2]
            variable = variable.partition(":")[0].removeprefix(f"{layer}_")
            yield f"{owner}/{_OLD_NAMES.get(variable, variable)}", f"{layer}/{name}"


def _by_number(
    items: Mapping[str, Any], names: Mapping[str, str], path: Path
) -> Iterator[tuple[str, str]]:
    """Yields the weights of Keras 3, with their paths: groups `vars` hold them by number."""
    for key, item in items.items():
        owner, _, last = key.rpartition("/")
        if last != "vars" or owner.split("/")[0] == "optimizer":
            continue
        numbers = sorted(item, key=lambda number: (len(number), number))
        layer = _text(item.attrs.get("name", "")) or names.get(owner)
        if numbers and not layer:
            raise UserError(
                f"{path}: its layers have no names ({owner or 'the model'}); save the model as "
                ".keras, or its weights with a newer Keras 3"
            )
        kind = re.sub(r"_\d+$", "", owner.rpartition("/")[2])
        variables = _VARIABLES.get(kind, ())
        # A norm without scale or center has fewer, which cannot be told apart.
        if kind == "batch_normalization" and len(numbers) != len(variables):
            variables = ()
        for number in numbers:
            known = dict(zip(map(str, range(len(numbers))), variables, strict=False))
            yield f"{layer}/{known.get(number, number)}", f"{key}/{number}"


def _layer_names(config: _Json) -> dict[str, str]:
    """Maps the groups of layers to the layers' names, for files of the first Keras 3 versions."""
    counts: Counter[str] = Counter()
    names = {}
    inner = config.get("config")
    for layer in inner.get("layers", ()) if isinstance(inner, dict) else ():
        match layer:
            case {"class_name": str(kind), "config": {"name": str(name)}}:
                snake = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", kind))
                snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", snake).lower()
                suffix = f"_{counts[snake]}" if counts[snake] else ""
                counts[snake] += 1
                names[f"layers/{snake}{suffix}"] = name
    return names


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
