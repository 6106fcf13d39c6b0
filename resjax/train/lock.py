"""Locks a run folder, so that only one process trains in it.

On one machine the kernel holds the lock and releases it when the process dies for any reason. A
shared file system may not lock across machines, so the holder also touches the lock file every few
seconds. A process that finds the lock of another machine watches it for a while by its own clock;
clocks of two machines are never compared.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from resjax.errors import UserError
from resjax.train.distributed import all_processes, is_main_process
from resjax.train.progress import Warn

FILE_NAME = "lock"
HEARTBEAT_SECONDS = 5.0
TIMEOUT_SECONDS = 30.0  # without a heartbeat after which a holder on another machine is dead


@contextmanager
def locked(folder: Path, warn: Warn = lambda _: None) -> Iterator[None]:
    """Locks a folder, which it creates if necessary; among several processes, process 0 does.

    Warns before it takes over the lock of a dead process.

    Raises:
      UserError: another process holds the lock; names it.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    lock, refusal = None, None
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock(folder / FILE_NAME, warn)
        except UserError as error:
            refusal = error
    try:
        if not all_processes(refusal is None):
            raise refusal or UserError(f"{folder} is in use; see the message of process 0")
        yield
    finally:
        if lock:
            lock.release()
            for path in created:
                with suppress(OSError):  # not empty: something was written
                    path.rmdir()


class Lock:
    """A locked file, until `release` or the end of the process."""

    def __init__(self, path: Path, warn: Warn):
        self._path = path
        self._kernel_locks = True
        self._file = self._open()
        try:
            self._take_over(warn)
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

    def _open(self) -> int:
        """Returns a descriptor of the file, which the kernel has locked."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read_holder(file)
                os.close(file)
                raise self._refusal(holder) from None
            except OSError:  # a file system without locks leaves only the heartbeat
                self._kernel_locks = False
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(self._path)):
                    return file
            os.close(file)  # the holder has removed this file in the meantime

    def _take_over(self, warn: Warn) -> None:
        """Writes this process into the file, after making sure that a previous holder is dead."""
        if holder := _read_holder(self._file):
            name = _describe(holder)
            if holder.get("boot") != _boot_id() or not self._kernel_locks:
                warn(f"{self._path} belongs to {name}; watching it for {TIMEOUT_SECONDS:g} s")
                self._watch(holder)
            warn(f"{name} ended without releasing {self._path}, which is taken over")
        content = {"host": socket.gethostname(), "process": os.getpid(), "boot": _boot_id()}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(content).encode(), 0)

    def _watch(self, holder: dict[str, Any]) -> None:
        """Returns after the timeout, or raises UserError at a heartbeat of the holder."""
        seen, deadline = os.fstat(self._file).st_mtime_ns, time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, TIMEOUT_SECONDS / 10))
            if os.fstat(self._file).st_mtime_ns != seen:
                raise self._refusal(holder)

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        name = _describe(holder)
        return UserError(f"{self._path.parent} is in use by {name}; wait for it or stop it")

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._file)


def _read_holder(file: int) -> dict[str, Any]:
    """Returns the holder that the file names; {} if the file is empty or damaged."""
    with suppress(ValueError, OSError):
        content = json.loads(os.pread(file, 4096, 0))
        if isinstance(content, dict):
            return content
    return {}


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process')} on {holder.get('host')}"


def _boot_id() -> str:
    """Returns an identifier of this machine since its last start, within which locks work."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()
