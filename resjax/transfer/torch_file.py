"""Weights that torch.save wrote, read without torch and without running what they hold.

A pickle is a program for a stack machine that may call any function of Python. Here Python's own
`_Unpickler` runs it, but every name in it becomes a stand-in of ours: a few build tensors and
dictionaries, all others accept anything and hold nothing. No name is imported. The position of
each tensor in its storage is checked before an array is made of it.

Formats: the zip archive of torch 1.6 and later (`data.pkl`, `data/0`, ...), and the one before,
a row of pickles followed by the storages (pytorch/pytorch `torch/serialization.py`).
"""

import io
import mmap
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes  # noqa: F401 - NumPy's bfloat16
import numpy as np

from resjax.errors import UserError, first_few, one_line
from resjax.text import printable
from resjax.transfer.naming import without_wrappers
from resjax.transfer.zipped import Archive, bound

_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a number, and the end of its pickle

# Where training scripts keep the network's state dict, the most common first.
STATE_DICT_KEYS = (
    *("state_dict", "model", "model_state_dict", "net", "network", "model_state"),
    *("model_ema", "state_dict_ema", "ema_state_dict"),
)
_BUDGET = 2_000_000  # reads and copied items; a ResNet's checkpoint takes some ten thousand
_MAX_DIMENSIONS = 64

_TYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "storage.UntypedStorage": "uint8",
}


class StateDict(NamedTuple):
    """The tensors of a checkpoint, and what it says about them."""

    arrays: dict[str, np.ndarray]  # in the file's order, with the file's types
    notes: tuple[str, ...] = ()  # what was chosen or ignored, one line each
    architecture: str = ""  # as the training script names it


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: np.dtype
    length: int  # in elements

    @property
    def nbytes(self) -> int:
        return self.length * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A view of a storage. Its fields come from a file; creating one checks them."""

    storage: _Storage
    dtype: np.dtype
    offset: int  # offset and strides are in elements
    size: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (isinstance(self.storage, _Storage) and isinstance(self.dtype, np.dtype)):
            raise ValueError("a tensor without a storage")
        if not (
            type(self.size) is type(self.strides) is tuple and len(self.size) <= _MAX_DIMENSIONS
        ):
            raise ValueError("a tensor without size and strides")
        if any(type(n) is not int or n < 0 for n in (self.offset, *self.size, *self.strides)):
            raise ValueError("a tensor of an impossible size")
        steps = [(n - 1) * step for n, step in zip(self.size, self.strides, strict=True)]
        elements = self.offset + (1 + sum(steps) if prod(self.size) else 0)
        if elements * self.dtype.itemsize > self.storage.nbytes:
            raise ValueError("a tensor that reaches beyond its storage")

    @property
    def nbytes(self) -> int:
        """The memory of a copy; sizes of 0 count as 1, because NumPy limits their product too."""
        return prod(max(n, 1) for n in self.size) * self.dtype.itemsize

    def array(self, data: bytes) -> np.ndarray:
        """Returns a copy of the tensor from the bytes of its storage."""
        if prod(self.size) == 0:
            return np.empty(self.size, self.dtype)
        itemsize = self.dtype.itemsize
        strides = [step * itemsize for step in self.strides]
        return np.ndarray(self.size, self.dtype, data, self.offset * itemsize, strides).copy()


class _StandIn:
    """Stands for every class, function and object that weights do not need; holds nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __call__(self, *_: Any) -> "_StandIn":
        return self

    append = extend = add = __setitem__ = __call__


class _Namespace(_StandIn):
    """Stands for a training script's options of argparse, which name the network."""

    __slots__ = ("options",)
    options: Any


