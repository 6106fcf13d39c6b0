"""Reads untrusted zip archives: members are read into memory, within bounds, never extracted."""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from resjax.data.npz import memory_bound
from resjax.errors import UserError, one_line

# The memory that a file may fill, as a multiple of its size: weights hardly compress.
EXPANSION = 16

# What the standard library raises for archives that are damaged or not supported.
_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


def bound(path: Path) -> int:
    """Returns how many bytes the arrays of a file may fill."""
    return memory_bound(path, EXPANSION)


class Archive:
    """An open zip archive.

    Attributes:
      path: of the file.
      sizes: bytes of each member, by name.
      compressed: whether any member is compressed.

    Raises:
      UserError: it is damaged, or would fill more memory than `bound` allows.
    """

    def __init__(self, path: Path, file: BinaryIO):
        self.path = path
        try:
            self._zip = zipfile.ZipFile(file)
        except _ERRORS as error:
            raise self.damaged(error) from error
        members = self._zip.infolist()
        self.sizes = {member.filename: member.file_size for member in members}
        self.compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if sum(member.file_size for member in members) > bound(path):
            raise UserError(
                f"{path}: would fill more than {EXPANSION} times its size in memory; refused"
            )

    def read(self, name: str) -> bytes:
        """Returns the content of a member and verifies its checksum.

        Raises:
          UserError: it is missing or damaged.
        """
        if name not in self.sizes:
            raise UserError(f"{self.path}: is damaged: it lacks {name[:80]!r}")
        try:
            with self._zip.open(name) as member:  # reads no more than the size that was checked
                return member.read(self.sizes[name])
        except _ERRORS as error:
            raise self.damaged(error) from error

    def damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: truncated or damaged zip archive ({one_line(error)})")
