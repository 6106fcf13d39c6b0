"""Reads the arrays of other libraries' weights files by name, without executing anything.

The format is recognized by a file's content. Arrays keep their names, which `naming` translates.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from resjax.data.npz import read_array
from resjax.disk import describe_disk_error
from resjax.errors import UserError, one_line
from resjax.transfer import keras_file, torch_file
from resjax.transfer.zipped import Archive

Format = Literal["safetensors", "torch", "keras", "npz"]

# The files of Hugging Face and timm beside a weights file, by their key in `metadata`.
METADATA_FILES = {"config": "config.json", "preprocessor": "preprocessor_config.json"}
# Keys that only the config.json of a network has; other programs write files of that name too.
CONFIG_KEYS = {"architecture", "architectures", "model_type", "pretrained_cfg", "depths"}
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"  # as Hugging Face and timm wrote before safetensors

# Files mistaken for weights: how they begin, and what is wrong with them.
_MISTAKEN = (
    (b"version https://git-lfs", "is a Git LFS pointer; get the file itself with git lfs pull"),
    (b"<", "is a web page; download the file itself"),
    (b"\x1f\x8b", "is compressed; unpack it with gunzip"),
    (b"\x80", "is a pickle that torch.save did not write; refused, nothing was executed"),
)


@dataclass(frozen=True)
class Arrays:
    """The content of a weights file.

    Attributes:
      arrays: by the file's names. Floats are converted to float32; integers are unchanged.
      format: of the file.
      metadata: `config` is the model's config of Hugging Face, timm or Keras; `preprocessor` is
        Hugging Face's; `header` is the text of a safetensors file; `architecture` is the network's
        name in a checkpoint of PyTorch. Those that exist.
      notes: what was chosen, converted or ignored, one line each.
    """

    arrays: dict[str, np.ndarray]
    format: Format
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_arrays(path: Path, key: str = "") -> Arrays:
    """Reads a weights file, or a folder with the layout of Hugging Face's hub.

    Args:
      path: of the file or folder.
      key: of a state dict in a checkpoint of PyTorch, such as `state_dict_ema`; empty selects the
        likeliest.

    Raises:
      UserError: the file is missing, damaged, of an unknown format, or holds no weights.
    """
    try:
        found = _read_folder(path, key) if path.is_dir() else _read_file(path, key)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {describe_disk_error(error)}") from error
    if not any(_is_float(array) for array in found.arrays.values()):
        raise UserError(f"{path}: holds no weights: none of its arrays contains floats")
    return _in_float32(found, path)


def _read_file(path: Path, key: str) -> Arrays:
    """Reads a file and the configs beside it."""
    found = _read_content(path, key)
    if key and found.format != "torch":
        raise UserError(f"{path}: --key={key} is for checkpoints of PyTorch")
    return replace(found, metadata={**_metadata(path.parent), **found.metadata})


def _read_content(path: Path, key: str) -> Arrays:
    with path.open("rb") as file:
        start = file.read(64)
        file.seek(0)
        if not start:
            raise UserError(f"{path}: is empty")
        if start.startswith(b"PK"):
            return _read_zip(Archive(path, file), key)
        if start.startswith(b"\x89HDF"):
            arrays, config = keras_file.read(path)
            return Arrays(arrays, "keras", {"config": config})
        if torch_file.is_legacy(start):
            return _of_torch(torch_file.read_legacy(path, file, key))
        if start[8:9] == b"{":
            return _read_safetensors(path)
    for beginning, what in _MISTAKEN:
        if start.lstrip().startswith(beginning):
            raise UserError(f"{path}: {what}")
    raise UserError(
        f"{path}: is not a known weights file: safetensors, torch's .pth, Keras's .h5 and .keras, "
        "or .npz"
    )


def _of_torch(found: torch_file.StateDict) -> Arrays:
    metadata = {"architecture": found.architecture} if found.architecture else {}
    return Arrays(found.arrays, "torch", metadata, found.notes)


def _read_zip(archive: Archive, key: str) -> Arrays:
    if any(name.endswith("data.pkl") for name in archive.sizes):
        return _of_torch(torch_file.read_zip(archive, key))
    if keras_file.WEIGHTS in archive.sizes:
        arrays, config = keras_file.read(archive.path)
        return Arrays(arrays, "keras", {"config": config})
    if archive.sizes and all(name.endswith(".npy") for name in archive.sizes):
        return Arrays(read_npz(archive), "npz")
    raise UserError(f"{archive.path}: is a zip archive without weights from torch, Keras or NumPy")


def read_npz(archive: Archive, kinds: str = "biufc") -> dict[str, np.ndarray]:
    """Returns the arrays of NumPy's .npz file, whose types are of these kinds.

    Raises:
      UserError: it is damaged, or would fill far more memory than its size.
    """
    arrays = {}
    for name in archive.sizes:
        content = archive.read(name)
        try:
            array = read_array(io.BytesIO(content), len(content))
            if array.dtype.kind not in kinds:
                raise ValueError(f"holds {array.dtype}, not numbers")
        except (ValueError, MemoryError, OverflowError) as error:
            raise UserError(f"{archive.path}: {name[:80]!r}: {one_line(error, 160)}") from error
        arrays[name.removesuffix(".npy")] = array
    return arrays


def _read_safetensors(path: Path) -> Arrays:
    from safetensors import SafetensorError, safe_open

    name, arrays = "", {}
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata()
            for name in sorted(file.keys()):
                arrays[name] = file.get_tensor(name)
    except AttributeError as error:
        raise UserError(f"{path}: {name[:80]!r} has a type that NumPy lacks: {error}") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: truncated or damaged safetensors ({one_line(error)})") from error
    return Arrays(arrays, "safetensors", {"header": header} if header else {})


def _metadata(folder: Path) -> dict[str, Any]:
    """Returns the configs of a network that exist in a folder."""
    paths = {key: folder / name for key, name in METADATA_FILES.items()}
    found = {key: _json(path) for key, path in paths.items() if path.is_file()}
    if not CONFIG_KEYS & found.get("config", {}).keys():
        found.pop("config", None)
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged, not JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object")
    return content


def _read_folder(folder: Path, key: str) -> Arrays:
    if (folder / INDEX).is_file() and not (folder / WHOLE).is_file():
        return _read_shards(folder)
    return _read_file(file_in(folder), key)


def file_in(folder: Path) -> Path:
    """Returns the weights file of a folder: the first shard if there are several.

    Raises:
      UserError: there is none, or it cannot be told which it is.
    """
    if (folder / WHOLE).is_file():
        return folder / WHOLE
    candidates = sorted(folder.glob("*.safetensors"))
    if not candidates and (folder / PICKLED).is_file():
        return folder / PICKLED
    if len(candidates) != 1 and not ((folder / INDEX).is_file() and candidates):
        what = "several safetensors files" if candidates else "no safetensors file"
        raise UserError(f"{folder}: has {what}; name one weights file")
    return candidates[0]


def _read_shards(folder: Path) -> Arrays:
    placed = _json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{folder / INDEX}: is damaged: it lists no weights")
    arrays: dict[str, np.ndarray] = {}
    for name in sorted({str(name) for name in placed.values()}):
        if Path(name).name != name:
            raise UserError(f"{folder / INDEX}: {name[:80]!r} is outside the folder; refused")
        arrays |= _read_safetensors(folder / name).arrays
    if missing := sorted(placed.keys() - arrays.keys()):
        raise UserError(f"{folder}: is damaged: its files lack {missing[0][:80]!r}")
    return Arrays(arrays, "safetensors", _metadata(folder))


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16


def _in_float32(found: Arrays, path: Path) -> Arrays:
    arrays: dict[str, np.ndarray] = {}
    converted: set[np.dtype] = set()
    for name, array in found.arrays.items():
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        arrays[name] = native
        if not _is_float(native) or native.dtype == np.float32:
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # NaNs stay NaNs
            arrays[name] = native.astype(np.float32)
            overflown = np.isinf(arrays[name]) & ~np.isinf(native)
        if overflown.any():
            raise UserError(f"{path}: {name[:80]!r} holds numbers beyond the range of float32")
        converted.add(native.dtype)
    notes = [
        f"{dtype.name} weights were converted to float32, "
        f"{'exactly' if dtype.itemsize < 4 else 'with rounding'}"
        for dtype in sorted(converted, key=str)
    ]
    return replace(found, arrays=arrays, notes=(*found.notes, *notes))
