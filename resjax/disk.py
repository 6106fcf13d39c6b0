"""Files that appear whole or not at all, and folders that tell when one of their files changed.

A seal, SHA256SUMS, lists a folder's files, as sha256sum writes it: `sha256sum -c` understands it.
"""

import errno
import hashlib
import os
import tempfile
from collections.abc import Collection
from pathlib import Path

CHECKSUMS = "SHA256SUMS"


class DamagedError(Exception):
    """What was saved is not what is there; says what of it."""


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Writes `content` to `path`, replacing what was there, and returns `path`.

    The text (as UTF-8) or bytes go to another file of the folder first, which is flushed to the
    disk and renamed.

    Raises:
      OSError: the folder is missing or cannot be written; `path` is then as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # temporary files are for their owner alone
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path


def write_checksums(folder: Path) -> None:
    """Lists a folder's files, with their digests, in a file of their own."""
    lines = [f"{digest(path)}  {path.relative_to(folder)}\n" for path in _files(folder)]
    write_atomically(folder / CHECKSUMS, "".join(lines))


def verify_checksums(folder: Path, unsealed: Collection[str] = ()) -> None:
    """Compares a folder's files with its seal.

    Args:
      folder: that was sealed.
      unsealed: files that must be there, and may have come after the seal.

    Raises:
      DamagedError: one is missing, is another, or is not of the folder.
    """
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        there = {str(path.relative_to(folder)): path for path in _files(folder)}
        if missing := sorted(listed.keys() - there.keys()):
            raise DamagedError(f"{missing[0]} is missing")
        if foreign := sorted(there.keys() - listed.keys() - {*unsealed}):
            raise DamagedError(f"{foreign[0]} is not of it")
        if not {*unsealed} <= there.keys():
            raise DamagedError("it is incomplete")
        for name, expected in listed.items():
            if digest(there[name]) != expected:
                raise DamagedError(f"{name} changed since it was saved")
    except FileNotFoundError as error:
        raise DamagedError(f"{CHECKSUMS} is missing") from error
    except (ValueError, OSError) as error:
        raise DamagedError(f"its files cannot be read ({summarize(error)})") from error


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unused_path(folder: Path, name: str) -> Path:
    """A path in `folder` that is not taken."""
    numbered = (folder / f"{name}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 10**6))))
    return next(path for path in numbered if not path.exists())


def describe_disk_error(error: BaseException) -> str:
    """An error of a disk in a few words, whichever library wrote to it."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EIO):
        if os.strerror(code).lower() in str(error).lower():
            return os.strerror(code)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def summarize(error: BaseException) -> str:
    """The first line of what a library says."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
