"""What the README and the pages of docs/ tell a user to type works as it stands there."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from resjax import cli
from resjax.analysis.runs import load_layers, load_runs
from resjax.config import default_config, load, override, resolve
from resjax.config.schema import FIELDS
from resjax.models.conformance import check_block
from resjax.starters import KINDS, write_starter
from resjax.sweeps.experiment import plan

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    "README": README,
    **{
        name: (ROOT / "docs" / f"{name}.md").read_text()
        for name in (
            *("data", "training", "tracking", "clusters", "devices", "transfer", "results"),
            *("story", "reports", "faq", "pytorch"),
        )
    },
}

# Makes a run short; everything else is as the page has it.
SMALL = (
    "--config.model.depth=8",
    "--config.model.width=4",
    "--config.data.batch_size=16",
    "--config.train.steps=50",
)
SMALL_SWEEP = (*SMALL[1:], "--config.sweep.depths=8", "--config.sweep.seeds=0", "--workers=1")
# Commands with one of these words need data, weights or processes that are not here.
PARSED_ONLY = (
    "prepare",
    "cifar10",
    "fashion",
    "imagenet",
    "nuclei",
    "weights/",
    "photos",
    "--distributed",
    "track",
)


def commands(page: str) -> list[list[str]]:
    """Returns the command lines in the indented code of a page, as lists of words."""
    code = re.sub(r"\\\n\s*", "", page)
    lines = re.findall(r"^    (?:srun )?((?:resjax|python) .*)$", code, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


SECTIONS = [
    pytest.param(section, id=f"{page}: {section.partition(chr(10))[0]}")
    for page, text in PAGES.items()
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE)
    if commands(section)
]


def python_files(page: str) -> dict[str, str]:
    found = re.findall(r"`(my_\w+\.py)`:\n\n```python\n(.*?)```", page, re.DOTALL)
    return dict(found)


STARTERS = {f"my_{kind}.py": kind for kind in KINDS}  # what `resjax new` writes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's working directory; a console script has it on no path."""
    for name in ("configs", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.fixture
def users_folder(folder):
    """A user's working directory with every file that the README shows."""
    for name, code in python_files(README).items():
        if name in STARTERS:
            write_starter(STARTERS[name], name.removesuffix(".py"), folder)
        else:
            (folder / name).write_text(code)
    return folder


def run(words: list[str]) -> None:
    """Runs a command of a page at small scale."""
    name, *arguments = words
    if name == "python":  # tests/test_starters.py runs it
        assert arguments[:2] == ["-m", "pytest"]
        assert Path(arguments[2]).is_file()
        return
    if arguments[0] == "new":  # which overwrites nothing
        for written in (f"{arguments[2]}.py", f"test_{arguments[2]}.py"):
            Path(written).unlink()
    arguments += {"train": SMALL, "sweep": SMALL_SWEEP}.get(arguments[0], ())
    assert cli.main(arguments) == 0, shlex.join(words)


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses a command of a page and resolves its configs, without running it."""

    def check(arguments):
        if "config" in arguments and arguments.config:
            config = override(load(arguments.config), arguments.overrides)
            if "experiment" in arguments:
                plan(arguments.experiment, config)
            else:
                resolve(config)

    with monkeypatch.context() as patch:
        for command in cli.COMMANDS.values():
            patch.setattr(command, "run", check)
        for command in ("prepare_dataset", "show_dataset"):
            patch.setattr(cli.data, command, check)
        assert cli.main(words[1:]) == 0, shlex.join(words)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_commands_of_a_section_work_in_their_order(section, users_folder, weights, monkeypatch):
    for words in commands(section.replace("WEIGHTS", "runs/deep")):
        if any(part in word for part in PARSED_ONLY for word in words):
            parse(words, monkeypatch)
            continue
        run(words)
        check_output(words)


def check_output(words: list[str]) -> None:
    """Checks that a command did with the user's code, and wrote, what it was told to."""
    command, workdir = shlex.join(words), words[-1].removeprefix("--workdir=")
    if chosen := dict(re.findall(r"--config\.(\w+\.\w+)=(my_\S+)", command)):
        [(_, trained)] = load_runs(workdir).iterrows()
        assert trained["finished"]
        assert {field: trained[field] for field in chosen} == chosen
    for names in re.findall(r"--config\.diagnostics\.names=(\S+)", command):
        assert {name.rpartition(":")[2] for name in names.split(",")} <= set(load_layers(workdir))
    if words[1] == "sweep":
        assert list(Path(workdir, "figures").glob("*.svg"))
    for file in re.findall(r"--out=(\S+)", command):
        assert Path(file).is_file()


def test_the_readme_shows_what_new_writes(folder):
    shown = python_files(README)
    for name, kind in STARTERS.items():
        assert cli.main(["new", kind, name.removesuffix(".py")]) == 0
        assert shown[name] == (folder / name).read_text().partition('"""\n\n')[2]


def test_the_readmes_experiment_trains_its_own_depths_with_the_quickstart(users_folder):
    planned = plan(Path("my_experiment.py"), load("configs/quickstart.py"))
    assert {run.config.model.depth for run in planned.runs} == {20, 56}


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """The run folder that the pages evaluate and read weights from."""
    folder = tmp_path_factory.mktemp("deep") / "deep"
    config = f"--config={ROOT / 'configs' / 'quickstart.py'}"
    assert cli.main(["train", config, *SMALL, f"--workdir={folder}"]) == 0
    return folder


@pytest.fixture
def weights(users_folder, deep):
    """Runs and weights in the user's folder; a run may stand for a weights folder."""
    for name in ("runs/deep", "weights/resnet50", "runs/pretrained"):
        shutil.copytree(deep, users_folder / name)
    (users_folder / "photos").mkdir()
    (users_folder / "resnet50-0676ba61.pth").touch()


def test_the_readmes_python_runs():
    (code,) = re.findall(r"## In Python\n\n```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code.replace("resnet56", "resnet8"), names)  # the small one compiles sooner
    assert names["logits"].shape == (1, 100)
    assert set(names["stages"]) == {"stem", "stage1", "stage2", "stage3"}


@pytest.mark.parametrize("page", PAGES)
def test_every_field_that_a_page_names_exists_and_takes_the_value_shown(page):
    sections = {path.partition(".")[0] for path in FIELDS} - {"sweep"}
    named = re.findall(r"`(?:--config\.)?((\w+)\.[\w.]+)(?:=([^`\s]+))?`", PAGES[page])
    for field, section, value in named:
        if section not in sections or field.endswith(".py"):
            continue
        if value and value.isupper():
            continue  # NAME=VALUE
        nested = re.match(r"\w+\.(options|schedule_options|\w+_options|thaw)\.", field)
        assert field in FIELDS or nested, f"{page}: {field}"
        if value:
            override(default_config(), {field: value})


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    folder = ROOT if page == "README" else ROOT / "docs"
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        assert (folder / name).is_file(), f"{page}: {link}"
        title = anchor.replace("-", " ").capitalize()
        assert not anchor or f"\n## {title}\n" in (folder / name).read_text(), link


def test_code_written_to_the_readme_of_8811462_still_works(folder):
    shutil.copytree(ROOT / "tests" / "readme_8811462", folder, dirs_exist_ok=True)
    block = "--config.model.block=my_blocks:ReZeroBlock"
    config = "--config=configs/quickstart.py"
    run(["resjax", "sweep", "my_experiment.py", config, block, "--workdir=sweep"])
    runs = load_runs("sweep")
    assert runs["model.shortcut"].tolist() == ["pad", "my_shortcuts:LearnedScale"]
    assert runs["model.block"].tolist() == ["my_blocks:ReZeroBlock"] * 2
    assert Path("sweep/figures/curves.svg").is_file()


def test_a_pre_activation_block_written_to_that_readme_works_too(folder):
    shutil.copytree(ROOT / "tests" / "readme_8811462", folder, dirs_exist_ok=True)
    check_block("my_preact_blocks:OneConvBlock")