class _TextDict(dict):
    """A dictionary that ignores keys other than text, which name no weights.

    The hashes of other keys could be made to collide, or to take forever.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is str:
            super().__setitem__(key, value)


def _ordered_dict(pairs: Iterable[tuple[Any, Any]] = ()) -> _TextDict:
    mapping = _TextDict()
    for key, value in pairs:
        mapping[key] = value
    return mapping


def _tensor(storage: Any, offset: Any, size: Any, strides: Any, *rest: Any) -> _Tensor:
    return _typed_tensor(storage, offset, size, strides, None, None, storage.dtype, *rest[2:])


def _typed_tensor(
    storage: Any,
    offset: Any,
    size: Any,
    strides: Any,
    _: Any,
    __: Any,
    dtype: Any,
    metadata: Any = None,
) -> _Tensor:
    if metadata:
        raise ValueError("a tensor that is conjugate or negative in its metadata alone")
    return _Tensor(storage, dtype, offset, size, strides)


def _parameter(tensor: Any, *_: Any) -> Any:
    if not isinstance(tensor, _Tensor | _StandIn):
        raise ValueError("a parameter that is no tensor")
    return tensor


_STAND_INS: Mapping[str, Any] = {
    **{f"torch.{name}": np.dtype(name) for name in _TYPES},
    **{f"torch.{storage}": np.dtype(name) for storage, name in _STORAGES.items()},
    "torch.Size": lambda sizes: tuple(sizes),  # a type could be changed by a file
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "argparse.Namespace": _Namespace,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda factory=None, *rest: _ordered_dict(*rest),
}


class _Budgeted:
    """A file whose reads are limited, and with them the time and memory that unpickling takes."""

    def __init__(self, file: Any):
        self._file, self._left = file, _BUDGET

    def spend(self, items: int) -> None:
        self._left -= items
        if self._left < 0:
            raise ValueError(f"it takes more than {_BUDGET:,} steps")

    def read(self, size: int) -> bytes:
        self.spend(1)
        return self._file.read(size)

    def readline(self) -> bytes:
        self.spend(1)
        return self._file.readline()


_PythonUnpickler: Any = pickle._Unpickler


def _charged(load: Callable[["_Unpickler"], None]) -> Callable[["_Unpickler"], None]:
    """Charges a call for what it may copy: arguments from the memo cost no bytes of the file."""

    def charged(self: "_Unpickler") -> None:
        arguments = self.stack[-1]
        if not isinstance(arguments, tuple):
            raise ValueError("a call without arguments")
        copied = [each for each in arguments if hasattr(each, "__len__")]
        self.budget.spend(len(arguments) + sum(map(len, copied)))
        load(self)

    return charged


class _Unpickler(_PythonUnpickler):
    """Python's unpickler, with stand-ins for every name and without the opcodes that could hurt.

    The implementation in Python, not that in C, whose opcodes cannot be replaced: real dictionaries
    and sets can be made to hash keys forever, and indices of the memo to fill the memory. joblib
    extends `dispatch` in the same way. Nothing on the stack can be called but the stand-ins, and
    nothing on it can be changed but lists, dictionaries of text and the memo.
    """

    def __init__(self, file: Any):
        self.budget = _Budgeted(file)
        super().__init__(self.budget, encoding="latin-1")
        self.storages: dict[str, _Storage] = {}
        self.ignored: dict[str, None] = {}  # names of what was not needed, in their order

    def find_class(self, module: str, name: str) -> Any:
        name = f"{module}.{name}"
        if name not in _STAND_INS:
            self.ignored[name] = None
        return _STAND_INS.get(name, _StandIn)

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), str(), int(length), *view) if (
                view in ([], [None]) and 0 <= length < 1 << 62
            ):
                storage = _Storage(key, dtype, length)
            case _:
                raise ValueError("a persistent id that names no storage")
        if self.storages.setdefault(key, storage).nbytes != storage.nbytes:
            raise ValueError("two storages of one name")
        return storage

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_ordered_dict(zip(items[::2], items[1::2], strict=True)))

    def load_build(self) -> None:
        attributes = self.stack.pop()  # hold no weights
        if isinstance(self.stack[-1], _Namespace):
            self.stack[-1].options = attributes

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(_StandIn())

    dispatch = {  # noqa: RUF012
        **_PythonUnpickler.dispatch,
        pickle.FRAME[0]: lambda self: self.read(8),  # so that the budget sees every read
        pickle.EMPTY_DICT[0]: lambda self: self.append(_TextDict()),
        pickle.DICT[0]: load_dict,
        pickle.EMPTY_SET[0]: lambda self: self.append(_StandIn()),
        pickle.FROZENSET[0]: load_frozenset,
        pickle.REDUCE[0]: _charged(_PythonUnpickler.load_reduce),
        pickle.NEWOBJ[0]: _charged(_PythonUnpickler.load_newobj),
        pickle.BYTEARRAY8[0]: _PythonUnpickler.load_binbytes8,  # allocates no more than there is
        pickle.BUILD[0]: load_build,
    }
    # torch writes none of these. They take objects from a registry of this process or from outside
    # of the file, or make calls that the budget does not see.
    for _opcode in (
        *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
        *(pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX),
    ):
        del dispatch[_opcode[0]]


def is_legacy(start: bytes) -> bool:
    """Returns whether a file that begins so has the format before torch 1.6."""
    return start.startswith(b"\x80") and _LEGACY_MAGIC in start[:32]


def read_zip(archive: Archive, key: str = "") -> StateDict:
    """Reads the archive of torch 1.6 and later.

    Args:
      archive: the file.
      key: of the state dict in the checkpoint, such as `state_dict_ema`; or empty.

    Raises:
      UserError: it is damaged or holds no weights.
    """
    path = archive.path
    pickled = next(name for name in archive.sizes if name.endswith("data.pkl"))
    folder = pickled.removesuffix("data.pkl")
    if any(member.startswith(f"{folder}code/") for member in archive.sizes):
        raise UserError(
            f"{path}: is a TorchScript program; save its weights with "
            "torch.save(program.state_dict(), ...)"
        )
    if archive.compressed:
        raise UserError(f"{path}: is a compressed archive, which torch does not write; refused")
    order = f"{folder}byteorder"
    if order in archive.sizes and archive.read(order).strip() != b"little":
        raise UserError(f"{path}: its numbers are big-endian; save it on another machine")

    checkpoint, unpickler = _unpickle(io.BytesIO(archive.read(pickled)), path)
    for storage in unpickler.storages.values():
        if archive.sizes.get(f"{folder}data/{storage.key}") != storage.nbytes:
            raise UserError(f"{path}: damaged, storage {storage.key[:80]!r} is not whole")

    return _state_dict(
        checkpoint, lambda name: archive.read(f"{folder}data/{name}"), unpickler.ignored, path, key
    )


def read_legacy(path: Path, file: BinaryIO, key: str = "") -> StateDict:
    """Reads the format of torch before 1.6; see `read_zip`.

    Raises:
      UserError: it is damaged or holds no weights.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        _unpickle(mapped, path)  # the magic number, which `is_legacy` has checked
        protocol, _ = _unpickle(mapped, path)
        system, _ = _unpickle(mapped, path)
        if protocol != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
            raise UserError(f"{path}: was written by an unknown version of torch or machine")
        checkpoint, unpickler = _unpickle(mapped, path)
        keys, _ = _unpickle(mapped, path)
        positions = dict(_positions(mapped, keys, unpickler.storages, path))
        if missing := unpickler.storages.keys() - positions.keys():
            raise UserError(f"{path}: damaged, it lacks storage {min(missing)[:80]!r}")
        return _state_dict(
            checkpoint, lambda name: mapped[positions[name]], unpickler.ignored, path, key
        )


