"""No order of file operations of several processes, and no crash between two, breaks the lock.

The functions of `resjax.train.lock` run on a file system in memory, one operation at a time. All
orders in which the operations of several processes can follow each other are explored, with a crash
of a process before any of them. Orders that lead to the same state are explored once: the state of
a process follows from the results of its operations.
"""

import errno
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from resjax.train import lock
from resjax.train.lock import HELD, Watch, try_claim

FOLDER = Path("run")
PRIVATE = (
    "pwrite",
    "utime",
    "fstat",
    "pread",
    "enter",
)  # whose order with others' makes no difference


class Status(NamedTuple):
    """What `os.stat` returns."""

    st_ino: str
    st_mtime_ns: int = 0


class Disk(NamedTuple):
    """A folder: its names, the content of each file, and the files that processes have open."""

    names: frozenset[tuple[str, str]] = frozenset()  # name, file
    contents: frozenset[tuple[str, bytes]] = frozenset()
    opened: frozenset[tuple[int, int, str]] = frozenset()  # process, descriptor, file
    locks: frozenset[tuple[int, int, str]] = frozenset()  # as `opened`, of exclusive locks

    def crash(self, process: int) -> "Disk":
        """Returns the disk after the death of a process."""
        opened, locks = (
            frozenset(each for each in every if each[0] != process)
            for every in (self.opened, self.locks)
        )
        return self._replace(opened=opened, locks=locks)

    def run(
        self, process: int, operation: str, args: tuple[Any, ...], same_host: Callable[..., bool]
    ) -> tuple["Disk", Any]:
        """Returns the disk after an operation of a process, and its result."""
        names, contents = dict(self.names), dict(self.contents)
        files = {number: file for owner, number, file in self.opened if owner == process}

        def file_of(name: str) -> str:
            if name not in names:
                raise FileNotFoundError(errno.ENOENT, "")
            return names[name]

        def check_free(name: str) -> None:
            if name in names:
                raise FileExistsError(errno.EEXIST, "")

        match operation, *args:
            case "open", name, flags:
                if flags & os.O_EXCL:
                    check_free(name)
                    names[name], contents[name] = name, b""
                number = next(n for n in range(3, 100) if n not in files)
                opened = self.opened | {(process, number, file_of(name))}
                names, contents = frozenset(names.items()), frozenset(contents.items())
                return Disk(names, contents, opened, self.locks), number
            case "close", number:
                closed = {(process, number, files[number])}
                return self._replace(opened=self.opened - closed, locks=self.locks - closed), None
            case "flock", number, how:
                others = [
                    owner
                    for owner, _, file in self.locks
                    if owner != process and file == files[number] and same_host(owner, process)
                ]
                if others:
                    raise BlockingIOError(errno.EAGAIN, "")
                shared = how & fcntl.LOCK_SH
                taken = set() if shared else {(process, number, files[number])}
                return self._replace(locks=self.locks | taken), None
            case "pwrite", number, content:
                contents[files[number]] = content
                return self._replace(contents=frozenset(contents.items())), None
            case "pread", number:
                return self, contents[files[number]]
            case "fstat", number:
                return self, Status(files[number])
            case "stat", name:
                return self, Status(file_of(name))
            case ("utime", _):
                return self, None
            case ("listdir",):
                return self, tuple(sorted(names))
            case "link", name, new:
                file = file_of(name)
                check_free(new)
                return self._replace(names=self.names | {(new, file)}), None
            case "unlink", name:
                return self._replace(names=self.names - {(name, file_of(name))}), None
            case "rename", name, new:
                file = file_of(name)
                if names.get(new) != file:  # otherwise rename does nothing
                    names[new] = names.pop(name)
                return self._replace(names=frozenset(names.items())), None
        raise NotImplementedError(operation)


class Pause(BaseException):
    """Ends a program at the first operation whose result is not known yet."""


Code = Callable[["Program"], None]


class Raised(NamedTuple):
    """An operation that failed."""

    kind: type[OSError]
    number: int | None


class Point:
    """A point of a program at which it waits for the result of an operation.

    A program is at the same point if its functions are, with the same variables.
    """

    def __init__(self, pending: tuple[Any, ...] | None, results: tuple[Any, ...]):
        self.pending = pending  # the operation and its arguments; None at the end
        self.results = results  # of the operations before
        self.following: dict[Any, Point] = {}  # by the result of the operation


