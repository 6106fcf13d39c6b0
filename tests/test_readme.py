"""What the README and the pages of docs/ tell a user to type works as it stands there."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot
from pandas import read_csv
from PIL import Image

from resjax import cli
from resjax.analysis.runs import load_layers, load_runs
from resjax.config import default_config, load, override, resolve
from resjax.config.schema import FIELDS
from resjax.measurements import FinishedRun
from resjax.models.conformance import check_block
from resjax.starters import KINDS, write_starter
from resjax.sweeps.experiment import plan

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    "README": README,
    **{file.stem: file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))},
}

# Makes a run short; everything else is as the page has it.
SMALL = (
    "--config.model.depth=8",
    "--config.model.width=4",
    "--config.data.batch_size=16",
    "--config.train.steps=50",
)
SMALL_SCENES = (
    *SMALL[:2],
    "--config.data.batch_size=4",
    "--config.train.steps=2",
    "--config.optimizer.warmup_steps=1",
)
SMALL_SWEEP = (*SMALL[1:], "--config.sweep.depths=8", "--config.sweep.seeds=0", "--workers=1")

NAMES = {"NAME": "degradation", "WEIGHTS": "runs/deep", "DIR": "runs/mine"}
"""Replaces the placeholders of commands, as a reader would."""

PARSED_ONLY = {
    r"^resjax data prepare": "downloads an archive",
    r"=configs/(cifar10|imagenet|fashion_mnist|transfer_fashion)\.py": "its data are downloaded",
    r"data\.name=nuclei": "its data come with the extra nuclei",
    r"data\.name=(folder|coco):|show coco:": "reads photographs of the reader and their labels",
    r"^resjax import|checkpoint=runs/mine": "reads weights that are downloaded",
    r"=configs/finetune\.py": "changes a ResNet-50",
    r"^resjax sweep experiments/dense\.py": "trains the networks of the page's first commands",
    r"--coco=": "needs the extra detection",
    r"=tensorboard|=wandb": "needs the extra tracking, and --follow goes on until Ctrl-C",
}
"""Why a command is parsed and its config resolved, but not run, by a pattern of such commands."""

NOT_PARSED = {
    "git clone": "needs the address of a repository",
    "python3 -m venv": "tests/test_wheel.py installs resjax",
    "pip install": "needs a package index",
    "make demo": "takes a minute; tests/test_claims.py runs its sweep",
    "ray start": "starts a cluster; tests/sweeps/test_ray.py does",
}
"""Why a command is not even parsed, by its first words."""

NO_COMMANDS = {
    "configs/*.py ──►": "a diagram",
    "photos/images/": "a list of files",
    "269,722 parameters": "the output of a command",
    "runs/cifar10: 50 runs": "the output of a command",
}
"""Indented blocks that are not commands: the first words of each, and what it is."""

NOT_EXECUTED = {"# PyTorch\n": "needs torchvision"}
"""Why a block of Python is compiled, but not executed, by its first words."""


def indented(page: str) -> list[str]:
    """Returns the indented blocks of a page; a line that goes on in the next is one line."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\\\n\s*", "", text)
    return re.findall(r"(?<=\n\n)(?: {4}.*\n)+", text)


