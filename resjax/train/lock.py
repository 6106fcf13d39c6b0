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
from contextlib import contextmanager, nullcontext, suppress
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
    file, refusal = None, None
    try:
        if is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                file = _acquire(folder / FILE_NAME, warn)
            except UserError as error:
                refusal = error
        if not all_processes(refusal is None):
            raise refusal or UserError(f"{folder} is in use; see the message of process 0")
        with nullcontext() if file is None else _heartbeat(file):
            yield
    finally:
        if file is not None:
            with suppress(OSError):  # the folder may be gone
                (folder / FILE_NAME).unlink()
            os.close(file)
        for path in created if is_main_process() else ():
            with suppress(OSError):  # not empty: something was written
                path.rmdir()


def _acquire(path: Path, warn: Warn) -> int:
    """Returns a descriptor of the locked file, into which it writes this process."""
    while True:
        file, kernel_locks = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(file)
            os.close(file)
            raise _refusal(path, holder) from None
        except OSError:  # a file system without locks leaves only the heartbeat
            kernel_locks = False
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                break
        os.close(file)  # the holder has removed this file in the meantime
    try:
        if holder := _read_holder(file):
            if holder.get("boot") != _boot_id() or not kernel_locks:
                warn(f"{path} belongs to {_name(holder)}; watching it for {TIMEOUT_SECONDS:g} s")
                if _beats(file):
                    raise _refusal(path, holder)
            warn(f"{_name(holder)} ended without releasing {path}, which is taken over")
        content = {"host": socket.gethostname(), "process": os.getpid(), "boot": _boot_id()}
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(content).encode(), 0)
        except OSError:  # the disk is full
            path.unlink()
            raise
    except BaseException:
        os.close(file)
        raise
    return file


@contextmanager
def _heartbeat(file: int) -> Iterator[None]:
    """Touches a file every few seconds."""
    released = threading.Event()

    def beat() -> None:
        while not released.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(file)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()


def _beats(file: int) -> bool:
    """Returns whether another process touches a file within the timeout."""
    seen, deadline = os.fstat(file).st_mtime_ns, time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, TIMEOUT_SECONDS / 10))
        if os.fstat(file).st_mtime_ns != seen:
            return True
    return False


def _refusal(path: Path, holder: dict[str, Any]) -> UserError:
    return UserError(f"{path.parent} is in use by {_name(holder)}; wait for it or stop it")


def _read_holder(file: int) -> dict[str, Any]:
    """Returns the holder that the file names; {} if the file is empty or damaged."""
    with suppress(ValueError, OSError):
        content = json.loads(os.pread(file, 4096, 0))
        if isinstance(content, dict):
            return content
    return {}


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process')} on {holder.get('host')}"


def _boot_id() -> str:
    """Returns an identifier of this machine since its last start, within which locks work."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()
