"""Reads `.npz` files from strangers: no pickles, and no more memory than the file justifies."""

import zipfile
import zlib
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from resjax.data.examples import DataError
from resjax.errors import one_line

# A compressed file may grow to a multiple of its size, or to a minimum. Images with a black
# background reach about 20; a file of zeros, which fills the memory, reaches 1,000.
EXPANSION, FLOOR = 100, 1 << 26


def memory_bound(path: Path, expansion: int = EXPANSION) -> int:
    """Returns how many bytes the content of a compressed file may fill."""
    return max(expansion * path.stat().st_size, FLOOR)


def read_npz(path: Path, names: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reads the arrays with these names, as far as they exist, and returns the names of all too.

    Raises:
      DataError: the file is missing or damaged, holds objects, or would fill the memory.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {each.filename.removesuffix(".npy"): each for each in archive.infolist()}
            wanted = {name: members[name] for name in names if name in members}
            size = sum(member.file_size for member in wanted.values())
            if size > memory_bound(path):
                raise DataError(
                    f"{path}: {size / 1e6:,.0f} MB in a file of {path.stat().st_size / 1e6:,.1f} "
                    "MB; if that is right, save it with numpy.savez, uncompressed"
                )
            arrays = {}
            for name, member in wanted.items():
                with archive.open(member) as file:
                    arrays[name] = read_array(file, member.file_size)
            return arrays, list(members)
    except DataError:
        raise
    # NumPy and zipfile raise these for files that are damaged or of another format.
    except (
        *(OSError, ValueError, TypeError, EOFError, MemoryError, OverflowError, RuntimeError),
        *(NotImplementedError, SyntaxError, zipfile.BadZipFile, zlib.error),
    ) as error:
        raise DataError(f"{path}: cannot be read as an .npz file: {one_line(error)}") from error


def read_array(file: IO[bytes], size: int) -> np.ndarray:
    """Reads an .npy file of `size` bytes.

    Raises:
      ValueError: it holds objects, or not the numbers that its header claims, for which NumPy would
        allocate memory.
    """
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"has version {version} of the format")
    shape, _, dtype = read_header(file)
    expected, left = prod(shape) * dtype.itemsize, size - file.tell()
    if not dtype.hasobject and expected != left:
        raise ValueError(f"expected {expected} bytes got {left}")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)
