"""The `resjax` command: what it runs, what it refuses in one line, and that it answers at once."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import tempfile
from argparse import PARSER, ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest

import resjax
from resjax.cli import COMMANDS, main
from resjax.cli.arguments import Parser, require_writable
from resjax.cli.output import notify, print_table
from resjax.config.schema import FIELDS
from resjax.data import DATASETS
from resjax.train.progress import print_warning

ROOT = Path(__file__).parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'quickstart.py'}"
EXPERIMENT = str(ROOT / "experiments" / "degradation.py")


@pytest.fixture
def trained(monkeypatch):
    """The list of configs that `resjax train` has trained; training itself does nothing."""
    configs = []

    def train(config, workdir, on_progress=None, announce=None, stop=None, change_schedule=False):
        configs.append(config)
        return {"test_error": 0.125, "best_test_step": 1}

    monkeypatch.setattr("resjax.train.loop.train", train)
    return configs


def refusal(capsys, *typed):
    assert main(typed) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("resjax: error: ")
    assert err.count("\n") == 1
    return err


def test_train_trains_the_config_with_its_overrides(trained, tmp_path, capsys):
    fields = ("--config.model.depth=56", "--config.optimizer.learning_rate", "0.5")
    assert main(["train", CONFIG, f"--workdir={tmp_path / 'run'}", *fields]) == 0
    (config,) = trained
    assert (config.model.depth, config.optimizer.learning_rate) == (56, 0.5)
    assert "0.125" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("train", "--config.model.dept=8"), "did you mean model.depth?"),
        (("train", "--change-schedule=yes"), "--change-schedule: takes no value, not 'yes'"),
        (("train", "--config.model.depth=57"), "depth 57"),
        (("train", "--config.model.depth"), "--config.model.depth needs a value"),
        (
            ("train", "--config.model.depth", "--config.seed=1"),
            "--config.model.depth needs a value",
        ),
        (("sweep", EXPERIMENT, "--config.sweep.depths=8,57"), "depth 57"),
        (("train", "--save-on=HUP,TERM"), "TERM is not HUP, USR1 or USR2"),
        (("sweep", "nowhere.py"), "nowhere.py: no such file"),
        (("sweep", EXPERIMENT, "--launcher=cloud"), "no such choice: 'cloud'; known: local"),
        (("sweep", EXPERIMENT, "--launcher=slrum"), "did you mean 'slurm'?"),
        (("sweep", EXPERIMENT, "--slurm.time=60"), "--slurm.time needs --launcher=slurm; the"),
        (("sweep", EXPERIMENT, "--slurm.=60"), "names no setting of the launcher slurm"),
        (("sweep", EXPERIMENT, "--local.gpus=1"), "--local.gpus: the launcher local has no such"),
        (("sweep", EXPERIMENT, "--retries=-1"), "'-1' is not an integer of at least 0"),
        (("train", "--slurm.time=60"), "`resjax train` takes no settings of a launcher"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(typed, message, tmp_path, capsys):
    workdir = tmp_path / "w"
    assert message in refusal(capsys, *typed[:2], CONFIG, f"--workdir={workdir}", *typed[2:])
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("return [{'model.dept': 8}]", "run model.dept=8: model.dept: no such field; did you mean"),
        ("return [{'seed': 1}, {'seed': 1}]", "two of its runs are the same: seed=1 and seed=1"),
        ("return []", "sweep() yields no run"),
    ],
)
def test_a_sweep_that_cannot_be_planned_launches_nothing(sweep, message, tmp_path, capsys):
    experiment, workdir = tmp_path / "mine.py", tmp_path / "w"
    experiment.write_text(f"def sweep():\n    {sweep}\n")
    assert message in refusal(capsys, "sweep", str(experiment), CONFIG, f"--workdir={workdir}")
    assert not workdir.exists()


def test_a_sweep_folder_that_cannot_be_written_launches_nothing(monkeypatch, tmp_path, capsys):
    def refuse(folder, *args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = refusal(capsys, "sweep", EXPERIMENT, CONFIG, f"--workdir={tmp_path / 'w'}")
    assert f"--workdir={tmp_path / 'w'}: cannot write to this folder: Read-only" in message


def test_commands_that_check_a_new_folder_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    folder, temporary_file = tmp_path / "new" / "w", tempfile.TemporaryFile
    others = [lambda: folder.rmdir(), lambda: (folder / "sweep.json").touch()]

    def write_beside_another(**options):
        others.pop(0)()
        return temporary_file(**options)

    monkeypatch.setattr(tempfile, "TemporaryFile", write_beside_another)
    require_writable(folder)
    assert others == []
    assert [path.name for path in folder.iterdir()] == ["sweep.json"]


def test_a_dry_run_names_the_runs_and_writes_nothing(trained, tmp_path, capsys):
    typed = ["sweep", EXPERIMENT, CONFIG, f"--workdir={tmp_path / 'w'}", "--workers=1"]
    assert main([*typed, "--dry-run", "--config.sweep.depths=8", "--config.sweep.seeds=0"]) == 0
    out = capsys.readouterr().out
    assert "this process, " in out
    assert out.count("  runs/depth8-") == 2
    assert not trained
    assert not (tmp_path / "w").exists()


def test_an_experiment_and_a_config_of_ours_are_found_by_name(trained, tmp_path, capsys):
    plans = []
    for experiment, config in ((EXPERIMENT, CONFIG), ("degradation", "--config=quickstart")):
        typed = ["sweep", experiment, config, f"--workdir={tmp_path / 'w'}", "--workers=1"]
        assert main([*typed, "--dry-run"]) == 0
        lines = capsys.readouterr().out.splitlines()
        plans.append([line for line in lines if line.startswith("  runs/")])
    assert plans[0] == plans[1] != []


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("trian",), "no such choice: 'trian'; did you mean 'train'?"),
        (("deploy",), "no such choice: 'deploy'; known: train, sweep, "),
        (("--workdir=x", "train"), "unknown option --workdir; options follow the command"),
        (("train", CONFIG, "--wrokdir=x"), "unknown option --wrokdir; did you mean --workdir?"),
        (("train", "--model.depth=20"), "did you mean --config.model.depth=20?"),
        (("train", "--batch-size=20"), "did you mean --config.data.batch_size=20?"),
        (("train", "-config.seed=1"), "did you mean --config.seed=1?"),
        (("train", "--sweep.depths=8"), "did you mean --config.sweep.depths=8?"),
        (("train", CONFIG, "--workdir=x", "seed=1"), "did you mean --config.seed=1?"),
        (("train", "--lr=1"), "unknown option --lr; known: --config, --workdir, "),
        (("train", "--config.=1"), "--config.=1: names no field"),
        (("evaluate", "--workdir=.", "--model.depth=8"), "known: --workdir, --checkpoint, --which"),
        (("evaluate", "--checkpoint=."), "last, best or a step; --workdir names the run folder"),
        (("verify", "--workdir=x"), "unknown option --workdir; it takes DIR without an option"),
        (("models", "resnet50", "x"), "unknown argument x; it takes NAME without an option"),
        (("config", str(ROOT / "configs")), "is a folder; name a Python file: cifar10.py, "),
        (("train", CONFIG), "`resjax train`: the following arguments are required: --workdir"),
        (("train", "--workdir=x"), "required: --config"),
        (("models", "resnet49"), "did you mean 'resnet50'?"),
        (
            ("models", "cifar_resnet49"),
            "'cifar_resnet44'? For another depth, set its field depth; ",
        ),
        (("models", "net"), "unknown network 'net'; `resjax models` lists all networks"),
        (("config", "nowhere.py"), "nowhere.py: no such file"),
        (("config", "--config.model.depth=0"), "model.depth=0: must be at least 1"),
        (("models", "--config.seed=1"), "`resjax models` takes no --config.seed"),
        (("report", "nowhere"), "nowhere: no such file or folder"),
        (("verify", "nowhere"), "nowhere: no such file or folder"),
        (("report", ""), "argument DIR: is empty"),
        (("evaluate", "--workdir="), "argument --workdir: is empty"),
        (("train", CONFIG, "--workdir="), "argument --workdir: is empty"),
        (("import", "", "--out=x"), "argument WEIGHTS: is empty"),
        (("train", "--config=", "--workdir=x"), "is a folder; name a Python file"),
        (("probe", "nowhere.npz", "x.npz"), "nowhere.npz: no such file or folder"),
        (("import", "nowhere.pth", "--out=x"), "nowhere.pth: no such file or folder"),
        (("evaluate", "--workdir=."), ". is not a run folder"),
        (("report", ".", "--experiment=nowhere.py"), "--experiment: nowhere.py: no such file"),
        (("evaluate", "--workdir=nowhere"), "--workdir: nowhere: no such file or folder"),
        (
            ("sweep", "degradtion", CONFIG, "--workdir=x"),
            "EXPERIMENT: degradtion: no such file; did you mean 'degradation'?",
        ),
        (
            ("sweep", "elsewhere/degradation.py", CONFIG, "--workdir=x"),
            "elsewhere/degradation.py: no such file; did you mean 'degradation'?",
        ),
        (("sweep", "", CONFIG, "--workdir=x"), "argument EXPERIMENT: is empty"),
        (("data", "lsit"), "no such choice: 'lsit'; did you mean 'list'?"),
        (("data", "prepare", "cifar01"), "did you mean 'cifar10'?"),
        (("data", "prepare", "cifar10", "--from=nowhere"), "nowhere: no such folder"),
    ],
)
def test_a_mistyped_command_is_refused_in_one_line(typed, message, capsys):
    assert message in refusal(capsys, *typed)


@pytest.mark.parametrize("option", ["--workdir", "--checkpoint"])
@pytest.mark.parametrize("command", ["predict", "features"])
def test_predict_and_features_take_the_run_folder_like_evaluate_too(command, option, capsys):
    message = refusal(capsys, command, f"{option}=nowhere", "--which=best", "x.png")
    assert message.endswith("nowhere: no such file or folder\n")


def test_evaluate_takes_the_checkpoint_like_predict_too(tmp_path, capsys):
    typed = ("evaluate", f"--workdir={tmp_path}")
    assert refusal(capsys, *typed, "--which=best") == refusal(capsys, *typed, "--checkpoint=best")


def test_a_name_that_the_system_refuses_is_one_line(capsys):
    long = 300 * "x"
    assert f"error: {long}: File name too long" in refusal(capsys, "config", long)
    assert f"{long}: File name too long" in refusal(capsys, "report", long)
    typed = ("train", CONFIG, "--workdir=x", f"--config.transfer.weights={long}")
    assert f"error: {long}: File name too long" in refusal(capsys, *typed)


def test_a_workdir_that_is_a_file_is_refused_before_training(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "cannot write to this folder" in refusal(
            capsys, "train", CONFIG, f"--workdir={workdir}"
        )
    assert not trained
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("typed", "mark", "message"),
    [
        (("train", CONFIG, "--workdir={}"), "sweep.json", "is a sweep folder, not a run folder"),
        (("train", CONFIG, "--workdir={}"), "weights.json", "is a weights folder, not a run"),
        (("sweep", EXPERIMENT, CONFIG, "--workdir={}"), "provenance.json", "is a run folder, not"),
        (("evaluate", "--workdir={}"), "sweep.json", "is a sweep folder, not a run folder; its"),
        (("report", "{}"), "weights.json", "is a weights folder with no runs"),
        (("verify", "{}"), "dataset_info.json", "is a dataset folder; it contains no runs"),
        (("import", "{}", "--out=x"), "sweep.json", "is a sweep folder, not a run folder"),
    ],
)
def test_a_folder_of_another_kind_is_named_and_left_alone(typed, mark, message, tmp_path, capsys):
    (tmp_path / mark).write_text("{}")
    if mark == "provenance.json":
        (tmp_path / "config.json").write_text("{}")
    before = sorted(tmp_path.iterdir())
    assert message in refusal(capsys, *(word.format(tmp_path) for word in typed))
    assert sorted(tmp_path.iterdir()) == before


def test_a_fault_in_resjax_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr("resjax.train.loop.train", None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        main(["train", CONFIG, f"--workdir={tmp_path}"])


def test_a_run_that_goes_on_has_the_threads_with_which_it_began(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {k: x for k, x in os.environ.items() if k != "NPROC"})
    (tmp_path / "provenance.json").write_text('{"threads": 77}')
    assert main(["train", CONFIG, f"--workdir={tmp_path}"]) == 0
    assert os.environ["NPROC"] == "77"


def test_an_interrupt_is_reported_in_one_line(monkeypatch, tmp_path, capsys):
    def train(config, workdir, on_progress=None, announce=None, stop=None, change_schedule=False):
        raise KeyboardInterrupt

    monkeypatch.setattr("resjax.train.loop.train", train)
    assert main(["train", CONFIG, f"--workdir={tmp_path}"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_models_lists_every_architecture_with_its_counts(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("cifar_resnet56 "))
    assert line.split() == ["cifar_resnet56", "56", "853,018", "125.5", "M", "32", "H15"]
    assert len({len(line) for line in lines}) == 1


def test_the_layers_of_a_model_add_up_to_its_counts(capsys):
    assert main(["models", "cifar_resnet20"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    parameters, macs = (
        sum(int(line.split()[at].replace(",", "")) for line in lines) for at in (-2, -1)
    )
    assert (parameters, macs) == (269_722, 40_551_040)


def test_config_shows_value_meaning_type_bounds_and_default_of_every_field(capsys):
    assert main(["config", CONFIG.removeprefix("--config="), "--config.model.depth=56"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for path in FIELDS:
        assert f" {path} = " in f" {shown}"
    depth = "Weight layers as the papers count them: 6n + 2 for CIFAR networks of basic blocks."
    kind = "an integer or None, at least 1 and at most 10000; default: None"
    assert f"model.depth = 56 {depth} ({kind})" in shown
    assert "data.flip = false Mirror training images" in shown


def test_data_list_shows_known_datasets_and_where_they_are_prepared(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for name, kind in (("mnist", "array_record"), ("beans", "tfrecord")):
        folder = tmp_path / name / "1.0.0"
        folder.mkdir(parents=True)
        splits = [{"name": "train", "shardLengths": ["3", "4"]}]
        info = {"name": name, "fileFormat": kind, "splits": splits}
        (folder / "dataset_info.json").write_text(json.dumps(info))
    assert main(["data", "list"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert set(rows) == {*DATASETS, "tfds:beans"}
    assert rows["digits"] == ["1,797", "10", "8", "x", "8", "x", "1", "-", "embedded"]
    assert rows["cifar10"][-1] == "-"
    assert rows["mnist"][-1] == str(tmp_path / "mnist" / "1.0.0")
    assert rows["tfds:beans"][0] == "7"
    assert " ".join(rows["tfds:beans"]).endswith("1.0.0 (tfrecord: only TensorFlow reads it)")


def test_python_m_resjax_without_a_command_prints_the_help_of_every_command():
    result = subprocess.run([sys.executable, "-m", "resjax"], capture_output=True, text=True)
    assert result.returncode == 0
    for command in COMMANDS:
        assert f"\n    {command} " in result.stdout


@pytest.mark.parametrize(
    "typed",
    [
        [],
        ["--help"],
        ["models"],
        ["config"],
        ["data", "list"],
        ["train", CONFIG, "--workdir=/x", "--y"],
        ["evaluate", "--workdir=nowhere"],
        ["import", "nowhere.pth", "--out=/x"],
    ],
)
def test_help_tables_and_refusals_import_nothing_heavy(typed):
    program = (
        "import sys\nfrom resjax.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'pandas', 'matplotlib', 'rich', 'tensorflow_datasets'}\n"
        "assert not heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program, *typed], check=True, capture_output=True)


def test_importing_resjax_imports_no_jax_and_public_names_load_on_first_use():
    program = (
        "import sys, resjax\nassert not {'jax', 'pandas'} & sys.modules.keys()\n"
        "assert all(getattr(resjax, name) for name in resjax.__all__)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        resjax.biuld  # noqa: B018


def test_the_version_is_the_installed_one(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"resjax {resjax.__version__}\n"


PATHS = {"DIR", "FILE", "IMAGE", "TRAIN", "TEST", "WEIGHTS", "EXPERIMENT"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, beside an empty working directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def path_arguments(parser, prefix=""):
    for action in parser._actions:
        if action.nargs == PARSER:
            for name, inner in action.choices.items():
                yield from path_arguments(inner, f"{prefix} {name}")
        if action.metavar in PATHS and action.dest != "config":
            yield pytest.param(action, id=f"{prefix} {action.dest}")


@pytest.mark.parametrize(
    "action",
    [
        each
        for name, module in COMMANDS.items()
        for parser in [Parser()]
        for _ in [module.add_arguments(parser)]
        for each in path_arguments(parser, name)
    ],
)
def test_a_tilde_is_the_home_folder_in_every_path_that_is_typed(action, home):
    found = []
    for suffix in ("png", "npz", "csv", "json"):
        (home / f"x.{suffix}").touch()
        with contextlib.suppress(ArgumentTypeError):  # another suffix is required
            found.append(str(action.type(f"~/x.{suffix}")))
    assert found
    assert all(path.startswith(f"{home}/x.") for path in found)
    assert not list(Path().iterdir())


def test_a_tilde_is_the_home_folder_in_configs_and_data(home, trained, capsys):
    (home / "mine.py").write_text(Path(CONFIG.partition("=")[2]).read_text())
    np.savez(home / "x.npz", images=np.zeros((4, 4, 4), np.uint8), labels=np.arange(4) % 2)
    fields = ["--config.data.name=npz:~/x.npz", "--config.data.batch_size=2"]
    assert main(["train", "--config=~/mine.py", "--workdir=~/run", *fields]) == 0
    assert f"run folder: {home / 'run'}" in capsys.readouterr().out
    weights = "--config.transfer.weights=~/nowhere"
    assert f"{home}/nowhere: no such folder" in refusal(
        capsys, "train", "--config=~/mine.py", "--workdir=~/run", weights
    )
    assert not list(Path().iterdir())


def test_what_is_printed_cannot_control_a_terminal(tmp_path, capsys):
    assert main(["report", "no\x1b[2J\nresjax: all is well"]) == 2
    print_table(("name", "class"), [("\x1b]0;title\x07\udcff", "\x9b31m")])
    notify("from a server: \x1b[31m\nsecond line")
    print_warning("\x1b[31m")
    out, err = capsys.readouterr()
    assert not {"\x1b", "\x07", "\x9b", "\udcff"} & set(out + err)
    assert r"no\x1b[2J\nresjax: all is well: no such file" in err
    assert "\nsecond line\n" in err
    assert r"\udcff" in out
