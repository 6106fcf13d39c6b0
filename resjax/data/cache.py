"""A cache of decoded images and statistics, inside the folder of the prepared dataset.

An entry is an `.npz` file, a zip archive with checksums. A damaged one is computed again; a folder
that cannot be written makes this slower, but is no error.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from resjax.disk import atomic_file

FOLDER = "resjax"


def cached_arrays(
    folder: Path, key: str, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns arrays by name from the cache, or computes and caches them.

    Args:
      folder: of the prepared dataset.
      key: identifies the arrays; it contains everything that they depend on.
      compute: returns the arrays.
    """
    path = folder / FOLDER / f"{key}.npz"
    # Missing, or damaged, which fails in every possible way.
    with contextlib.suppress(Exception), path.open("rb") as stored, np.load(stored) as arrays:
        if arrays.zip.testzip() is None:
            return dict(arrays)
    computed = compute()
    with contextlib.suppress(OSError):  # read-only or full
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as file:
            np.savez(file, **computed)  # type: ignore[arg-type]
    return computed
