"""One cache of compiled programs for a user and machine, so that no work folder compiles anew.

JAX's key of an entry contains the program, its options, the version of XLA and the device (for a
CPU, its instruction set), so hosts that share a home folder do not load each other's code. The key
lacks the number of threads, among which XLA divides work when it compiles, so the folder is named
after it.
"""

from contextlib import suppress
from pathlib import Path

import filelock
import jax

from resjax.machine import threads, user_caches

MAX_BYTES = 2**30
"""The size at which JAX removes the entries that were not used for longest."""

MIN_SECONDS = 0.1
"""Programs that compile faster are not cached."""


def enable_compilation_cache() -> None:
    """Caches compiled programs for later processes; call it before anything is compiled.

    A folder of the user's, such as the environment variable JAX_COMPILATION_CACHE_DIR, stays as it
    is. Without a writable folder, every process compiles its programs.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is in it is executed
        _remove_incomplete(folder)
    except (OSError, RuntimeError):  # read-only, full, or there is no home
        return
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_compilation_cache_max_size": MAX_BYTES,
        "jax_persistent_cache_min_compile_time_secs": MIN_SECONDS,
    }
    if jax.default_backend() == "cpu":
        # XLA's own caches are for GPUs, and their paths are part of an entry's key.
        settings["jax_persistent_cache_enable_xla_caches"] = "none"
    for name, value in settings.items():
        jax.config.update(name, value)


def cache_folder() -> Path:
    """Returns the folder of programs for this number of threads, among the user's caches.

    Raises:
      RuntimeError: this user has no home folder.
    """
    return user_caches() / f"xla-{threads()}-threads"


def _remove_incomplete(folder: Path) -> None:
    """Removes entries whose writer was killed or had no room.

    JAX neither replaces a truncated entry nor, once one exists, adds others. It writes the time of
    an entry's use last, so an entry without one is incomplete.
    """
    lock = filelock.FileLock(folder / ".lockfile", timeout=0)
    with suppress(filelock.Timeout), lock:  # unless another process uses the cache just now
        for entry in folder.glob("*-cache"):
            if not entry.with_name(f"{entry.name.removesuffix('cache')}atime").exists():
                entry.unlink()
