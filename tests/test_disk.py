"""A file is the old one or the new one, and a changed file is noticed."""

import errno
import os

import pytest

from resjax.disk import (
    CHECKSUMS,
    DamagedError,
    atomic_file,
    report_disk_errors,
    unused_path,
    verify_checksums,
    write_atomically,
    write_checksums,
)
from resjax.errors import UserError


def test_content_replaces_what_was_there(tmp_path):
    path = write_atomically(tmp_path / "page.html", "old")
    assert write_atomically(path, "new ±").read_text("utf-8") == "new ±"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(failing, tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "summary.json", "old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_a_file_that_is_written_in_parts_has_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "array.npy"
    with atomic_file(path) as file:
        file.write(b"first")
        file.flush()
        assert not path.exists()
        file.write(b", second")
    assert path.read_bytes() == b"first, second"


def test_the_umask_decides_who_may_read_a_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "summary.json", "{}")
    finally:
        os.umask(before)
    assert (tmp_path / "summary.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a").write_text("A"), "a changed since it was saved"),
        (lambda folder: (folder / "a").unlink(), "a is missing"),
        (lambda folder: (folder / "late").unlink(), "late is missing"),
        (lambda folder: (folder / "more").write_text(""), "unexpected file more"),
        (lambda folder: (folder / CHECKSUMS).unlink(), "SHA256SUMS is missing"),
        (lambda folder: (folder / CHECKSUMS).write_bytes(b"\xff\xff"), "cannot be read"),
    ],
)
def test_a_changed_folder_is_noticed(tmp_path, damage, message):
    (tmp_path / "a").write_text("a")
    write_checksums(tmp_path)
    (tmp_path / "late").write_text("")
    verify_checksums(tmp_path, unlisted=["late"])
    damage(tmp_path)
    with pytest.raises(DamagedError, match=message):
        verify_checksums(tmp_path, unlisted=["late"])


def test_an_unused_path_has_the_next_free_number(tmp_path):
    for expected in ("run", "run-2", "run-3"):
        path = unused_path(tmp_path, "run")
        assert path == tmp_path / expected
        path.mkdir()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, os.strerror(errno.EROFS)),
        RuntimeError(f"RESOURCE_EXHAUSTED: trace; {os.strerror(errno.ENOSPC)}"),
    ],
)
def test_a_disk_error_of_any_library_is_one_line_that_names_the_folder(error, tmp_path):
    with pytest.raises(UserError) as raised, report_disk_errors(tmp_path):
        raise error
    assert f"{tmp_path}: cannot write to this folder: {error.args[-1].rpartition('; ')[2]}" in str(
        raised.value
    )


@pytest.mark.parametrize("error", [RuntimeError("of another kind"), BrokenPipeError()])
def test_an_error_that_is_not_of_the_disk_does_not_blame_the_folder(error, tmp_path):
    with pytest.raises(type(error)), report_disk_errors(tmp_path):
        raise error
