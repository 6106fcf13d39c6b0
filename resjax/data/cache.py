"""What was decoded and computed, beside the set that it comes from: reading takes half a minute.

An array is two files, `NAME.npy` and `NAME.sha256`; one whose digest does not fit is as good as
none. Where the folder cannot be written nothing is kept.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from resjax.data.examples import Split
from resjax.disk import atomic_file, write_atomically

FOLDER = "resjax"  # inside the prepared set's


def cached(folder: Path, key: str, examples: int, decode: Callable[[], Split]) -> Split:
    """Gives a split from the cache, or decodes and keeps it.

    Args:
      folder: of the prepared set.
      key: names the split, and all that its arrays depend on.
      examples: how many it has; arrays that lack some, because they were bad, are not kept.
      decode: reads the split.
    """
    return Split(*kept(folder, key, Split._fields, decode, lambda split: len(split[1]) == examples))


def kept(
    folder: Path,
    key: str,
    parts: Sequence[str],
    make: Callable[[], Sequence[np.ndarray]],
    keeps: Callable[[Sequence[np.ndarray]], bool] = lambda _: True,
) -> Sequence[np.ndarray]:
    """Gives arrays, one for each of `parts`, from the cache; or makes them, and keeps them there.

    Arguments as of `cached`; `keeps` says of what was made whether it is worth keeping.
    """
    paths = [folder / FOLDER / f"{key}-{part}.npy" for part in parts]
    found = [array for path in paths if (array := _read(path)) is not None]
    if len(found) == len(paths):
        return found
    made = make()
    if keeps(made):
        with contextlib.suppress(OSError):  # read-only, or full
            (folder / FOLDER).mkdir(exist_ok=True)
            for path, array in zip(paths, made, strict=True):
                _write(path, array)
    return made


def _read(path: Path) -> np.ndarray | None:
    with contextlib.suppress(OSError):  # not there, or not for us to read
        digest = path.with_suffix(".sha256").read_text()
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                file.seek(0)
                return np.load(file)
    return None


def _write(path: Path, array: np.ndarray) -> None:
    """Writes the array, then its digest, each whole or not at all."""
    with atomic_file(path) as file:
        np.save(file, array)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    write_atomically(path.with_suffix(".sha256"), digest)
