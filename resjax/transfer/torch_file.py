"""Weights that torch.save wrote, read without torch and without running what they hold.

A pickle is a program for a stack machine that may call any function of Python. Here it runs on a
machine of ours that knows the opcodes of plain data and a table of names, each of which stands for
something inert: whatever else a pickle calls is refused, and nothing of it is executed. Every
tensor's place in its storage is checked before an array is made of it.

Formats: the zip archive of torch 1.6 and later (`data.pkl`, `data/0`, ...), and the one before,
pickles in a row with the storages behind them (pytorch/pytorch `torch/serialization.py`).
"""

import io
import mmap
import pickletools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from resjax.errors import UserError
from resjax.transfer.zipped import Archive, bound

_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a number, and the end of its pickle

# Where training scripts keep the network's state dict, the better known first.
STATE_DICT_KEYS = (
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "network",
    "model_state",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
)
# What wrappers put before every name: DataParallel and torch.compile.
PREFIXES = ("module.", "_orig_mod.")

_MAX_STEPS = 2_000_000  # a ResNet's checkpoint with its optimiser takes some ten thousand
_MAX_DIMENSIONS = 64

_DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}
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
}


class StateDict(NamedTuple):
    """The tensors of a checkpoint."""

    arrays: dict[str, np.ndarray]  # in the file's order, of the file's types
    notes: tuple[str, ...]  # what was chosen, one line each


class _DamagedError(Exception):
    """The pickle is not what torch writes."""


class _RefusedError(Exception):
    """The pickle asks for what is not in the table."""


@dataclass(frozen=True)
class _Call:
    """What a pickle may call: makes inert values of inert values."""

    make: Callable[..., Any]


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
    storage: _Storage
    dtype: np.dtype
    offset: int  # this and the strides in elements
    size: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.size) * self.dtype.itemsize

    def array(self, data: bytes) -> np.ndarray:
        """A copy of it, from the bytes of its storage; its bounds have been checked."""
        if prod(self.size) == 0:
            return np.empty(self.size, self.dtype)
        elements = np.frombuffer(data, self.dtype)[self.offset :]
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(elements, self.size, strides).copy()


def is_legacy(start: bytes) -> bool:
    """Whether a file that begins so is of the format before torch 1.6, in any pickle protocol."""
    return start.startswith(b"\x80") and _LEGACY_MAGIC in start[:32]


def read_zip(archive: Archive) -> StateDict:
    """Reads the archive of torch 1.6 and later.

    Raises:
      UserError: it is damaged, calls what weights do not need, or holds no weights.
    """
    name = next(name for name in archive.sizes if name.endswith("data.pkl"))
    folder = name.removesuffix("data.pkl")
    if any(member.startswith(f"{folder}code/") for member in archive.sizes):
        raise UserError(
            f"{archive.path}: is a TorchScript program; save its weights with "
            "torch.save(program.state_dict(), ...)"
        )
    if archive.compressed:
        raise UserError(f"{archive.path}: is a compressed archive, as torch writes none; refused")
    if (
        f"{folder}byteorder" in archive.sizes
        and archive.read(f"{folder}byteorder").strip() != b"little"
    ):
        raise UserError(f"{archive.path}: its numbers are big-endian; save it on another machine")

    checkpoint, storages = _run(io.BytesIO(archive.read(name)), archive.path)
    for storage in storages.values():
        if archive.sizes.get(f"{folder}data/{storage.key}") != storage.nbytes:
            raise UserError(f"{archive.path}: damaged, storage {storage.key[:80]!r} is not whole")
    return _state_dict(
        checkpoint, lambda storage: archive.read(f"{folder}data/{storage.key}"), archive.path
    )


