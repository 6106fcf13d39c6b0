"""Programs are compiled once for a user and machine, whatever becomes of the cache's files."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax
from resjax.xla.compilation_cache import enable_compilation_cache
enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.jit(lambda x: 2 * x)(jax.numpy.ones(3)))
"""


def entries(caches):
    return {path.name: path for path in caches.glob("resjax/xla-*-threads/*-cache")}


@pytest.fixture
def compiled():
    """Returns a function that runs the program with these caches, and its entries there."""

    def run(caches):
        environment = os.environ | {"XDG_CACHE_HOME": str(caches)}
        for name in [name for name in environment if name.startswith("JAX_") and "CACHE" in name]:
            del environment[name]
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
        )
        assert ended.stdout == "[2. 2. 2.]\n", ended.stderr
        return entries(caches), ended.stderr

    return run


def test_keys_do_not_depend_on_the_folder_and_an_entry_serves_the_next_process(compiled, tmp_path):
    first, _ = compiled(tmp_path / "a")
    assert first
    assert compiled(tmp_path / "b")[0].keys() == first.keys()
    before = {name: path.stat().st_mtime_ns for name, path in first.items()}
    again, warned = compiled(tmp_path / "a")
    assert {name: path.stat().st_mtime_ns for name, path in again.items()} == before
    assert warned == ""


def test_a_damaged_entry_is_a_warning_and_a_truncated_one_is_replaced(compiled, tmp_path):
    found, _ = compiled(tmp_path)
    sizes = {name: path.stat().st_size for name, path in found.items()}
    for path in found.values():
        path.write_bytes(path.read_bytes()[:-7])
    _, warned = compiled(tmp_path)
    assert "Error reading persistent compilation cache" in warned
    for path in found.values():  # as when the process that wrote it was killed
        path.with_name(f"{path.name.removesuffix('cache')}atime").unlink()
    found, warned = compiled(tmp_path)
    assert warned == ""
    assert found.keys() == sizes.keys()
    assert all(path.stat().st_size > sizes[name] - 7 for name, path in found.items())


def test_a_home_that_cannot_be_written_is_no_error(compiled, tmp_path):
    (tmp_path / "file").touch()
    assert compiled(tmp_path / "file") == ({}, "")
