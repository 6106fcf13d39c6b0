"""Only one process uses a run folder, and the lock of a dead process is taken over."""

import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from resjax.errors import UserError
from resjax.train import lock
from resjax.train.lock import (
    DEAD,
    EXIT_LOST,
    FILE_NAME,
    FREE,
    HELD,
    InUseError,
    Watch,
    locked,
    read_holder,
    try_claim,
)

PREPARE = """
import os, random, signal, sys, time
from pathlib import Path
from resjax.errors import UserError
from resjax.train import lock
from resjax.train.lock import HELD, Watch, locked, try_claim

def fail(*_):
    raise OSError(37, "No locks available")

kind = sys.argv[1]
if kind != "flock":
    lock.fcntl.flock = {"localflock": lambda *_: None, "no flock": fail}[kind]
    lock._boot_id = lambda: str(os.getpid())  # another machine
    lock.HEARTBEAT_SECONDS, lock.TIMEOUT_SECONDS = 0.05, 1.0
"""
KINDS = pytest.mark.parametrize("kind", ["flock", "localflock", "no flock"])


@pytest.fixture
def start(start_python):
    """Starts a process that locks as on one machine, or as on machines without common locks."""
    return lambda code, kind, *args: start_python("-c", PREPARE + code, kind, *args)


HOLD = """
with locked(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _no_beats_of_other_tests(monkeypatch):
    monkeypatch.setattr(lock, "_BEATS", lock._Beats())


@pytest.fixture
def hold(start, tmp_path):
    """Starts another process that locks the folder `run`."""

    def start_holder(kind="flock"):
        process = start(HOLD, kind, tmp_path / "run")
        assert process.stdout.readline() == "held\n"
        return process

    return start_holder


@pytest.fixture
def holder(hold):
    return hold()


@pytest.fixture
def other_machine(monkeypatch):
    """Makes the locks of this process look like those of another machine, with a short timeout."""
    monkeypatch.setattr(lock, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "_boot_id", lambda: "here")
    no_locks = SimpleNamespace(**vars(fcntl) | {"flock": lambda *_: no_space(errno.ENOLCK)})
    monkeypatch.setattr(lock, "fcntl", no_locks)


def no_space(number=errno.ENOSPC):
    raise OSError(number, os.strerror(number))


def test_a_second_process_is_refused_with_the_name_of_the_first(holder, tmp_path):
    with (
        pytest.raises(UserError, match=f"in use by process {holder.pid} on "),
        locked(tmp_path / "run"),
    ):
        pass


def test_the_lock_of_a_killed_process_is_taken_over_at_once(holder, tmp_path):
    holder.kill()
    holder.wait()
    warnings = []
    start = time.monotonic()
    with locked(tmp_path / "run", warnings.append):
        assert time.monotonic() - start < 1
    assert len(warnings) == 1
    assert f"process {holder.pid}" in warnings[0]
    assert "taken over" in warnings[0]


def test_a_full_disk_leaves_no_lock_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: no_space())
    with pytest.raises(OSError, match="No space left"), locked(tmp_path / "a" / "run"):
        pass
    assert not (tmp_path / "a").exists()


def test_a_released_lock_leaves_nothing_behind_and_can_be_taken_again(tmp_path):
    warnings = []
    for _ in range(2):
        with locked(tmp_path / "new" / "run", warnings.append):
            assert (tmp_path / "new" / "run" / FILE_NAME).exists()
        assert not (tmp_path / "new").exists()
    assert warnings == []


def test_a_new_folder_with_files_stays(tmp_path):
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The lock file of a process on another machine, whose locks this one does not see."""
    monkeypatch.setattr(lock, "TIMEOUT_SECONDS", 0.5)
    content = {"host": "elsewhere", "process": 7, "boot": "another"}
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    return tmp_path


def test_the_lock_of_another_machine_is_taken_over_after_a_timeout(elsewhere):
    warnings = []
    start = time.monotonic()
    with locked(elsewhere, warnings.append):
        assert time.monotonic() - start >= 0.5
        assert json.loads((elsewhere / FILE_NAME).read_text())["process"] == os.getpid()
    assert [("watching" in text, "taken over" in text) for text in warnings] == [
        (True, False),
        (False, True),
    ]


