"""A file is the old one or the new one."""

import os

import pytest

from resjax.disk import write_atomically


def test_content_replaces_what_was_there(tmp_path):
    path = write_atomically(tmp_path / "page.html", "old")
    assert write_atomically(path, "new ±").read_text("utf-8") == "new ±"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("failing", ["fsync", "chmod", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(failing, tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "summary.json", "old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
