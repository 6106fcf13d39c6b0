"""`resjax new` writes files that pass their own tests at once, which find a mistake in them."""

import re
import subprocess
import sys

import pytest

from resjax import cli
from resjax.starters import KINDS

# Maps each kind to a part of its file and a mistake in place of it.
MISTAKES = {
    "block": ("self.conv(self.features, 3, self.strides)", "self.conv(self.features, 3)"),
    "shortcut": ("pad(x, self.features, self.strides)", "x"),
    "experiment": ('"model.depth"', '"model.dept"'),
    "diagnostic": ("return context.per_array", "return {} and context.per_array"),
    "task": ("batch)).mean()", "batch))"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_all_starting_files_pass_their_tests_and_a_mistake_in_one_fails_them(folder):
    for kind in KINDS:
        assert cli.main(["new", kind, f"wide_{kind}"]) == 0
        assert cli.main(["new", kind, f"wrong_{kind}"]) == 0
        file = folder / f"wrong_{kind}.py"
        right, wrong = MISTAKES[kind]
        assert right in file.read_text()
        file.write_text(file.read_text().replace(right, wrong))
    typed = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider"]
    done = subprocess.run(typed, cwd=folder, capture_output=True, text=True, timeout=600)
    outcomes = set(re.findall(r"^(PASSED|FAILED) (test_\w+)", done.stdout, re.MULTILINE))
    assert outcomes >= {("PASSED", f"test_wide_{kind}") for kind in KINDS}, done.stdout
    failed = {file for outcome, file in outcomes if outcome == "FAILED"}
    assert failed == {f"test_wrong_{kind}" for kind in KINDS}, done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_have_the_users_names_and_the_commands_that_use_them(kind, folder, capsys):
    assert cli.main(["new", kind, "zero_init2"]) == 0
    written = files(folder)
    assert set(written) == {"zero_init2.py", "test_zero_init2.py"}
    assert not any(f"my_{kind}" in text or f"My{kind}" in text for text in written.values())
    out = capsys.readouterr().out
    assert "    python -m pytest test_zero_init2.py\n    resjax " in out
    named = "ZeroInit2" if kind in ("block", "shortcut", "task") else "zero_init2"
    assert named in written["zero_init2.py"]
    assert named in out.partition("    resjax ")[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("existing", ["mine.py", "test_mine.py"])
def test_nothing_is_overwritten(kind, existing, folder, capsys):
    (folder / existing).write_text("mine")
    assert cli.main(["new", kind, "mine"]) == 2
    assert capsys.readouterr().err == (
        f"resjax: error: {existing}: exists already; choose another name than mine\n"
    )
    assert files(folder) == {existing: "mine"}


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (
            "block",
            "WideBlock",
            "'WideBlock' cannot be the name of a module; use lower-case letters, digits and "
            "underscores, such as wide_block",
        ),
        ("task", "../my-task.py", "such as my_task"),
        ("task", "3", "such as my_task"),
        ("diagnostic", "lambda", "lambda is a word of Python; choose another name, such as my_"),
        ("experiment", "json", "json is an installed module; choose another name"),
        (
            "block",
            "conftest",
            "conftest is the name of a file that pytest or Python loads",
        ),
        ("task", "test_depth", "test_depth is the name of a file that pytest"),
        ("diagnostic", "depth_test", "depth_test is the name of a file that pytest"),
        ("shortcut", "sitecustomize", "sitecustomize is "),
        ("shortcut", "shortcut", "shortcut is a name that the file uses; choose another"),
        ("diagnostic", "jnp", "jnp is a name that the file uses"),
        ("blok", "mine", "no such choice: 'blok'; did you mean 'block'?"),
    ],
)
def test_a_name_that_cannot_work_is_refused_in_one_line(kind, name, message, folder, capsys):
    assert cli.main(["new", kind, name]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not files(folder)