def test_a_heartbeat_from_another_machine_protects_its_lock(elsewhere):
    over = threading.Event()

    def beat():
        stamp = 0  # a clock that is far off, as after a jump
        while not over.wait(0.05):
            stamp += 1
            os.utime(elsewhere / FILE_NAME, (stamp, stamp))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on elsewhere"), locked(elsewhere):
            pass
    finally:
        over.set()
        thread.join()
    assert json.loads((elsewhere / FILE_NAME).read_text())["process"] == 7


def test_a_lock_has_a_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    with locked(tmp_path):
        first = (tmp_path / FILE_NAME).stat().st_mtime_ns
        deadline = time.monotonic() + 5
        while (tmp_path / FILE_NAME).stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": null}'])
def test_a_damaged_lock_file_without_a_holder_is_taken_over(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "TIMEOUT_SECONDS", 0.2)
    (tmp_path / FILE_NAME).write_text(content)
    with locked(tmp_path):
        assert json.loads((tmp_path / FILE_NAME).read_text())["process"] == os.getpid()


WORK = """
random.seed(sys.argv[3])
runs = [each for each in Path(sys.argv[2]).iterdir() if each.is_dir()]
watch = Watch()

def note(run, text):
    with open(run / "log", "a") as log:
        log.write(f"{text} {os.getpid()}\\n")

def die():
    if random.random() < 0.1:
        os.kill(os.getpid(), signal.SIGKILL)

while left := [run for run in runs if not (run / "done").exists()]:
    random.shuffle(left)
    for run in left:
        if watch.state(run) == HELD:
            continue
        claim = try_claim(run, dead=watch.dead_token(run))
        if claim is None:
            continue
        with claim:
            if (run / "done").exists():
                continue
            note(run, "begin")
            die()
            time.sleep(0.002)
            die()
            claim.require()
            note(run, "end")
            (run / "done").touch()
    time.sleep(0.01)
"""


@KINDS
def test_of_many_processes_that_take_runs_and_are_killed_one_at_a_time_has_a_run(
    start, tmp_path, kind
):
    for number in range(24):
        (tmp_path / str(number)).mkdir()
    seeds = iter(range(1000))
    working = [start(WORK, kind, tmp_path, next(seeds)) for _ in range(4)]
    killed = 0
    while working:
        process = working.pop(0)
        process.communicate(timeout=60)
        if process.returncode != 0:
            assert process.returncode in (-signal.SIGKILL, EXIT_LOST)
            killed += 1
            working.append(start(WORK, kind, tmp_path, next(seeds)))
    assert killed
    for run in tmp_path.iterdir():
        lines = [line.split() for line in (run / "log").read_text().splitlines()]
        assert Counter(event for event, _ in lines)["end"] == 1
        assert lines[-1][0] == "end"
        assert lines[-2] == ["begin", lines[-1][1]]
        assert {path.name for path in run.iterdir()} == {"log", "done"}


RACE = """
for line in sys.stdin:
    folder, token, begin = line.split()
    while time.monotonic() < float(begin):
        pass
    claim = try_claim(Path(folder), dead=token)
    print("won" if claim else "lost", flush=True)
    sys.stdin.readline()
    if claim:
        claim.release()
    print("released", flush=True)
"""


@KINDS
def test_one_of_several_contenders_succeeds_a_dead_holder(start, tmp_path, kind):
    contenders = [start(RACE, kind) for _ in range(3)]
    token = "0123456789abcdef"
    dead = {"host": "elsewhere", "process": 7, "boot": "another", "token": token}

    def ask(line):
        for contender in contenders:
            contender.stdin.write(f"{line}\n")
            contender.stdin.flush()
        return sorted(contender.stdout.readline().strip() for contender in contenders)

    ask(f"{tmp_path} {token} 0")
    ask("release")
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / FILE_NAME).write_text(json.dumps(dead))
        won = ask(f"{folder} {token} {time.monotonic() + 0.005}")
        assert won == ["lost", "lost", "won"]
        assert ask("release") == ["released"] * 3
        assert list(folder.iterdir()) == []
    for contender in contenders:
        contender.communicate()


