"""Processes that train get memory in huge pages where Linux gives them to those that ask."""

import os
import subprocess
import sys

import pytest

from resjax import machine
from resjax.machine import huge_pages
from resjax.sweeps.workers import start_child

ASKED = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
CONFIG = """
import os

from resjax.config import default_config


def get_config():
    print(os.getpid(), os.environ.get("GLIBC_TUNABLES"))
    config = default_config()
    config.model.depth = 7  # which is refused
    return config
"""


@pytest.fixture
def on_request(monkeypatch, tmp_path):
    """Linux gives huge pages to those that ask, and nobody has asked."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(machine, "PAGES", tmp_path / "enabled")
    machine.PAGES.write_text("always [madvise] never\n")


@pytest.mark.usefixtures("on_request")
def test_they_are_requested():
    assert huge_pages() == ASKED


@pytest.mark.usefixtures("on_request")
@pytest.mark.parametrize("setting", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_they_are_not_requested_where_that_changes_nothing(setting):
    if setting is None:
        machine.PAGES.unlink()
    else:
        machine.PAGES.write_text(setting)
    assert huge_pages() == {}


@pytest.mark.usefixtures("on_request")
@pytest.mark.parametrize("value", [0, 1, 2])
def test_the_users_choice_is_kept(monkeypatch, value):
    monkeypatch.setenv("GLIBC_TUNABLES", f"glibc.malloc.hugetlb={value}")
    assert huge_pages() == {}


@pytest.mark.usefixtures("on_request")
def test_other_tunables_are_kept(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    assert huge_pages() == {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"}


def send_tunables(link):
    link.send(os.environ.get("GLIBC_TUNABLES"))


@pytest.mark.usefixtures("on_request")
def test_the_workers_of_a_sweep_have_them():
    process, link = start_child(send_tunables)
    assert link.recv() == ASKED["GLIBC_TUNABLES"]
    process.join()


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """Returns a function that runs a command on a config that is refused, as a user types it."""
    (tmp_path / "config.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name not in ASKED}

    def run(*command, **changed):
        process = subprocess.Popen(
            [sys.executable, "-m", "resjax", *command],
            env=environment | changed,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        printed, errors = process.communicate()
        number, tunables = printed.splitlines()[0].split()
        assert int(number) == process.pid
        return process.returncode, tunables, errors

    return run


def test_a_command_that_trains_starts_anew_in_the_same_process(typed, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    code, tunables, errors = typed("train", "--config=config.py")
    assert tunables == huge_pages().get("GLIBC_TUNABLES", "None")
    assert code == 2
    assert "depth 7" in errors


def test_a_command_that_trains_does_not_start_anew_if_the_user_has_chosen(typed):
    _, tunables, _ = typed("train", "--config=config.py", GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert tunables == "glibc.malloc.hugetlb=0"


def test_a_command_that_computes_nothing_does_not_start_anew(typed):
    _, tunables, _ = typed("config", "config.py")
    assert tunables == "None"
