"""Errors in a user's files: block and layer first, then the frames of these files and no others."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from resjax.cli import main
from resjax.models.conformance import check_block
from resjax.user_code import import_name

ROOT = Path(__file__).parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'quickstart.py'}"
BLOCKS = """\
from flax import linen as nn
from resjax.models.blocks import Block

class Reshaped(Block):
    @nn.compact
    def __call__(self, x):
        y = self.conv(self.features, 3, self.strides)(x)
        return y.reshape(3, 5)

class Grouped(Block):
    @nn.compact
    def __call__(self, x):
        return self.split(self.conv(self.features, 3, self.strides)(x))

    def split(self, y):
        return self.conv(self.features, 3, feature_group_count=5)(y)

class Misspelt(Block):
    @nn.compact
    def __call__(self, x):
        return self.conv(self.features, 3, stride=1)(x)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, from which modules are imported as in a process of its own."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [entry for entry in sys.path if entry])
        yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("block", "first", "functions"),
    [
        ("Reshaped", "layer stage1/block1: TypeError: cannot reshape array", ["__call__"]),
        ("Grouped", "layer stage1/block1/Conv_1: AssertionError", ["__call__", "split"]),
        ("Misspelt", "layer stage1/block1: TypeError: .* argument 'stride'", ["__call__"]),
    ],
)
def test_an_error_in_a_block_is_its_layer_and_the_frames_of_the_users_files(
    folder, capsys, block, first, functions
):
    (folder / "my_blocks.py").write_text(BLOCKS)
    typed = ["train", CONFIG, "--workdir=w", f"--config.model.block=my_blocks:{block}"]
    assert main(typed) == 1
    out, err = capsys.readouterr()
    assert re.match(f"resjax: error in my_blocks:{block}, {first}", err)
    frames = re.findall(r'^  File "(.+)", line \d+, in (\w+)$', err, re.MULTILINE)
    assert frames == [(str(folder / "my_blocks.py"), name) for name in functions]
    assert not out
    assert not (folder / "w").exists()


def test_check_block_raises_an_error_of_the_block_with_the_users_frames_only(folder):
    (folder / "my_blocks.py").write_text(BLOCKS)
    program = "from resjax.models.conformance import check_block; check_block('my_blocks:Reshaped')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "site-packages" not in result.stderr
    assert f'File "{folder / "my_blocks.py"}", line 8, in __call__' in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("my_blocks:Reshaped, layer stage1/block1: TypeError: cannot reshape")


FILES = {
    "a syntax error": ("def f(:\n", r"my_code\.py:1: invalid syntax"),
    "an error at import": ("x = 1\ny = x / 0\n", r"my_code\.py:2: ZeroDivisionError: division"),
    "a missing module": (
        "import nowhere\n",
        r"my_code\.py:1: ModuleNotFoundError: No module named",
    ),
    "an error in a helper": ("import my_helper\n", r"my_helper\.py:1: NameError: name 'undefined'"),
    "a misspelt name": ("Nmae = 1\n", r"'my_code' has no attribute 'Name'; did you mean 'Nmae'\?"),
}


@pytest.mark.parametrize(("body", "message"), FILES.values(), ids=FILES)
@pytest.mark.parametrize(
    "field", ["model.block", "model.shortcut", "task.name", "optimizer.name", "optimizer.schedule"]
)
def test_a_file_that_cannot_be_imported_is_one_line_with_file_and_line(
    folder, capsys, field, body, message
):
    (folder / "my_code.py").write_text(body)
    (folder / "my_helper.py").write_text("undefined\n")
    assert main(["train", CONFIG, "--workdir=w", f"--config.{field}=my_code:Name"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err)


def test_a_misspelt_module_is_answered_with_the_nearest_file(folder):
    (folder / "my_blocks.py").write_text("")
    with pytest.raises(
        ImportError, match="no module named 'my_block' here; did you mean 'my_blocks'"
    ):
        import_name("my_block:Block")


def test_an_error_of_resjax_is_raised_as_it_is():
    with pytest.raises(ValueError, match="no module named 'nowhere'"):
        check_block("nowhere:Block")
