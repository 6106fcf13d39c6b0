"""One process at a time in a run folder.

On one machine the kernel keeps the lock, and releases it when the process dies, however it does. A
shared file system may not lock across machines, so the holder also beats: it touches the file every
few seconds. Whoever finds the file of another machine watches it for a while by its own clock; no
two clocks are ever compared.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from resjax.errors import UserError
from resjax.train.distributed import all_processes, is_main_process

NAME = "lock"
BEAT = 5.0  # seconds
PATIENCE = 30.0  # seconds without a beat after which a holder on another machine is dead


@contextmanager
def locked(folder: Path, warn: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Holds the folder, which is made where it is not there; of several processes the first does.

    Args:
      folder: of a run or a sweep.
      warn: is told of a dead holder whose lock is taken over.

    Raises:
      UserError: another process holds it; says which.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock, refusal = None, None
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock(folder / NAME, warn)
        except UserError as error:
            refusal = error
    try:
        if not all_processes(refusal is None):
            raise refusal or UserError(f"{folder} is held by another run; process 0 says by which")
        yield
    finally:
        if lock:
            lock.release()
            for path in made:  # nothing was written: leave no trace
                with suppress(OSError):
                    path.rmdir()


class Lock:
    """A file that one process holds, from here to `release` or to its end."""

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self._path = path
        self._kernel_locks = True
        self._file = self._opened()
        try:
            self._take(warn)
        except BaseException:
            os.close(self._file)
            raise
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        with suppress(OSError):  # the folder may be gone
            self._path.unlink()
        os.close(self._file)

    def _opened(self) -> int:
        """The file, held by the kernel for us."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read(file)
                os.close(file)
                raise self._refusal(holder) from None
            except OSError:  # a file system without locks: only the beat tells
                self._kernel_locks = False
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(self._path)):
                    return file
            os.close(file)  # its holder has just removed it

    def _take(self, warn: Callable[[str], None]) -> None:
        holder = _read(self._file)
        if holder:
            whose = f"process {holder.get('process')} on {holder.get('host')}"
            if holder.get("boot") != _boot() or not self._kernel_locks:
                warn(f"{self._path} is of {whose}; watching for {PATIENCE:g} s whether it lives")
                self._watch(holder)
            warn(f"{whose} ended without releasing {self._path}; it is taken over")
        us = {"host": socket.gethostname(), "process": os.getpid(), "boot": _boot()}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(us).encode(), 0)

    def _watch(self, holder: dict[str, Any]) -> None:
        """Returns when the holder has not been seen to beat for long enough."""
        beat, until = os.fstat(self._file).st_mtime_ns, time.monotonic() + PATIENCE
        while time.monotonic() < until:
            time.sleep(min(1.0, PATIENCE / 10))
            if os.fstat(self._file).st_mtime_ns != beat:
                raise self._refusal(holder)

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        whose = f"process {holder.get('process')} on {holder.get('host')}"
        return UserError(f"{self._path.parent} is in use by {whose}; wait for it, or stop it")

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with suppress(OSError):
                os.utime(self._file)


def _read(file: int) -> dict[str, Any]:
    """Whom the file names; nobody, where it is empty or damaged."""
    with suppress(ValueError, OSError):
        content = json.loads(os.pread(file, 4096, 0))
        if isinstance(content, dict):
            return content
    return {}


def _boot() -> str:
    """This start of this machine: who shares it shares its locks."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()
