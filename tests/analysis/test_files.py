"""A file is the old one or the new one."""

import os
from pathlib import Path

import pytest

from resjax.analysis.files import write_whole


def test_content_replaces_what_was_there(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "made" / "page.html", "old")
    assert write_whole(path, "new ±").read_text("utf-8") == "new ±"
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_whole(tmp_path / "page.html", "old")

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
