"""The cores of this machine, XLA's threads and memory, the user's caches, and child processes."""

import os
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


def core_ids() -> list[int]:
    """Returns the cores this process may use; where the system cannot tell (macOS), all of them."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def available_cores() -> int:
    """Returns the number of cores this process may use."""
    return len(core_ids())


def threads() -> int:
    """Returns the number of XLA's threads on CPU, which decides how it divides sums.

    It is the environment variable NPROC or else the number of cores that this process may use.
    """
    text = os.environ.get("NPROC", "")
    return int(text) if text.isdecimal() and int(text) else available_cores()


def use_threads(number: int) -> None:
    """Sets what `threads` returns; call it before JAX looks for devices."""
    os.environ["NPROC"] = str(number)


def pin_to_cores(cores: Collection[int]) -> None:
    """Restricts this process to these cores; does nothing where the system cannot (macOS)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


HUGE_PAGES = "glibc.malloc.hugetlb"
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages() -> dict[str, str]:
    """Returns the environment in which a new process gets memory in huge pages, if that changes it.

    Problem: XLA allocates the memory of a program on CPU anew for each call, and Linux hands it out
    in pages of 4 kB, each at its first access. Effect of pages of 2 MB: a step of ResNet-50 with 8
    images, one per dispatch, takes 0.66 instead of 0.87 s on 2 cores, and a step of ResNet-56 with
    128, five per dispatch, 0.49 instead of 0.53 s. Results are the same to the bit. Against it: on
    a virtual machine that returns memory to its host after two seconds, dispatches of two seconds
    were 5 to 7 % slower. Memory that malloc keeps (`mmap_max=0`, `arena_max=1`) was no faster than
    huge pages, and took two to three times as much.

    Where Linux gives huge pages to programs that ask for them, as most distributions set it, glibc
    asks for them from version 2.35 on. It reads the variable at the start of a process alone.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    try:
        on_request = "[madvise]" in PAGES.read_text()
    except OSError:  # not Linux, or a kernel without huge pages
        return {}
    if HUGE_PAGES in tunables or not on_request:
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, [tunables, f"{HUGE_PAGES}=1"]))}


def restart_with_huge_pages() -> None:
    """Starts this process anew with what `huge_pages` returns, if that changes it.

    Call it first: nothing that the process has done remains, but for its ID and its open files.
    """
    if changed := huge_pages():
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, **changed})


def user_caches() -> Path:
    """Returns the folder for resjax's caches of this user; it need not exist.

    Raises:
      RuntimeError: this user has no home folder.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "resjax"
    caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return Path.home() / caches / "resjax"


_starting = threading.Lock()


@contextmanager
def safe_path() -> Iterator[None]:
    """Keeps child processes that start inside from searching the current folder for modules.

    multiprocessing starts `python -c`, for which a file such as pickle.py in the current folder
    takes precedence over the standard library.
    """
    with _starting:
        before = os.environ.get("PYTHONSAFEPATH")
        os.environ["PYTHONSAFEPATH"] = "1"
        try:
            yield
        finally:
            del os.environ["PYTHONSAFEPATH"]
            if before is not None:
                os.environ["PYTHONSAFEPATH"] = before


def module_search_path() -> list[str]:
    """Returns sys.path without the current folder, which comes last if resjax lies there."""
    here, package = Path.cwd(), Path(__file__).parents[1]
    elsewhere = [each for each in sys.path if each and Path(each).absolute() != here]
    return [*elsewhere, str(package)]
