"""A wheel has every file that resjax reads, and works in a folder that is no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"resjax": "resjax", "configs": "resjax/configs", "experiments": "resjax/experiments"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of this checkout, in which building leaves its own files."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", f"--wheel-dir={out}"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (built,) = out.iterdir()
    return built


def test_a_wheel_has_the_package_with_its_data_the_configs_and_the_experiments(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{inside}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and not {"__pycache__", "results"} & {*file.parts}
    }
    assert names == expected


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Runs `resjax` in a new environment, which borrows its dependencies, in a new folder."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    options = ["--no-deps", "--no-index", "--quiet"]
    pip = [sys.executable, "-m", "pip", f"--python={python}"]
    subprocess.run([*pip, "install", *options, str(wheel)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    folder = tmp_path_factory.mktemp("folder")
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*typed):
        command = [str(environment / "bin" / "resjax"), *typed]
        done = subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder, run.packages, run.python = folder, packages, python
    return run


SMALL = ("--config.model.width=4", "--config.train.steps=50")
ONE = ("--config.sweep.depths=8", "--config.sweep.seeds=0", "--workers=1")


@pytest.mark.slow
def test_an_installed_resjax_finds_configs_and_experiments_by_name(run):
    run("train", "--config=quickstart", *SMALL, "--config.model.depth=8", "--workdir=runs/one")
    printed = run("sweep", "degradation", "--config=quickstart", *SMALL, *ONE, "--workdir=runs/two")
    assert f"{run.packages}/resjax/experiments/degradation.py: 2 runs" in printed
    run("report", "runs/two", "--out=again")
    assert (run.folder / "again" / "report.html").is_file()
    assert (run.folder / "again" / "figures" / "degradation.svg").is_file()


@pytest.mark.slow
def test_an_installed_resjax_trains_a_block_that_it_has_written(run):
    run("new", "block", "my_block")
    block = "--config.model.block=my_block:MyBlock"
    run("train", "--config=quickstart", *SMALL, "--config.model.depth=8", block, "--workdir=mine")
    assert (run.folder / "mine" / "summary.json").is_file()


MISSPELT = {
    "resjax.build(": "resjax.biuld(",
    "counts.macs": "counts.mcas",
    "train.steps": "train.setps",
    "primary.name": "primary.nmae",
}


@pytest.mark.slow
def test_strict_type_checking_accepts_a_users_code_and_finds_mistakes_in_it(run, tmp_path):
    right = wrong = (ROOT / "tests" / "typed_user_code.py").read_text()
    for name, misspelt in MISSPELT.items():
        wrong = wrong.replace(name, misspelt)
    (tmp_path / "right.py").write_text(right)
    (tmp_path / "wrong.py").write_text(wrong)
    mypy = [sys.executable, "-m", "mypy", "--strict", f"--python-executable={run.python}"]

    def check(name):
        return subprocess.run([*mypy, name], cwd=tmp_path, capture_output=True, text=True).stdout

    assert check("right.py") == "Success: no issues found in 1 source file\n"
    errors = check("wrong.py")
    assert errors.count(" error: ") == len(MISSPELT)
    for misspelt in MISSPELT.values():
        assert misspelt.strip("(").partition(".")[2] in errors