class Program:
    """Code of `lock` in one process, which can be continued from any point.

    It is continued by running it again with the results of the operations that led to the point.
    """

    def __init__(self, process: int, host: str, code: "Code"):
        self.process, self._host, self._code = process, host, code
        self._points: dict[Any, Point] = {}

    def start(self) -> Point:
        return self._run(())

    def resume(self, point: Point, result: Any) -> Point:
        """Returns the point that follows another when its operation has a result."""
        if result not in point.following:
            point.following[result] = self._run((*point.results, result))
        return point.following[result]

    def _run(self, results: tuple[Any, ...]) -> Point:
        self._left, self.tokens, self.time = list(results), 0, 0.0
        self._pending, self._where = None, ()
        self._used: list[tuple[Any, Any]] = []  # results, and the functions that asked for them
        patched = {"os": self._os(), "fcntl": self._fcntl(), "secrets": self._secrets()}
        patched["time"] = SimpleNamespace(monotonic=lambda: self.time)
        patched["_boot_id"] = lambda: self._host
        before = {name: getattr(lock, name) for name in patched}
        vars(lock).update(patched)
        try:
            self._code(self)
        except Pause:
            pass
        finally:
            vars(lock).update(before)
        return self._points.setdefault((self._where, self._pending), Point(self._pending, results))

    def call(self, operation: str, *args: Any) -> Any:
        """Returns or raises the result of an operation, or pauses before it."""
        if not self._left:
            if self._pending is None:  # not in a `finally` that follows the pause
                self._where, self._pending = (self.tokens, *self._frames()), (operation, *args)
            raise Pause
        result = self._left.pop(0)
        self._used.append((sys._getframe(2), result))
        if isinstance(result, Raised):
            raise result.kind(result.number, "")
        return result

    def _frames(self) -> Iterator[Any]:
        frame = sys._getframe(2)
        while frame.f_code is not Program._run.__code__:
            if frame.f_globals is not globals() or frame.f_code is self._code.__code__:
                variables = sorted(frame.f_locals.items())
                kept = [(name, frozen(value)) for name, value in variables if name != "_"]
                used = [result for user, result in self._used if user is frame]
                yield frame.f_code.co_name, frame.f_lasti, tuple(kept), tuple(used)
            frame = frame.f_back

    def _os(self) -> SimpleNamespace:
        def on_names(operation: str) -> Callable[..., Any]:
            return lambda *paths: self.call(operation, *(path.name for path in paths))

        functions = {name: on_names(name) for name in ("stat", "link", "unlink", "rename")}
        return SimpleNamespace(
            **functions,
            open=lambda path, flags, mode=0: self.call("open", path.name, flags),
            listdir=lambda path: self.call("listdir"),
            pread=lambda file, size, start: self.call("pread", file),
            pwrite=lambda file, content, start: self.call("pwrite", file, content),
            fstat=lambda file: self.call("fstat", file),
            utime=lambda file: self.call("utime", file),
            close=lambda file: self.call("close", file),
            getpid=lambda: self.process,
            environ={},
            path=SimpleNamespace(samestat=lambda one, other: one == other),
            **{name: getattr(os, name) for name in ("O_RDONLY", "O_RDWR", "O_CREAT", "O_EXCL")},
        )

    def _fcntl(self) -> SimpleNamespace:
        flags = {name: getattr(fcntl, name) for name in ("LOCK_SH", "LOCK_EX", "LOCK_NB")}
        return SimpleNamespace(flock=lambda file, how: self.call("flock", file, how), **flags)

    def _secrets(self) -> SimpleNamespace:
        def token(size: int) -> str:
            self.tokens += 1
            return f"{self.process:08x}{self.tokens:08x}"

        return SimpleNamespace(token_hex=token)


def frozen(value: Any) -> Any:
    """Returns a variable of a program as a value that can be compared with another's."""
    match value:
        case None | bool() | int() | float() | str() | bytes() | Path():
            return value
        case tuple() | list():
            return tuple(map(frozen, value))
        case dict():
            return tuple((frozen(key), frozen(each)) for key, each in value.items())
        case lock.Claim() | lock.Watch():
            return frozen(vars(value))
    return type(value).__name__


class State(NamedTuple):
    """A disk, and the point of each process; None once it crashed."""

    disk: Disk
    points: tuple[Point | None, ...]

    def pending(self, process: int) -> tuple[Any, ...] | None:
        point = self.points[process]
        return point and point.pending

    def inside(self) -> int:
        """Returns the number of processes that have the lock and have not begun to release it."""
        return sum(point is not None and point.pending == ("leave",) for point in self.points)

    def move(self, process: int, disk: Disk, point: Point | None) -> "State":
        points = (*self.points[:process], point, *self.points[process + 1 :])
        return State(disk, points)


