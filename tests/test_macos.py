"""Commands work without the features of Linux that macOS lacks: /proc, /sys, /dev/shm, affinity."""

import subprocess
import sys
from pathlib import Path

from resjax.xla.compilation_cache import cache_folder

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.py"

WITHOUT_LINUX = """
import os, sys
LINUX = "/proc", "/sys/fs", "/sys/kernel", "/dev/shm", "/dev/full"

def refuse(path):
    if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(LINUX):
        raise FileNotFoundError(2, "No such file or directory", path)

def stat(path, *arguments, **options):
    refuse(path)
    return system_stat(path, *arguments, **options)

def access(path, mode):
    return not os.fspath(path).startswith(LINUX) and system_access(path, mode)

sys.addaudithook(lambda event, arguments: refuse(arguments[0]) if event == "open" else None)
system_stat, os.stat, system_access, os.access = os.stat, stat, os.access, access
del os.sched_getaffinity, os.sched_setaffinity
from resjax.cli import main
sys.exit(main())
"""


def run(program, *typed):
    ended = subprocess.run(
        [sys.executable, "-c", program, *typed], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_run_trains_streams_and_is_verified_without_what_only_linux_has(tmp_path):
    fields = {"steps": 2, "log_every": 1, "eval_every": 2, "checkpoint_every": 2}
    typed = [f"--config.train.{name}={value}" for name, value in fields.items()]
    typed += ["--config.model.depth=8", "--config.data.feed=stream", "--config.data.workers=1"]
    typed += [f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}"]
    assert "step 2/2" in run(WITHOUT_LINUX, "train", *typed)
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_compilation_cache_is_where_each_system_has_its_caches(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("NPROC", "4")
    assert cache_folder() == Path("/home/me/.cache/resjax/xla-4-threads")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path("/home/me/Library/Caches/resjax/xla-4-threads")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/me")
    assert cache_folder() == Path("/scratch/me/resjax/xla-4-threads")
