"""Reads `.npz` files from strangers: no pickles, and no more memory than the file justifies."""

import zipfile
import zlib
from collections.abc import Collection
from math import prod
from pathlib import Path

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
    """Returns those of the arrays `names` that a file holds, and the names of all its arrays.

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
            return {name: _read(archive, member) for name, member in wanted.items()}, list(members)
    except DataError:
        raise
    # NumPy and zipfile raise these for damaged files and other files.
    except (
        *(OSError, ValueError, TypeError, EOFError, MemoryError, OverflowError, RuntimeError),
        *(NotImplementedError, SyntaxError, zipfile.BadZipFile, zlib.error),
    ) as error:
        raise DataError(f"{path}: cannot be read as an .npz file: {one_line(error)}") from error


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in read_header:
            raise ValueError(f"{member.filename}: unknown version {version}")
        shape, _, dtype = read_header[version](file)
        if dtype.hasobject:
            raise ValueError(f"{member.filename}: holds objects")
        # NumPy allocates what the header claims.
        if (claimed := prod(shape) * dtype.itemsize) != member.file_size - file.tell():
            raise ValueError(f"{member.filename}: not of the {claimed:,} bytes that it claims")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