class World:
    """Several processes and their folder."""

    def __init__(self, codes: list[Code], hosts: str, flocks: bool = True, misjudge: bool = False):
        """Creates processes that have not begun.

        Args:
          codes: the code of each process.
          hosts: a letter for the host of each process.
          flocks: whether `flock` works, within each host.
          misjudge: whether a watch finds a process dead that has the lock, and lives.
        """
        numbered = enumerate(zip(hosts, codes, strict=True))
        self.programs = [Program(number, host, code) for number, (host, code) in numbered]
        self._hosts, self._flocks, self._misjudge = hosts, flocks, misjudge

    def start(self) -> State:
        return State(Disk(), tuple(program.start() for program in self.programs))

    def step(self, state: State, process: int) -> State:
        """Returns the state after the next operation of a process, and private ones after it."""
        while True:
            operation, *args = state.pending(process)
            disk, result = self._run(state, process, operation, args)
            point = self.programs[process].resume(state.points[process], result)
            state = state.move(process, disk, point)
            if point.pending is None or point.pending[0] not in PRIVATE:
                return state

    def _run(self, state: State, process: int, operation: str, args: Any) -> tuple[Disk, Any]:
        match operation:
            case "enter" | "leave":
                return state.disk, None
            case "others":
                return state.disk, state.inside()
            case "dies":  # whether the process of a token is dead, as a watch finds out
                holder = int(args[0][:8], 16)
                misjudged = self._misjudge and state.pending(holder) == ("leave",)
                return state.disk, misjudged or state.points[holder] is None
            case "flock" if not self._flocks:
                return state.disk, Raised(OSError, errno.ENOLCK)
        try:
            return state.disk.run(process, operation, tuple(args), self._same_host)
        except OSError as error:
            return state.disk, Raised(type(error), error.errno)

    def _same_host(self, one: int, other: int) -> bool:
        return self._hosts[one] == self._hosts[other]

    def crash(self, state: State, process: int) -> State:
        return state.move(process, state.disk.crash(process), None)

    def explore(self, starts: list[State], processes: range, crashes: int) -> Iterator[State]:
        """Yields the states that some processes can reach with at most so many crashes of them."""
        stack, seen = list(starts), {*starts}
        while stack:
            state = stack.pop()
            yield state
            alive = [process for process in processes if state.pending(process)]
            following = [self.step(state, process) for process in alive]
            if sum(state.points[process] is None for process in processes) < crashes:
                following += [self.crash(state, process) for process in alive]
            for each in following:
                if each not in seen:
                    seen.add(each)
                    stack.append(each)


def contend(program: Program) -> None:
    """Takes the lock if it is free or its holder is dead, and releases it."""
    watch = Watch()
    judged = watch.state(FOLDER) != HELD or watch.beating(FOLDER)
    if not judged and program.call("dies", watch.holder(FOLDER)["token"]):
        program.time += lock.TIMEOUT_SECONDS
        watch.state(FOLDER)
    claim = try_claim(FOLDER, dead=watch.dead_token(FOLDER))
    if claim:
        program.call("enter")
        program.call("leave")
        claim.release()


class Now:
    """A time that is always the same."""

    def astimezone(self):
        return self

    def isoformat(self, timespec):
        return "now"


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", lock.TIMEOUT_SECONDS)
    monkeypatch.setattr(lock, "_clock", lambda: 0.0)
    monkeypatch.setattr(lock, "_BEATS", SimpleNamespace(add=lambda _: 0, remove=lambda _: 0))
    monkeypatch.setattr(lock, "datetime", SimpleNamespace(now=Now))


KINDS = {
    "one machine": ("aaa", True),
    "localflock": ("abc", True),
    "localflock, two machines": ("aab", True),
    "no flock": ("aaa", False),
}
"""Names of the hosts of each process, and whether `flock` works within each host."""


def check(world: World, starts: list[State], processes: range, crashes: int) -> int:
    """Checks every state, and that the lock can be taken when all processes have ended or died.

    Returns:
      The number of states.
    """
    number = 0
    for state in world.explore(starts, processes, crashes):
        number += 1
        assert state.inside() <= 1
        if not any(map(state.pending, processes)):
            last, took = len(world.programs) - 1, False
            while state.pending(last):
                state = world.step(state, last)
                took = took or state.pending(last) == ("leave",)
            assert took
            assert state.disk.names == frozenset()
    return number


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_and_their_crashes_leave_one_holder(kind):
    hosts, flocks = KINDS[kind]
    world = World([contend] * 3, hosts, flocks)
    assert check(world, [world.start()], range(2), crashes=2) > 1000


@pytest.mark.parametrize(
    ("kind", "crashes"),
    [
        ("one machine", 0),
        ("no flock", 0),
        *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_one_of_two_processes_succeeds_a_process_that_died_at_any_point(kind, crashes):
    hosts, flocks = KINDS[kind]
    world = World([contend] * 4, f"{hosts}{hosts[0]}", flocks)
    state, dead = world.start(), list[State]()
    while state.pending(0):
        dead.append(world.crash(state, 0))
        state = world.step(state, 0)
    assert check(world, dead, range(1, 3), crashes) > 1000


def hold(program: Program) -> None:
    """Takes the lock, perhaps loses it while it is paused, and notices or releases it."""
    claim = try_claim(FOLDER)
    program.call("enter")
    program.call("leave")
    others = program.call("others")
    lost = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "end_process", lost.append)
        claim.beat()
    if others:
        assert lost
    claim.release()


@pytest.mark.parametrize("flocks", [True, False])
def test_a_holder_that_was_paused_notices_its_successor_and_leaves_its_lock(flocks):
    world = World([hold, contend], "ab", flocks, misjudge=True)
    start = world.start()
    while start.pending(0) != ("leave",):
        start = world.step(start, 0)
    taken = 0
    for state in world.explore([start], range(2), crashes=0):
        if state.pending(1) == ("leave",):
            taken += 1
            assert dict(state.disk.names)["lock"].startswith("lock.00000001")
    assert taken > 5