def test_several_processes_can_look_at_a_lock_at_once(holder, tmp_path):
    holder.kill()
    holder.wait()
    with (tmp_path / "run" / FILE_NAME).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as by another process that looks just now
        assert Watch().state(tmp_path / "run") == DEAD


def test_a_killed_holder_on_another_machine_is_succeeded_after_the_timeout(
    hold, tmp_path, other_machine
):
    holder, folder = hold("localflock"), tmp_path / "run"
    watch, states = Watch(), []
    while not watch.beating(folder):
        assert watch.state(folder) == HELD
    holder.kill()
    holder.wait()
    killed = time.monotonic()
    while not states or states[-1] != DEAD:
        states.append(watch.state(folder))
        time.sleep(0.01)
    assert time.monotonic() - killed > 0.4
    assert try_claim(folder) is None  # without the verdict
    with try_claim(folder, dead=watch.dead_token(folder)) as claim:
        assert read_holder(folder)["token"] == claim.token
    assert watch.state(folder) == FREE


def test_a_watch_that_does_not_look_finds_nobody_dead(hold, tmp_path, other_machine, monkeypatch):
    hold("no flock").send_signal(signal.SIGSTOP)
    watch, now = Watch(), [0.0]
    monkeypatch.setattr(lock, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for _ in range(10):  # 0.5 s in steps of a beat
        assert watch.state(tmp_path / "run") == HELD
        now[0] += 3600  # for which this process was suspended
    watch.state(tmp_path / "run")
    now[0] += 3600
    assert watch.state(tmp_path / "run") == DEAD


def test_a_holder_that_was_paused_ends_when_it_has_lost_its_lock(hold, tmp_path, other_machine):
    holder, folder = hold("no flock"), tmp_path / "run"
    holder.send_signal(signal.SIGSTOP)
    with locked(folder) as claim:
        holder.send_signal(signal.SIGCONT)
        _, errors = holder.communicate(timeout=10)
        assert holder.returncode == EXIT_LOST
        assert errors == (
            f"resjax: {folder}: this process has lost the lock: process {os.getpid()} on "
            f"{os.uname().nodename} has taken it over; exits at once\n"
        )
        assert read_holder(folder)["token"] == claim.token
    assert list(folder.iterdir()) == []


def test_a_paused_holder_on_this_machine_keeps_its_lock(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TIMEOUT_SECONDS", 0.1)
    holder.send_signal(signal.SIGSTOP)
    watch = Watch()
    for _ in range(3):
        assert watch.state(tmp_path / "run") == HELD
        assert watch.beating(tmp_path / "run")
        time.sleep(0.1)
    holder.send_signal(signal.SIGCONT)


@pytest.fixture
def lost(monkeypatch):
    """The claims that noticed the loss of their lock, which ends no process here."""
    claims = []
    monkeypatch.setattr(lock, "end_process", claims.append)
    return claims


@pytest.fixture
def taken_over(tmp_path, other_machine, lost, monkeypatch):
    """A claim that another one has taken over, that one, and the claims that noticed a loss."""
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 60)
    first = try_claim(tmp_path)
    second = try_claim(tmp_path, dead=first.token)
    yield first, second, lost
    first.release()
    second.release()


def test_a_release_leaves_the_lock_of_a_successor(taken_over, tmp_path):
    first, second, _ = taken_over
    first.release()
    assert read_holder(tmp_path)["token"] == second.token
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_paused_checks_its_lock_before_it_writes(taken_over, monkeypatch):
    first, second, lost = taken_over
    first.require()
    second.require()
    assert lost == []  # no pause, and no operation on the file
    monkeypatch.setattr(lock, "_clock", lambda: time.monotonic() + 1e9)
    first.require()
    second.require()
    assert lost == [first]


def test_a_removed_lock_is_lost(tmp_path, lost):
    with try_claim(tmp_path) as claim:
        (tmp_path / FILE_NAME).unlink()
        claim.beat()
    assert lost == [claim]


def test_an_earlier_version_sees_who_holds_the_lock_and_may_take_it_over(tmp_path, lost):
    with try_claim(tmp_path) as claim:
        with (tmp_path / FILE_NAME).open("r+b") as file:
            content = json.loads(file.read(4096))
            assert (content["process"], content["boot"]) == (os.getpid(), lock._boot_id())
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            claim.beat()
            assert lost == []
            file.seek(0)
            file.truncate()
            file.write(b'{"host": "elsewhere", "process": 7, "boot": "another"}')
        claim.beat()
        assert lost == [claim]
    assert read_holder(tmp_path) == {"host": "elsewhere", "process": 7, "boot": "another"}


def test_the_note_is_written_with_the_beat(tmp_path):
    with try_claim(tmp_path) as claim:
        claim.note(state="training", step=3)
        claim.note(step=4, images_per_second=float("nan"))
        assert "step" not in read_holder(tmp_path)
        claim.beat()
        holder = read_holder(tmp_path)
        note = {"beats": 1, "state": "training", "step": 4, "images_per_second": None}
        assert note.items() <= holder.items()
        claim.note(state="measuring", images_per_second=1)
        claim.beat()
        assert read_holder(tmp_path)["state"] == "measuring"
    assert read_holder(tmp_path) is None


def test_a_note_that_is_just_being_written_leaves_the_holder_readable(tmp_path):
    with try_claim(tmp_path) as claim:
        file = os.open(tmp_path / FILE_NAME, os.O_RDWR)
        line = os.pread(file, 4096, 0).partition(b"\n")[0]
        os.pwrite(file, b'{"beats": 1, "sta', len(line) + 1)
        os.close(file)
        assert read_holder(tmp_path)["token"] == claim.token
        assert Watch().state(tmp_path) == HELD


def test_a_full_disk_stops_no_beat(tmp_path, monkeypatch):
    with try_claim(tmp_path) as claim:
        os.utime(tmp_path / FILE_NAME, (0, 0))
        monkeypatch.setattr(os, "pwrite", lambda *_: no_space())
        claim.beat()
        assert (tmp_path / FILE_NAME).stat().st_mtime > 0
        monkeypatch.setattr(os, "link", lambda *_: no_space())
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_links_can_be_locked(tmp_path, monkeypatch, other_machine):
    monkeypatch.setattr(os, "link", lambda *_: no_space(errno.EPERM))
    claim = try_claim(tmp_path)
    assert try_claim(tmp_path) is None
    monkeypatch.setattr(lock, "end_process", lambda _: None)
    with try_claim(tmp_path, dead=claim.token) as successor:
        claim.release()
        assert read_holder(tmp_path)["token"] == successor.token
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "open", lambda *_: no_space(number))
    monkeypatch.setattr(lock, "_last", lambda _: None)
    with pytest.raises(OSError, match=os.strerror(number)):
        try_claim(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_next_holder_removes_what_killed_processes_have_left(tmp_path):
    (tmp_path / f"{FILE_NAME}.0123456789abcdef.new").touch()
    (tmp_path / f"{FILE_NAME}.0123456789abcdef.next").touch()
    with try_claim(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert list(tmp_path.iterdir()) == []


def test_the_lock_names_the_job(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    jobs = [{"RAY_JOB_ID": "01"}, {"SLURM_JOB_ID": "9"}]
    jobs += [{"SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "3"}]
    named = []
    for variables in ({}, *jobs):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with try_claim(tmp_path):
            named.append(read_holder(tmp_path)["job"])
    assert named == [None, "Ray 01", "SLURM 9", "SLURM 8_3"]


def test_a_claim_that_is_held_is_used_and_kept(tmp_path):
    with try_claim(tmp_path) as claim:
        with locked(tmp_path, claim=claim) as used:
            assert used is claim
        assert read_holder(tmp_path)["token"] == claim.token
        with pytest.raises(InUseError) as error, locked(tmp_path):
            pass
        assert error.value.holder["process"] == os.getpid()
