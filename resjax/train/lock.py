"""Locks a run folder, so that only one process at a time trains or measures the run.

The file `lock` names its holder, who rewrites a note in it every few seconds (a beat). It works on
any file system that several machines share, also on one whose kernel locks nothing across them:

- The file appears with its content: a file of another name is linked as `lock`, which one of
  several processes can do. A random token tells the lock from all others.
- Whether a holder lives, the kernel says where it can: the holder also locks its file by `flock`,
  which ends with its process. The holder of another machine, or on a file system without `flock`,
  is dead if its file has not changed for a while. Its watcher measures that while by its own clock
  and looks often; the clocks of two machines are never compared.
- The lock of a dead holder T has one successor: the file that is linked as `lock.T.next`. The
  successor checks that T still holds the lock, then renames its own file over it. A process that is
  late, by any delay between any two of these steps, finds the name taken or T gone. A successor
  that dies before it renames is itself a dead holder, found by following the names from `lock`.
- A holder that releases the lock first makes itself its own successor, so that it removes the lock
  only if it has no other.
- A holder that was paused for so long that it has a successor notices that at its next beat, or
  before it writes results, and ends its process.

Two processes are in a folder at once only until such a holder notices, or if a process is paused
for longer than the timeout just between the two operations that end a takeover or a release.
Names `lock.*` beside the lock belong to the steps above; the next holder removes those that a
killed process has left.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

from resjax.errors import UserError
from resjax.text import printable_lines
from resjax.train.distributed import all_processes, is_main_process
from resjax.train.progress import Warn

FILE_NAME = "lock"
HEARTBEAT_SECONDS = 5.0
TIMEOUT_SECONDS = 30.0  # without a heartbeat after which a holder on another machine is dead
EXIT_LOST = 75  # EX_TEMPFAIL of sysexits.h: try again

FREE, HELD, DEAD = "free", "held", "dead"
"""The states of a lock. A dead holder has ended without releasing it."""

CONTENT_BYTES = 1024  # of a lock file, so that a note covers the one before it
MOST_BYTES = 4096
ATTEMPTS = 100  # to take a lock; each fails only because another process has taken or released it
NO_LINKS = errno.EPERM, errno.ENOTSUP, errno.ENOSYS  # a file system without hard links, such as FAT
GONE = errno.ENOENT, errno.ENOTDIR, errno.ESTALE
FULL = errno.ENOSPC, errno.EDQUOT


class InUseError(UserError):
    """Another process holds the lock of a folder."""

    def __init__(self, folder: Path, holder: dict[str, Any]):
        super().__init__(f"{folder} is in use by {holder_name(holder)}; wait for it or stop it")
        self.holder = holder


class Look(NamedTuple):
    """A lock file as it was when it was last opened."""

    token: str
    holder: dict[str, Any]
    alive: bool | None  # None: the kernel does not know
    beat: tuple[Any, ...]  # differs after every beat


class _Sight(NamedTuple):
    """The observations of a watch about one lock."""

    look: Look
    time: float
    unchanged: float  # seconds for which it was watched without a beat
    beating: bool


class Watch:
    """Judges by its own clock whether the holders of locks live; never waits.

    It remembers what it saw, so that one watch can look at thousands of folders in turn. A gap
    between two looks counts for at most one beat, because this process or the file server may have
    been paused meanwhile.
    """

    def __init__(self) -> None:
        self._sights: dict[Path, _Sight] = {}

    def state(self, folder: Path) -> str:
        """Returns whether the lock of a folder is `FREE`, `HELD` or `DEAD`.

        A lock is `HELD` until the kernel knows that its holder is dead, or until the holder has
        been watched for `TIMEOUT_SECONDS` without a beat.
        """
        now, before = time.monotonic(), self._sights.pop(folder, None)
        if (look := _last(folder)) is None:
            return FREE
        beats = bool(look.alive) or (before is not None and before.look.beat != look.beat)
        if look.alive is False:
            unchanged = math.inf
        elif beats or before is None:
            unchanged = 0.0
        else:
            unchanged = before.unchanged + min(now - before.time, HEARTBEAT_SECONDS)
        dead = unchanged >= TIMEOUT_SECONDS
        beating = not dead and (beats or (before is not None and before.beating))
        self._sights[folder] = _Sight(look, now, unchanged, beating)
        return DEAD if dead else HELD

    def beating(self, folder: Path) -> bool:
        """Returns whether the last `state` was `HELD` by a holder that is known to live.

        False if the holder has not been watched for long enough to know.
        """
        sight = self._sights.get(folder)
        return sight is not None and sight.beating

    def dead_token(self, folder: Path) -> str | None:
        """Returns the token of a holder that the last `state` called `DEAD`, for `try_claim`."""
        sight = self._sights.get(folder)
        return sight.look.token if sight and sight.unchanged >= TIMEOUT_SECONDS else None

    def holder(self, folder: Path) -> dict[str, Any] | None:
        """Returns the holder at the last `state`, as `read_holder` does."""
        sight = self._sights.get(folder)
        return sight.look.holder if sight else None


class Claim:
    """The lock of a folder, which this process holds until it releases it."""

    def __init__(self, folder: Path, holder: dict[str, Any], file: int):
        """Describes a lock that is taken; `try_claim` and `locked` take one.

        Args:
          folder: that is locked.
          holder: this process, as the lock file names it.
          file: a descriptor of the lock file.
        """
        self.folder, self.token, self._holder = folder, str(holder["token"]), holder
        self._created: list[Path] = []  # folders to remove if nothing was written to them
        self._file: int | None = file
        self._beats, self._note = 0, dict[str, Any]()
        self._checked = _clock()
        self._guard = threading.Lock()

    def note(self, **values: Any) -> None:
        """Updates the note that `read_holder` returns with the holder; the next beat writes it."""
        self._note = self._note | values

    def require(self) -> None:
        """Ends this process if it has lost the lock while it was paused; else it costs nothing.

        A process calls it before it writes results.
        """
        if _clock() - self._checked > TIMEOUT_SECONDS / 2:
            self.beat()

    def beat(self) -> None:
        """Shows that this process lives; ends it if it has lost the lock."""
        with self._guard:
            if self._file is None:  # released meanwhile
                return
            try:
                lost = not _is_file_of(self.folder / FILE_NAME, self.token, self._file)
                if not lost:
                    self._write(self._file)
                    self._checked = _clock()
            except OSError as error:  # others may pass before the next beat
                lost = error.errno in GONE
        if lost:
            end_process(self)

    def _write(self, file: int) -> None:
        self._beats += 1
        try:
            os.pwrite(file, _content(self._holder, {"beats": self._beats, **self._note}), 0)
        except OSError as error:
            if error.errno not in FULL:
                raise
        os.utime(file)  # only now does NFS send what was written

    def release(self) -> None:
        """Releases the lock unless another process has taken it over."""
        _BEATS.remove(self)
        with self._guard:
            file, self._file = self._file, None
        if file is None:
            return
        try:
            with suppress(OSError):  # the folder may be gone
                _remove(self.folder, self.token, file)
        finally:
            os.close(file)
            _remove_empty(self._created)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextmanager
def locked(
    folder: Path, warn: Warn = lambda _: None, claim: Claim | None = None
) -> Iterator[Claim | None]:
    """Locks a folder, which it creates if necessary; among several processes, process 0 does.

    It waits for up to `TIMEOUT_SECONDS` to learn whether a holder on another machine lives.

    Args:
      folder: to lock.
      warn: called before it waits, and when it takes over the lock of a dead process.
      claim: the lock of the folder, if this process holds it already; it then stays held.

    Yields:
      The claim; None in processes other than process 0.

    Raises:
      InUseError: another process holds the lock; names it.
    """
    taken, refusal = None, None
    try:
        if is_main_process() and claim is None:
            try:
                taken = _claim_or_refuse(folder, warn)
            except UserError as error:
                refusal = error
        if not all_processes(refusal is None):
            raise refusal or UserError(f"{folder} is in use; see the message of process 0")
        yield claim or taken
    finally:
        if taken:
            taken.release()


def _claim_or_refuse(folder: Path, warn: Warn) -> Claim:
    watch, waits = Watch(), False
    while True:
        if watch.state(folder) != HELD:
            if claim := try_claim(folder, warn, watch.dead_token(folder)):
                return claim
            continue  # another process was faster
        holder = watch.holder(folder) or {}
        if watch.beating(folder):
            raise InUseError(folder, holder)
        if not waits:
            path = folder / FILE_NAME
            warn(f"{path} belongs to {holder_name(holder)}; watching it for {TIMEOUT_SECONDS:g} s")
            waits = True
        time.sleep(min(1.0, TIMEOUT_SECONDS / 10))


def try_claim(folder: Path, warn: Warn = lambda _: None, dead: str | None = None) -> Claim | None:
    """Locks a folder, which it creates if necessary, without waiting.

    Args:
      folder: to lock.
      warn: called when it takes over the lock of a dead process.
      dead: the token of a holder that a `Watch` found dead. A holder on this machine whose death
        the kernel knows needs none.

    Returns:
      The claim; None if another process holds the lock.

    Raises:
      OSError: the folder cannot be written.
    """
    created: list[Path] = []
    try:
        for _ in range(ATTEMPTS):
            look = _last(folder)
            if look and (look.alive or (look.alive is None and look.token != dead)):
                return None
            try:
                claim = _take(folder, look)
            except FileNotFoundError:
                created += [path for path in (folder, *folder.parents) if not path.exists()]
                folder.mkdir(parents=True, exist_ok=True)
                continue
            if claim:
                claim._created, created = created, []
                if look:
                    name, path = holder_name(look.holder), folder / FILE_NAME
                    warn(f"{name} ended without releasing {path}, which is taken over")
                return claim
        return None
    finally:
        _remove_empty(created)


def read_holder(folder: Path) -> dict[str, Any] | None:
    """Returns the holder of a folder's lock, who may be dead, and its note; None if it is free.

    The holder is `host`, `process`, `boot`, `token`, `job` (of SLURM or Ray) and `since`; the note
    is, for a run, `state`, `step`, `steps`, `images_per_second` and `seconds_left`. Entries may be
    missing: {} is a damaged lock.
    """
    look = _last(folder)
    return look.holder if look else None


def end_process(claim: Claim) -> None:
    """Ends this process, which has lost a lock, before it writes to the folder of another."""
    with suppress(OSError):
        holder = read_holder(claim.folder)
        how = f"{holder_name(holder)} has taken it over" if holder else "it was removed"
        text = f"resjax: {claim.folder}: this process has lost the lock: {how}; exits at once"
        print(printable_lines(text), file=sys.stderr, flush=True)
    os._exit(EXIT_LOST)


def _take(folder: Path, dead: Look | None) -> Claim | None:
    """Takes a lock that is free, or that of a dead holder; returns None if another process did.

    Raises:
      FileNotFoundError: the folder does not exist, or a new holder has removed this file.
    """
    names = [name for name in os.listdir(folder) if name.startswith(f"{FILE_NAME}.")]
    token, path = secrets.token_hex(8), folder / FILE_NAME
    new = folder / f"{FILE_NAME}.{token}.new"
    target = _successor(folder, dead.token) if dead else path
    holder, taken = _this_process(token), False
    file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            holder["flock"] = _flock(file)
            _link(file, holder, new, target)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(new)
        if dead is None:
            taken = True
        elif token not in (tokens := [look.token for look in _chain(folder)]):
            os.unlink(target)  # which another process has used and renamed before
        elif tokens[-1] == token:
            os.rename(target, path)
            taken = True
    except FileExistsError:
        pass
    finally:
        if not taken:
            os.close(file)
    if not taken:
        return None
    for name in names:  # listed before, so that no successor of this process is among them
        with suppress(OSError):
            os.unlink(folder / name)
    claim = Claim(folder, holder, file)
    _BEATS.add(claim)
    return claim


def _link(file: int, holder: dict[str, Any], new: Path, target: Path) -> None:
    """Writes the holder to the open file `new`, and makes it appear as `target`.

    Raises:
      FileExistsError: `target` exists.
    """
    os.pwrite(file, _content(holder), 0)
    os.utime(file)  # only now does NFS send what was written
    try:
        os.link(new, target)
    except FileExistsError:
        there = _look(target)
        if there is None or there.token != holder["token"]:  # else NFS has repeated the request
            raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        copy = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.dup2(copy, file, inheritable=False)
        os.close(copy)
        holder["flock"] = False  # not from the moment at which the file appeared
        os.pwrite(file, _content(holder), 0)


def _remove(folder: Path, token: str, file: int) -> None:
    """Removes a lock of this process, unless another process has taken it over."""
    path, successor = folder / FILE_NAME, _successor(folder, token)
    try:
        os.link(path, successor)
    except FileExistsError:  # by another process, or by this one if NFS has repeated the request
        linked = False
    except OSError:  # a full disk, or no links
        if _is_file_of(path, token, file):
            os.unlink(path)
        return
    else:
        linked = True
    if own := _is_file_of(successor, token, file):
        os.unlink(path)
    if own or linked:
        os.unlink(successor)


def _is_file_of(path: Path, token: str, file: int) -> bool:
    """Returns whether the open file has a name and still names this process.

    An earlier version of resjax takes over a lock by writing to the same file.
    """
    try:
        same = os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
    return same and token.encode() in os.pread(file, MOST_BYTES, 0)


def _last(folder: Path) -> Look | None:
    """Returns the holder of a lock, or None if the lock is free."""
    chain = _chain(folder)
    return chain[-1] if chain else None


def _chain(folder: Path) -> list[Look]:
    """Returns the file `lock` and its successors, each of which succeeds a dead holder."""
    chain: list[Look] = []
    path = folder / FILE_NAME
    while look := _look(path):
        if chain and chain[-1].token == look.token:  # died while it released the lock
            look = look._replace(token=f"{look.token}.released")
        chain.append(look)
        path = _successor(folder, look.token)
    return chain


def _successor(folder: Path, token: str) -> Path:
    return folder / f"{FILE_NAME}.{token}.next"


def _look(path: Path) -> Look | None:
    """Opens a lock file, because NFS does not refresh what it knows of open files."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in GONE:
            return None
        raise
    try:
        content, status = os.pread(file, MOST_BYTES, 0), os.fstat(file)
        holder = _parse(content)
        alive = _kernel_knows(file, holder)
    finally:
        os.close(file)
    token = holder.get("token")
    if not (isinstance(token, str) and re.fullmatch("[0-9a-f]{16}", token)):
        # A damaged file, or one of an earlier version, which writes it once.
        token = f"{status.st_ino}-{hashlib.sha256(content).hexdigest()[:16]}"
    return Look(token, holder, alive, (token, content, status.st_mtime_ns))


