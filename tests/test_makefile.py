"""What `make` installs and runs, from a dry run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def commands(*arguments):
    # A new environment, whatever stands beside the Makefile.
    made = ["make", "--dry-run", "--always-make", *arguments]
    # `make test EXTRAS=...` passes its variables on to these tests.
    environment = {k: v for k, v in os.environ.items() if k not in ("EXTRAS", "MAKEFLAGS")}
    ended = subprocess.run(
        made, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    return ended.stdout.replace("\\\n\t", "")


@pytest.mark.parametrize("target", ["demo", "test"])
def test_extras_are_installed_with_the_pinned_versions(target):
    printed = commands(target, "EXTRAS=cuda")
    assert "--constraint requirements.lock --constraint extras.lock --editable '.[cuda]'" in printed
    assert "touch .venv/ready-cuda\n" in printed


def test_without_extras_exactly_the_pinned_versions_are_installed():
    printed = commands("demo")
    assert "--requirement requirements.lock\n" in printed
    assert "--no-deps --editable '.'" in printed
    assert "cuda" not in printed
    assert "touch .venv/ready\n" in printed


@pytest.mark.parametrize(
    ("typed", "extra", "topologies"),
    [
        ([], "tpu", "tpu:v5e:2x2 tpu:v5p:2x2x1"),
        (["EXTRAS=cuda", "TOPOLOGIES=gpu:h100"], "cuda", "gpu:h100"),
    ],
)
def test_compilers_of_accelerators_have_an_environment_of_their_own(typed, extra, topologies):
    printed = commands("accelerators", *typed)
    assert "-m venv .venv-accelerators\n" in printed
    assert f"--editable '.[{extra}]'" in printed
    assert f"for topology in {topologies}; do " in printed
    assert ".venv-accelerators/bin/python benchmarks/accelerators.py report" in printed
    assert ".venv/" not in printed


def test_the_docs_have_an_environment_of_their_own_and_warnings_are_errors():
    printed = commands("docs")
    assert ".venv-docs/bin/pip install " in printed
    assert "--requirement docs.lock\n" in printed
    assert ".venv-docs/bin/mkdocs build --strict\n" in printed  # --quiet would undo --strict


def test_an_unknown_extra_is_refused_before_anything_is_installed(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("requirements.lock", "extras.lock"):
        (tmp_path / name).touch()
    made = ["make", "demo", "EXTRAS=tpu,cudaa", f"PYTHON={sys.executable}"]
    ended = subprocess.run(made, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "EXTRAS: no extra cudaa; known: " in ended.stderr
    assert not (tmp_path / ".venv").exists()