def commands(page: str) -> list[list[str]]:
    """Returns the command lines in the indented code of a page, as lists of words."""
    lines = [line.strip() for block in indented(page) for line in block.splitlines()]
    found = [re.fullmatch(r"(?:srun )?((?:resjax|python) .*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


def fill_in(page: str) -> str:
    """Returns a page in which the words in capitals are replaced."""
    for name, value in NAMES.items():
        page = re.sub(rf"(?<![-.]){name}\b", value, page)
    return page


def parsed_only(words: list[str]) -> list[str]:
    """Returns the entries of PARSED_ONLY that a command matches."""
    return [pattern for pattern in PARSED_ONLY if re.search(pattern, shlex.join(words))]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


SECTIONS = [
    pytest.param(section, id=f"{page}: {section.partition(chr(10))[0]}")
    for page, text in PAGES.items()
    if page != "tutorial"
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
    """A user's working directory with every file that the pages show."""
    for name, code in python_files("".join(PAGES.values())).items():
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
            Path(written).unlink(missing_ok=True)
    small = SMALL_SCENES if any("configs/scenes" in word for word in arguments) else SMALL
    arguments += {"train": small, "sweep": SMALL_SWEEP}.get(arguments[0], ())
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
def test_the_commands_of_a_section_work_in_their_order(
    section, users_folder, weights, provide, monkeypatch
):
    for words in commands(fill_in(section)):
        provide(words)
        if parsed_only(words):
            parse(words, monkeypatch)
            continue
        run(words)
        check_output(words)


def test_everything_indented_is_tested_or_listed_with_a_reason():
    used = set()
    for page, text in PAGES.items():
        for block in indented(fill_in(text)):
            if listed := [start for start in NO_COMMANDS if block.strip().startswith(start)]:
                used.update(listed)
                continue
            for line in block.splitlines():
                if typed := commands(f"\n\n{line}\n"):
                    used.update(parsed_only(*typed))
                    continue
                listed = [start for start in NOT_PARSED if line.strip().startswith(start)]
                assert listed, f"{page}: {line}"
                used.update(listed)
        for code in python_blocks(text):
            used.update(start for start in NOT_EXECUTED if code.startswith(start))
    needed = {*NO_COMMANDS, *NOT_PARSED, *PARSED_ONLY, *NOT_EXECUTED}
    assert used == needed, "these entries are needed no longer"


@pytest.fixture
def execute():
    """Returns a function that runs the Python of a page, in order, and returns what it defines."""

    def run(page):
        names: dict = {"__name__": page}
        for code in python_blocks(PAGES[page]):
            small = re.sub(r"(cifar_)?resnet(18|56)", "cifar_resnet8", code)  # compiles sooner
            compiled = compile(small, page, "exec")
            if not code.startswith(tuple(NOT_EXECUTED)):
                exec(compiled, names)
        return names

    return run


def test_python_is_on_pages_whose_python_a_test_executes():
    found = {page for page, text in PAGES.items() if python_blocks(text)}
    assert found == {"README", "experiments", "pytorch", "tracking", "tutorial"}


def test_the_python_of_the_readme_runs(execute, folder):
    names = execute("README")
    assert names["logits"].shape == (1, 100)
    assert set(names["stages"]) == {"stem", "stage1", "stage2", "stage3"}


def test_the_measurement_of_the_experiments_page_measures_a_run(execute, deep):
    rows = execute("experiments")["measure"](FinishedRun(deep))
    assert [row["block"] for row in rows] == [f"stage{i}/block1" for i in (1, 2, 3)]
    assert all(-1 < row["rise"] < 1 for row in rows)


def test_the_programs_beside_those_of_pytorch_run(execute):
    names = execute("pytorch")
    programs = PAGES["pytorch"].count("# resjax\n")
    assert programs == PAGES["pytorch"].count("# PyTorch\n") > 0
    assert names["logits"].shape == (2, 10)
    assert set(names["variables"]) == {"params", "batch_stats"}
    assert names["loss"] > 0
    model = names["model"].clone(block=names["BasicBlock"])
    logits = model.apply(names["variables"], names["images"])
    assert (logits == names["model"].apply(names["variables"], names["images"])).all()


def check_output(words: list[str]) -> None:
    """Checks that a command did with the user's code, and wrote, what it was told to."""
    command, workdir = shlex.join(words), words[-1].removeprefix("--workdir=")
    if chosen := dict(re.findall(r"--config\.(\w+\.\w+)=(my_\S+)", command)):
        [(_, trained)] = load_runs(workdir).iterrows()
        assert trained["finished"]
        assert {field: trained[field] for field in chosen} == chosen
    for names in re.findall(r"--config\.diagnostics\.names=(\S+)", command):
        assert {name.rpartition(":")[2] for name in names.split(",")} <= set(load_layers(workdir))
    if words[1] == "track":
        [lines] = Path("runs/deep/tracking").rglob("lines.txt")
        assert "test/error" in lines.read_text()
    if words[1] == "sweep":
        assert list(Path(workdir, "figures").glob("*.svg"))
    for file in re.findall(r"--out=(\S+)", command):
        assert Path(file).exists()


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
    """Weights and images in the user's folder; a run may stand for a weights folder."""
    digits = [f"runs/digits-{each}" for each in ("none-8", "none-20", "none-56", "pad-8", "pad-56")]
    for name in ("weights/resnet50", "runs/pretrained", *digits):
        shutil.copytree(deep, users_folder / name)
    (users_folder / "photos").mkdir()
    Image.new("RGB", (40, 30)).save(users_folder / "photos" / "a.png")
    for name in ("resnet50-0676ba61.pth", "deeplabv3_resnet50.pth"):
        (users_folder / name).touch()


@pytest.fixture
def provide(users_folder, deep):
    """Returns a function that copies the runs which a command reads, if no other has made them."""
    digits = ROOT / "experiments" / "results" / "digits"
    sources = {
        "runs": ("runs/deep", deep),
        "runs/deep": ("runs/deep", deep),
        "runs/mine": ("runs/mine", deep),
        "runs/cifar10": ("runs/cifar10", digits / "degradation"),
        "runs/degradation": ("runs/degradation", digits / "degradation"),
        "runs/shortcut_options": ("runs/shortcut_options", digits / "shortcut_options"),
    }

    def copy(words):
        if words[1] in ("train", "sweep"):
            return
        for word in words:
            target, source = sources.get(word.rpartition("=")[2], (None, None))
            if target and not (users_folder / target).exists():
                shutil.copytree(source, users_folder / target)

    return copy


def test_the_tutorial_followed_in_its_order_gives_its_figure_and_verdicts(folder, capsys):
    parts = re.compile(
        r"(?:`(?P<file>\w+\.py)`:\n\n)?^```python\n(?P<code>(?:.*\n)*?)```$"
        r"|(?P<shell>(?:^ {4}.*\n)+)",
        re.MULTILINE,
    )
    names: dict = {}
    for part in parts.finditer(PAGES["tutorial"]):
        if part["file"]:
            assert Path(part["file"]).is_file()  # `resjax new` wrote it
            Path(part["file"]).write_text(part["code"])
        elif part["code"]:
            exec(part["code"], names)
        for words in commands(f"\n\n{part['shell'] or ''}"):
            if words[0] == "python":
                done = subprocess.run([sys.executable, *words[1:], "-p", "no:cacheprovider"])
                assert done.returncode == 0, shlex.join(words)
            else:
                run(words)
    assert "stage3 block1: from " in capsys.readouterr().out
    for sweep in (Path("runs/layer_scale_depth"), Path("runs/ten_seeds")):
        assert load_runs(sweep)["finished"].tolist() == [True] * 3
        assert (sweep / "figures" / "depth.svg").is_file()
        assert len(read_csv(sweep / "claims.csv")) == 3


def test_the_results_of_the_tutorial_were_judged_by_its_experiment():
    copy = ROOT / "experiments" / "results" / "digits" / "layer_scale_depth" / "experiment.py"
    assert copy.read_text() in python_blocks(PAGES["tutorial"])


def test_the_notebook_runs_and_its_outputs_are_those_of_its_code(folder, capsys):
    notebook = json.loads((ROOT / "docs" / "training_loop.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    names: dict = {}
    for cell in cells:
        code = "".join(cell["source"]).replace("DEPTH, STEPS = 20, 300", "DEPTH, STEPS = 8, 6")
        exec(code, names)
        printed = "".join(line for output in cell["outputs"] for line in output.get("text", []))
        # Numbers differ: the networks here are smaller.
        assert mask(capsys.readouterr().out) == mask(printed)
        kinds = {output["output_type"] for output in cell["outputs"]} - {"stream"}
        assert kinds == ({"display_data"} if "subplots" in code else set())
    assert names["STEPS"] == 6
    pyplot.close("all")


def mask(text: str) -> str:
    """Returns a text without its numbers."""
    return re.sub(r"[\d.,]+", "0", text)


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
