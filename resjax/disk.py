"""Files that appear whole or not at all, and folders in which a changed file is noticed.

SHA256SUMS lists the files of a folder with their digests; `sha256sum -c SHA256SUMS` checks it too.
"""

import errno
import hashlib
import itertools
import os
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path

from resjax.errors import UserError, one_line
from resjax.text import encodable

CHECKSUMS = "SHA256SUMS"


class DamagedError(Exception):
    """A file is not what was saved; the message says which, without a subject before it."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BufferedRandom]:
    """Opens a binary file that replaces `path` when the context ends without an error.

    Until then it has another name in the same folder. It is flushed to the disk before it is
    renamed, and removed after an error, which leaves `path` as it was.

    Raises:
      OSError: the folder does not exist or cannot be written.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    try:
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes) -> Path:
    r"""Writes text or bytes through `atomic_file` and returns `path`.

    Text becomes UTF-8; a file name of other bytes becomes `\udcff`, which JSON reads as the name.
    """
    with atomic_file(path) as file:
        file.write(encodable(content).encode() if isinstance(content, str) else content)
    return path


def write_checksums(folder: Path, unlisted: Collection[str] = ()) -> None:
    """Writes the list of a folder's files and their digests, without those that are `unlisted`."""
    names = {str(path.relative_to(folder)): path for path in _files(folder)}
    lines = [f"{digest(path)}  {name}\n" for name, path in names.items() if name not in unlisted]
    write_atomically(folder / CHECKSUMS, "".join(lines))


def verify_checksums(folder: Path, unlisted: Collection[str] = ()) -> None:
    """Compares a folder's files with the list of their digests.

    Args:
      folder: that `write_checksums` listed.
      unlisted: files that must exist, but are written after the list, with any content.

    Raises:
      DamagedError: a file is missing, has changed, or is not listed.
    """
    try:
        lines = (folder / CHECKSUMS).read_text("utf-8").splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        files = {str(path.relative_to(folder)): path for path in _files(folder)}
        if missing := sorted((listed.keys() | {*unlisted}) - files.keys()):
            raise DamagedError(f"{missing[0]} is missing")
        if unexpected := sorted(files.keys() - listed.keys() - {*unlisted}):
            raise DamagedError(f"unexpected file {unexpected[0]}")
        for name, expected in listed.items():
            if name not in unlisted and digest(files[name]) != expected:
                raise DamagedError(f"{name} changed since it was saved")
    except FileNotFoundError as error:
        raise DamagedError(f"{CHECKSUMS} is missing") from error
    except (ValueError, OSError) as error:
        raise DamagedError(f"its files cannot be read ({one_line(error, 200)})") from error


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unused_path(folder: Path, name: str) -> Path:
    """Returns a path in `folder` that does not exist: `name`, `name-2`, `name-3`, ..."""
    suffixes = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(path for end in suffixes if not (path := folder / f"{name}{end}").exists())


def describe_disk_error(error: BaseException) -> str:
    """Returns the system's words for a disk error, whichever library raised it."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EIO):
        if os.strerror(code).lower() in str(error).lower():
            return os.strerror(code)
    return one_line(error)


@contextmanager
def report_disk_errors(
    folder: Path, advice: str = "fix that and launch the same command again"
) -> Iterator[None]:
    """Turns errors of the disk into one line; what was written before stays.

    Libraries report a full disk as a RuntimeError too. A pipe that is closed is no disk.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise UserError(
            f"{folder}: cannot write to this folder: {describe_disk_error(error)}; {advice}"
        ) from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