def _positions(
    mapped: mmap.mmap, keys: Any, storages: Mapping[str, _Storage], path: Path
) -> Iterator[tuple[str, slice]]:
    """Yields where the bytes of each storage are; its length precedes them."""
    for key in keys if isinstance(keys, list) else [None]:
        storage = storages.get(key) if isinstance(key, str) else None
        length = int.from_bytes(mapped.read(8), "little")
        start = mapped.tell()
        if storage is None or length != storage.length or start + storage.nbytes > mapped.size():
            raise UserError(f"{path}: truncated or damaged, its storages are not whole")
        mapped.seek(start + storage.nbytes)
        yield storage.key, slice(start, start + storage.nbytes)


def _unpickle(pickled: Any, path: Path) -> tuple[Any, _Unpickler]:
    """Returns a pickle's value and its unpickler, and leaves `pickled` at the end of the pickle."""
    unpickler = _Unpickler(pickled)
    try:
        return unpickler.load(), unpickler
    except Exception as error:  # a damaged pickle fails in every possible way
        raise UserError(f"{path}: truncated or damaged pickle ({one_line(error)})") from error


def _state_dict(
    checkpoint: Any, read: Callable[[str], bytes], ignored: Iterable[str], path: Path, key: str
) -> StateDict:
    names = printable(first_few(name[:100] for name in ignored))
    found = {".".join(keys): tensors for keys, tensors in _mappings_of_tensors(checkpoint)}
    if not found:
        what = f" but objects of {names}" if names else ""
        raise UserError(
            f"{path}: holds no tensors by name{what}; save torch.save(model.state_dict(), ...)"
        )
    if key and key not in found:
        known = printable(first_few(filter(None, found)))
        raise UserError(
            f"{path}: holds no tensors under {key!r}; it has: {known or 'one dictionary'}"
        )
    chosen = key or max(found, key=lambda each: _likelihood(each, found[each]))
    tensors, notes = found[chosen], []
    if chosen:
        notes.append(f"its weights are those under {printable(chosen)!r}")
    modules = {without_wrappers(name) for name in tensors}
    for other in (printable(each) for each in found if each != chosen):
        if modules & {without_wrappers(name) for name in found.get(other, ())}:
            notes.append(f"it also holds weights under {other!r} (--key={other})")
    if names:
        notes.append(f"what its pickle calls was not executed: {names}")
    if sum(tensor.nbytes for tensor in tensors.values()) > bound(path):
        raise UserError(f"{path}: its tensors would fill far more memory than the file; refused")

    read_once = lru_cache(maxsize=1)(read)  # one storage may hold many tensors
    by_storage = sorted(tensors, key=lambda name: tensors[name].storage.key)
    arrays = {
        name: tensors[name].array(read_once(tensors[name].storage.key)) for name in by_storage
    }
    return StateDict(
        {name: arrays[name] for name in tensors}, tuple(notes), _architecture(checkpoint)
    )


