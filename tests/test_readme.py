"""The README's code is the project's promise to a user, so it runs as it stands there."""

import re
import sys
from pathlib import Path

import pytest

from resjax.analysis.runs import load_runs
from resjax.cli import main
from resjax.models.conformance import check_block

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALL = (
    "--config.model.depth=8",
    "--config.model.width=4",
    "--config.data.batch_size=16",
    "--config.train.steps=4",
    "--config.train.log_every=2",
    "--config.train.eval_every=4",
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A user's folder that holds every file that the README shows."""
    for name, code in re.findall(r"`(my_\w+\.py)`:\n\n```python\n(.*?)```", README, re.DOTALL):
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("my_blocks", "my_shortcuts"):
        sys.modules.pop(name, None)


def test_a_users_block_of_25_lines_trains_and_appears_in_the_report(here):
    assert len((here / "my_blocks.py").read_text().splitlines()) <= 25
    config = f"--config={ROOT / 'configs/quickstart.py'}"
    block = "--config.model.block=my_blocks:ReZeroBlock"
    assert main(["train", config, block, *SMALL, "--workdir=run"]) == 0
    assert main(["report", "run"]) == 0
    assert load_runs("run")["model.block"].tolist() == ["my_blocks:ReZeroBlock"]
    assert "my_blocks:ReZeroBlock" in Path("run/report.html").read_text()


def test_a_users_block_keeps_what_every_block_must_keep(here):
    check_block("my_blocks:ReZeroBlock")


def test_a_users_experiment_sweeps_a_users_shortcut(here):
    config = f"--config={ROOT / 'configs/quickstart.py'}"
    sweep = ["--config.sweep.depths=8", "--config.sweep.seeds=0", *SMALL[1:]]
    assert main(["sweep", "my_experiment.py", config, *sweep, "--workdir=sweep"]) == 0
    shortcuts = load_runs("sweep")["model.shortcut"].tolist()
    assert shortcuts == ["pad", "my_shortcuts:LearnedScale"]
    assert Path("sweep/figures/curves.svg").is_file()


def test_the_readmes_python_runs():
    (code,) = re.findall(r"## In Python\n\n```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code.replace("resnet56", "resnet8"), names)  # the small one compiles sooner
    assert names["logits"].shape == (1, 100)
    assert set(names["stages"]) == {"stem", "stage1", "stage2", "stage3"}
