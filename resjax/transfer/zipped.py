"""Zip archives from strangers: members are read into memory, within bounds, and never extracted."""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from resjax.errors import UserError, one_line

# What a file may become in memory, as a multiple of its size, and whatever its size. Weights hardly
# compress, so that more is a bomb.
EXPANSION, FLOOR = 16, 1 << 26

# What the standard library raises for archives that are damaged or of a kind that it lacks.
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
    """The most bytes that a file's arrays may fill."""
    return max(EXPANSION * path.stat().st_size, FLOOR)


class Archive:
    """An open zip archive.

    Attributes:
      path: of the file.
      sizes: bytes of every member, by name.

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
                f"{path}: unpacked it would fill more than {EXPANSION} times its size; refused"
            )

    def read(self, name: str) -> bytes:
        """A member's content, whose checksum is right.

        Raises:
          UserError: it is missing or damaged.
        """
        if name not in self.sizes:
            raise UserError(f"{self.path}: damaged, it lacks {name[:80]!r}")
        try:
            return self._zip.read(name)
        except _ERRORS as error:
            raise self.damaged(error) from error

    def damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: truncated or damaged zip archive ({one_line(error)})")