def _architecture(checkpoint: Any) -> str:
    """Returns the network's name, as PyTorch's ImageNet example, timm or torchvision save it."""
    fields = checkpoint if isinstance(checkpoint, dict) else {}
    given = fields.get("args")
    options = getattr(given, "options", given)
    options = options if isinstance(options, dict) else {}
    for name in (fields.get("arch"), options.get("model"), options.get("arch")):
        if isinstance(name, str):
            return printable(name[:100])
    return ""


def _mappings_of_tensors(checkpoint: Any) -> Iterator[tuple[tuple[str, ...], dict[str, _Tensor]]]:
    """Yields mappings that hold tensors, after their keys: the checkpoint, its values, theirs."""
    queue: deque[tuple[tuple[str, ...], Any]] = deque([((), checkpoint)])
    seen = set()
    while queue:
        keys, value = queue.popleft()
        if not isinstance(value, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        if tensors := {name: each for name, each in value.items() if isinstance(each, _Tensor)}:
            yield keys, tensors
        if len(keys) < 2:
            queue.extend(((*keys, name), inner) for name, inner in value.items())


def _likelihood(key: str, tensors: Mapping[str, Any]) -> tuple[int, int]:
    """Ranks the mappings: under the first of STATE_DICT_KEYS, or else with the most tensors."""
    last = key.rpartition(".")[2]
    rank = STATE_DICT_KEYS.index(last) if last in STATE_DICT_KEYS else len(STATE_DICT_KEYS)
    return -rank, len(tensors)
