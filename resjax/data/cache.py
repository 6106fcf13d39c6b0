"""A cache of decoded images and statistics, inside the folder of the prepared dataset.

Each array is two files, `NAME.npy` and `NAME.sha256`. An array whose digest differs is computed
again; a folder that cannot be written makes this slower, but is no error.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from resjax.disk import atomic_file, digest, write_atomically

FOLDER = "resjax"


def cached_arrays(
    folder: Path,
    key: str,
    names: Sequence[str],
    compute: Callable[[], Sequence[np.ndarray]],
    worth_caching: Callable[[Sequence[np.ndarray]], bool] = lambda _: True,
) -> Sequence[np.ndarray]:
    """Returns arrays from the cache, or computes and caches them.

    Args:
      folder: of the prepared dataset.
      key: identifies the arrays; it contains everything that they depend on.
      names: one for each array.
      compute: returns the arrays.
      worth_caching: of the computed arrays, whether to cache them.
    """
    paths = [folder / FOLDER / f"{key}-{name}.npy" for name in names]
    cached = [array for path in paths if (array := _read(path)) is not None]
    if len(cached) == len(paths):
        return cached
    arrays = compute()
    if worth_caching(arrays):
        with contextlib.suppress(OSError):  # read-only or full
            (folder / FOLDER).mkdir(exist_ok=True)
            for path, array in zip(paths, arrays, strict=True):
                with atomic_file(path) as file:
                    np.save(file, array)
                write_atomically(path.with_suffix(".sha256"), digest(path))
    return arrays


def _read(path: Path) -> np.ndarray | None:
    with contextlib.suppress(OSError):  # missing or unreadable
        if digest(path) == path.with_suffix(".sha256").read_text():
            return np.load(path)
    return None