def _kernel_knows(file: int, holder: dict[str, Any]) -> bool | None:
    """Returns whether the holder of a lock file lives, or None if the kernel cannot know."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, because others look too
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    # On another machine, a lock may be invisible here.
    here = (holder.get("boot"), holder.get("host")) == (_boot_id(), socket.gethostname())
    return False if here and holder.get("flock", True) is True else None


def _flock(file: int) -> bool:
    with suppress(OSError):  # a file system without locks leaves only the heartbeat
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _content(holder: dict[str, Any], note: dict[str, Any] | None = None) -> bytes:
    """Returns the bytes of a lock file: the first line, which never changes, is the holder."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in (note or {"beats": 0}).items()
    }
    lines = json.dumps(holder)[:-1], json.dumps(finite)[1:]
    return ",\n".join(lines).encode().ljust(CONTENT_BYTES)


def _parse(content: bytes) -> dict[str, Any]:
    """Returns the holder and its note; only the holder if the note is just being written."""
    for text in (content, content.partition(b",\n")[0] + b"}"):
        with suppress(ValueError, RecursionError):
            if isinstance(holder := json.loads(text), dict):
                return holder
    return {}


def _this_process(token: str) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "boot": _boot_id(),
        "token": token,
        "job": _job(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _job() -> str | None:
    """Returns the job of SLURM or Ray in which this process runs."""
    get = os.environ.get
    if (array := get("SLURM_ARRAY_JOB_ID")) and (task := get("SLURM_ARRAY_TASK_ID")):
        return f"SLURM {array}_{task}"
    for name, variable in (("SLURM", "SLURM_JOB_ID"), ("Ray", "RAY_JOB_ID")):
        if job := get(variable):
            return f"{name} {job}"
    return None


def holder_name(holder: dict[str, Any]) -> str:
    """Returns the process and the host of a holder that `read_holder` returned."""
    if "process" not in holder:
        return "another process"
    return f"process {holder.get('process')} on {holder.get('host')}"


@cache
def _boot_id() -> str:
    """Returns an identifier of this machine since its last start, within which locks work."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _clock() -> float:
    """Returns seconds that also pass while the machine is suspended, where the system has them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty: something was written
            folder.rmdir()


class _Beats:
    """Beats for the claims of this process, in one thread for all."""

    def __init__(self) -> None:
        self._claims: set[Claim] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._due = 0.0

    def add(self, claim: Claim) -> None:
        with self._changed:
            self._claims.add(claim)
            due = time.monotonic() + HEARTBEAT_SECONDS
            if self._thread is None or not self._thread.is_alive():  # as in a forked process
                self._due = due
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
            elif due < self._due:
                self._changed.notify()

    def remove(self, claim: Claim) -> None:
        with self._changed:
            self._claims.discard(claim)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._due = time.monotonic() + HEARTBEAT_SECONDS
                self._changed.wait(HEARTBEAT_SECONDS)
                claims = [*self._claims]
                if not claims:
                    self._thread = None
                    return
            for claim in claims:
                claim.beat()


_BEATS = _Beats()
