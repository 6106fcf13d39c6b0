"""Only one process uses a run folder, and the lock of a dead process is taken over."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from resjax.errors import UserError
from resjax.train import lock
from resjax.train.lock import FILE_NAME, locked

HOLD = """
import sys, time
from pathlib import Path
from resjax.train.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which has locked the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


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
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
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


COUNT = """
import sys, time
from pathlib import Path
from resjax.errors import UserError
from resjax.train.lock import locked
folder, done = Path(sys.argv[1]), 0
while done < 20:
    try:
        with locked(folder):
            value = int((folder / "count").read_text())
            time.sleep(0.001)
            (folder / "count").write_text(str(value + 1))
            done += 1
    except UserError:
        time.sleep(0.001)
"""


def test_only_one_of_many_processes_is_inside_at_a_time(tmp_path):
    (tmp_path / "count").write_text("0")
    counting = [subprocess.Popen([sys.executable, "-c", COUNT, tmp_path]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in counting] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "60"