def read_legacy(path: Path, file: BinaryIO) -> StateDict:
    """Reads the format of torch before 1.6.

    Raises:
      UserError: it is damaged, calls what weights do not need, or holds no weights.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        _run(mapped, path)  # the magic number, by which it was recognised
        protocol, _ = _run(mapped, path)
        system, _ = _run(mapped, path)
        if protocol != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
            raise UserError(f"{path}: is of a version of torch or a machine that is not known here")
        checkpoint, storages = _run(mapped, path)
        keys, _ = _run(mapped, path)
        places = dict(_places(mapped, keys, storages, path))
        if missing := storages.keys() - places.keys():
            raise UserError(f"{path}: damaged, it lacks storage {min(missing)[:80]!r}")
        return _state_dict(checkpoint, lambda storage: mapped[places[storage.key]], path)


def _places(
    mapped: mmap.mmap, keys: Any, storages: Mapping[str, _Storage], path: Path
) -> Iterator[tuple[str, slice]]:
    """Where the bytes of every storage are: each has its length before it."""
    for key in keys if isinstance(keys, list) else [None]:
        storage = storages.get(key) if isinstance(key, str) else None
        length = int.from_bytes(mapped.read(8), "little")
        start = mapped.tell()
        if storage is None or length != storage.length or start + storage.nbytes > mapped.size():
            raise UserError(f"{path}: truncated or damaged, its storages are not whole")
        mapped.seek(start + storage.nbytes)
        yield storage.key, slice(start, start + storage.nbytes)


def _run(pickled: "_Readable", path: Path) -> tuple[Any, dict[str, _Storage]]:
    """What a pickle makes, and the storages that it names; leaves `pickled` behind its end."""
    machine = _Machine()
    try:
        return machine.run(pickled), machine.storages
    except _RefusedError as error:
        raise UserError(
            f"{path}: its pickle calls {error}; refused, nothing was executed; weights alone come "
            "from torch.save(model.state_dict(), ...)"
        ) from None
    except (_DamagedError, ValueError) as error:  # pickletools raises ValueError
        raise UserError(f"{path}: truncated or damaged pickle ({str(error)[:160]})") from error


def _state_dict(
    checkpoint: Any, read: Callable[[_Storage], bytes | memoryview], path: Path
) -> StateDict:
    where, chosen = _most_likely(checkpoint, path)
    notes = [f"its weights are those under {'.'.join(where)!r}"] if where else []
    tensors = {name: value for name, value in chosen.items() if isinstance(value, _Tensor)}
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        notes.append(f"{prefix!r} was taken from the front of every name")
    if sum(tensor.nbytes for tensor in tensors.values()) > bound(path):
        raise UserError(f"{path}: its tensors would fill far more memory than the file; refused")

    sharing: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        sharing.setdefault(tensor.storage.key, []).append(name)
    arrays: dict[str, np.ndarray] = {}
    for names in sharing.values():
        data = bytes(read(tensors[names[0]].storage))
        arrays |= {name: tensors[name].array(data) for name in names}
    return StateDict({name: arrays[name] for name in tensors}, tuple(notes))


def _most_likely(checkpoint: Any, path: Path) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """The mapping that is the network's state dict, and the keys that lead to it.

    One of STATE_DICT_KEYS if there is one, the first of them; else the mapping with most tensors
    among the checkpoint itself, its values and their values.
    """
    if isinstance(checkpoint, _Tensor):
        raise UserError(f"{path}: holds a tensor without a name; save model.state_dict()")
    found: list[tuple[tuple[str, ...], dict]] = []
    seen = set()
    level: list[tuple[tuple[str, ...], Any]] = [((), checkpoint)]
    for _ in range(3):
        deeper = []
        for keys, value in level:
            if not isinstance(value, dict) or id(value) in seen:
                continue
            seen.add(id(value))
            if any(isinstance(inner, _Tensor) for inner in value.values()):
                found.append((keys, value))
            deeper += [((*keys, name), inner) for name, inner in value.items()]
        level = deeper
    if not found:
        raise UserError(f"{path}: holds no tensors by name, so no weights")

    def likelihood(candidate: tuple[tuple[str, ...], dict]) -> tuple[int, int]:
        keys, mapping = candidate
        known = keys and keys[-1] in STATE_DICT_KEYS
        rank = -STATE_DICT_KEYS.index(keys[-1]) if known else -len(STATE_DICT_KEYS)
        return rank, sum(isinstance(value, _Tensor) for value in mapping.values())

    return max(found, key=likelihood)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


class _Machine:
    """The stack machine of pickles, for those of plain data, tensors and what _NAMES lists.

    It never recurses, never hashes or prints a value that it was made to build, and every opcode
    adds at most what it reads, so time and memory are bounded by the pickle's length.
    """

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # what lies below each mark
        self._memo: dict[int, Any] = {}

    def run(self, pickled: _Readable) -> Any:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):  # type: ignore[arg-type]
            if step > _MAX_STEPS:
                raise _DamagedError(f"more than {_MAX_STEPS:,} steps")
            if opcode.name in _LITERALS:
                self._stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            elif opcode.name not in _SILENT:
                raise _RefusedError(f"for opcode {opcode.name}")
        return self._pop()

    def _pop(self) -> Any:
        if not self._stack:
            raise _DamagedError("its stack is empty")
        return self._stack.pop()

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise _DamagedError(f"no {kind.__name__} where one is filled")
        return self._stack[-1]

    def mark(self, _: None) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def pop_mark(self, _: None) -> list[Any]:
        if not self._marked:
            raise _DamagedError("no mark where one is needed")
        items, self._stack = self._stack, self._marked.pop()
        return items

    def pop(self, _: None) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self.pop_mark(None)

    def duplicate(self, _: None) -> None:
        self._stack.append(self._top(object))

    def tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def marked_tuple(self, _: None) -> None:
        items = self.pop_mark(None)
        self._stack.append(tuple(items))

    def marked_list(self, _: None) -> None:
        items = self.pop_mark(None)
        self._stack.append(items)

    def marked_dict(self, _: None) -> None:
        items = self.pop_mark(None)
        self._stack.append({})
        self._set(items)

    def append(self, _: None) -> None:
        item = self._pop()
        self._top(list).append(item)

    def appends(self, _: None) -> None:
        items = self.pop_mark(None)
        self._top(list).extend(items)

    def set_item(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def set_items(self, _: None) -> None:
        self._set(self.pop_mark(None))

    def _set(self, items: list[Any]) -> None:
        self._top(dict).update(_mapping_of(zip(items[::2], items[1::2], strict=True)))

    def put(self, index: int | None) -> None:
        index = len(self._memo) if index is None else index
        if not 0 <= index < 1 << 32:
            raise _DamagedError("a value kept in an impossible place")
        self._memo[index] = self._top(object)

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise _DamagedError("a value that it never kept")
        self._stack.append(self._memo[index])

    def name(self, written: str) -> None:
        self._named(written.replace(" ", ".", 1))

    def stacked_name(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise _DamagedError("a name that is no text")
        self._named(f"{module}.{name}")

    def _named(self, name: str) -> None:
        if name not in _NAMES:
            raise _RefusedError(re.sub(r"[^\x20-\x7e]", "?", name[:100]))
        self._stack.append(_NAMES[name])

    def call(self, _: None) -> None:
        arguments, called = self._pop(), self._pop()
        if not isinstance(called, _Call) or not isinstance(arguments, tuple):
            raise _RefusedError("what is no function")
        self._stack.append(called.make(arguments))

    def attributes(self, _: None) -> None:
        """State dicts carry `_metadata`, which says nothing of their tensors."""
        self._pop()
        self._top(dict)

    def storage(self, _: None) -> None:
        match self._pop():
            case ("storage", np.dtype() as dtype, str(key), str(), int(length), *view) if (
                view in ([], [None]) and 0 <= length < 1 << 62
            ):
                storage = _Storage(key, dtype, length)
            case _:
                raise _DamagedError("a storage that is none")
        if self.storages.setdefault(key, storage).nbytes != storage.nbytes:
            raise _DamagedError("a storage of two sizes")
        self._stack.append(storage)


def _mapping_of(pairs: Iterable[Any]) -> dict[str, Any]:
    """What is not under a text names no weights, and keys of other types can be made to collide."""
    mapping: dict[str, Any] = {}
    for pair in pairs:
        match pair:
            case (str(key), value):
                mapping[key] = value
            case (_, _):
                pass
            case _:
                raise _DamagedError("a mapping whose items are no pairs")
    return mapping


def _ordered_dict(arguments: tuple) -> dict:
    match arguments:
        case ():
            return {}
        case (list(pairs),):
            return _mapping_of(pairs)
    raise _DamagedError("a mapping that is none")


def _size(arguments: tuple) -> tuple:
    match arguments:
        case (tuple(size) | list(size),):
            return tuple(size)
    raise _DamagedError("a size that is none")


def _tensor(arguments: tuple) -> _Tensor:
    match arguments:
        case (_Storage() as storage, int(offset), tuple(size), tuple(strides), *rest):
            return _within_bounds(storage, storage.dtype, offset, size, strides, rest[2:])
    raise _DamagedError("a tensor that is none")


def _tensor_of_type(arguments: tuple) -> _Tensor:
    match arguments:
        case (
            _Storage() as storage, int(offset), tuple(size), tuple(strides),
            _, _, np.dtype() as dtype, *rest,
        ):  # fmt: skip
            return _within_bounds(storage, dtype, offset, size, strides, rest)
    raise _DamagedError("a tensor that is none")


def _within_bounds(
    storage: _Storage, dtype: np.dtype, offset: int, size: tuple, strides: tuple, metadata: list
) -> _Tensor:
    if any(metadata):
        raise _DamagedError("a tensor that is conjugate or negative in its metadata alone")
    if len(size) != len(strides) or len(size) > _MAX_DIMENSIONS:
        raise _DamagedError("a tensor whose size and strides do not fit")
    if not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in (offset, *size, *strides)):
        raise _DamagedError("a tensor of an impossible size")
    length = storage.nbytes // dtype.itemsize
    if prod(size) == 0:
        last = offset - 1
    else:
        last = offset + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True))
    if last >= length or prod(max(n, 1) for n in size) >= 1 << 48:
        raise _DamagedError("a tensor that reaches beyond its storage")
    return _Tensor(storage, dtype, offset, size, strides)


def _parameter(arguments: tuple) -> _Tensor:
    match arguments:
        case (_Tensor() as tensor, *_):
            return tensor
    raise _DamagedError("a parameter that is none")


_NAMES: dict[str, Any] = {
    **{f"torch.{name}": np.dtype(dtype) for name, dtype in _DTYPES.items()},
    **{f"torch.{name}": np.dtype(_DTYPES[dtype]) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
    "torch.Size": _Call(_size),
    "torch.device": _Call(lambda arguments: None),
    "torch._utils._rebuild_tensor": _Call(_tensor),
    "torch._utils._rebuild_tensor_v2": _Call(_tensor),
    "torch._utils._rebuild_tensor_v3": _Call(_tensor_of_type),
    "torch._utils._rebuild_parameter": _Call(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Call(_parameter),
    "collections.OrderedDict": _Call(_ordered_dict),
}

# The opcodes, by what they do (CPython's Lib/pickletools.py has them all).
_SILENT = {"PROTO", "FRAME", "STOP"}
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.duplicate,
    "TUPLE": _Machine.marked_tuple,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": _Machine.marked_list,
    "DICT": _Machine.marked_dict,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stacked_name,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.attributes,
    "BINPERSID": _Machine.storage,
}
