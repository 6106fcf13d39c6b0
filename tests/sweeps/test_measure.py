"""Finished runs are measured once, whole or not at all, and again when `measure` changes."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from resjax.config import default_config, override, to_dict
from resjax.run_files import read_findings
from resjax.sweeps import local
from resjax.sweeps.experiment import plan
from resjax.sweeps.launchers import Options
from resjax.sweeps.measure import find_measure, used_source
from resjax.train import records
from resjax.train.progress import Progress
from resjax.train.signals import StopRequest

launch = partial(local.launch, options=Options(workers=1, retries=0), stop=StopRequest())

EXPERIMENT = '''"""Depth."""
from resjax.sweeps import param

SCALE = 1

def sweep(seeds=(0, 1)):
    return param("seed", seeds)

def scaled(x):
    return SCALE * x

def measure(run):
    {statement}
    return [{{"block": name, "error": scaled(0.5)}} for name in "ab"]

def figures(runs, measurements):
    return {{}}
'''


@pytest.fixture
def measured(monkeypatch):
    """Replaces training and the restored run; lists the seeds that were trained and measured."""
    seen = SimpleNamespace(trained=[], measured=[])

    def train(config, workdir, on_progress, stop=None, claim=None):
        steps = config.train.steps
        if not (workdir / "summary.json").exists():
            seen.trained.append(config.seed)
            (workdir / "checkpoints" / str(steps)).mkdir(parents=True)
            (workdir / "checkpoints" / str(steps) / "SHA256SUMS").write_text(f"{config.seed}")
            records.write_json(workdir / "config.json", to_dict(config))
            records.write_json(workdir / "summary.json", {"steps": steps, "test_error": 0.25})
        on_progress(Progress(steps, steps, {}, 7.0))

    def restore(folder, warn):
        seen.measured.append(json.loads((folder / "config.json").read_text())["seed"])
        return SimpleNamespace(step=default_config().train.steps, checkpoint=digest(folder))

    def digest(folder):
        from resjax.run_files import checkpoint_digest

        return checkpoint_digest(folder, default_config().train.steps)

    monkeypatch.setattr("resjax.train.loop.train", train)
    monkeypatch.setattr("resjax.measurements.FinishedRun", restore)
    return seen


@pytest.fixture
def sweep(tmp_path, measured, capsys):
    """Launches with a statement in `measure`; returns how many are unfinished, and the output."""

    def sweep(statement="pass", change=lambda text: text):
        file = tmp_path / "depth.py"
        file.write_text(change(EXPERIMENT.format(statement=statement)))
        planned = plan(file, override(default_config(), {}))
        missing = launch(planned, tmp_path / "w", "resjax sweep")
        return missing, "".join(capsys.readouterr())

    return sweep


def findings(tmp_path):
    return sorted(tmp_path.glob("w/runs/*/measurements/*"))


def test_each_run_is_measured_once(sweep, measured, tmp_path):
    assert sweep()[0] == 0
    assert (measured.trained, measured.measured) == ([0, 1], [0, 1])
    assert [path.name for path in findings(tmp_path)] == ["depth.json"] * 2
    found = read_findings(findings(tmp_path)[0])
    assert found.rows == [{"block": "a", "error": 0.5}, {"block": "b", "error": 0.5}]
    missing, said = sweep()
    assert missing == 0
    assert said.count("finished before") == 2
    assert measured.measured == [0, 1]


def test_what_was_measured_names_its_step_checkpoint_code_and_versions(sweep, tmp_path):
    sweep()
    content = json.loads(findings(tmp_path)[0].read_text())
    assert content["step"] == default_config().train.steps
    assert len(content["checkpoint"]) == len(content["code"]) == 64
    assert {"commit", "versions", "device_kind", "start"} <= content["provenance"].keys()


def test_an_experiment_that_gets_a_measure_later_measures_its_finished_runs(
    sweep, measured, tmp_path
):
    sweep(change=lambda text: text.replace("def measure", "def other"))
    assert findings(tmp_path) == []
    missing, said = sweep()
    assert (missing, said.count("finished  ")) == (0, 2)
    assert (measured.trained, measured.measured) == ([0, 1], [0, 1])


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (("scaled(0.5)", "scaled(0.25)"), True),
        (("SCALE = 1", "SCALE = 2"), True),  # of a function that it calls
        (("return {}", "return {0: 1}"), False),  # of figures()
        (("def sweep", "import math\n\ndef sweep"), False),
    ],
)
def test_runs_are_measured_again_when_measure_changes(sweep, measured, change, again):
    sweep()
    sweep(change=lambda text: text.replace(*change))
    assert measured.measured == [0, 1] * (1 + again)


def test_a_run_whose_checkpoint_changed_is_measured_again(sweep, measured, tmp_path):
    sweep()
    [first, _] = sorted(tmp_path.glob("w/runs/*/checkpoints/*/SHA256SUMS"))
    first.write_text("another")
    sweep()
    assert measured.measured == [0, 1, 0]


def test_without_a_checkpoint_what_was_measured_is_kept_and_a_change_is_said(
    sweep, measured, tmp_path
):
    sweep()
    for folder in tmp_path.glob("w/runs/*/checkpoints"):
        shutil.rmtree(folder)
    assert sweep()[1].count("warning") == 0
    missing, said = sweep(change=lambda text: text.replace("0.5", "0.25"))
    assert (missing, len(measured.measured)) == (0, 2)
    assert said.count("depth.json was measured before measure() of ") == 2
    assert read_findings(findings(tmp_path)[0]).rows[0]["error"] == 0.5


def test_an_error_in_measure_is_one_line_with_file_and_line_and_loses_no_run(
    sweep, measured, tmp_path
):
    missing, said = sweep("1 / 0")
    assert missing == 2
    line = f"not measured: {tmp_path / 'depth.py'}:13: ZeroDivisionError: division by zero"
    assert said.count(line) == 2
    assert findings(tmp_path) == []
    assert all("Traceback" in path.read_text() for path in tmp_path.glob("w/runs/*/error.txt"))
    assert sweep()[0] == 0
    assert (measured.trained, measured.measured) == ([0, 1], [0, 1, 0, 1])
    assert not list(tmp_path.glob("w/runs/*/error.txt"))


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("return 3", "measure() returned int; return a dict of values by name, or a list of"),
        ("return 'abc'", "measure() returned str"),
        ("return None", "measure() returned NoneType"),
        ("return {'x': [1]}", "measure() returned x as list; values are numbers, texts or"),
        ("import numpy; return {'x': numpy.ones(3)}", "x as an array of shape (3,)"),
        ("return {'folder': 'x'}", "names a value folder, which is the run's own column"),
    ],
)
def test_a_measure_that_returns_no_rows_is_refused(sweep, statement, message, tmp_path):
    missing, said = sweep(statement)
    assert missing == 2
    assert f"not measured: {tmp_path / 'depth.py'}: measure() " in said
    assert message in said
    assert findings(tmp_path) == []


def test_values_of_numpy_and_values_that_are_not_finite_are_kept(sweep, tmp_path):
    statement = "import numpy as np; return {'a': np.float32(2), 'b': np.nan, 'c': np.bool_(True)}"
    assert sweep(statement)[0] == 0
    [row] = read_findings(findings(tmp_path)[0]).rows
    assert (row["a"], row["c"]) == (2.0, True)
    assert np.isnan(row["b"])


def test_a_diverged_run_is_not_measured(sweep, measured, tmp_path):
    sweep()
    for folder in tmp_path.glob("w/runs/*"):
        (folder / "diverged.json").write_text('{"step": 3, "reason": "the loss is not finite"}')
        shutil.rmtree(folder / "measurements")
    assert sweep()[0] == 0
    assert len(measured.measured) == 2


def test_the_source_of_a_function_is_what_it_uses():
    text = "import a\nfrom b import c as d\nX = Y = 1\n@d\ndef f():\n    return Y\ndef g(): f()\n"
    assert used_source(text, "f") == ("from b import c as d\nX = Y = 1\n@d\ndef f():\n    return Y")
    assert used_source(text, "g") == f"{used_source(text, 'f')}\ndef g(): f()"
    assert used_source(text, "h") is None


def test_an_experiment_without_measure_measures_nothing(tmp_path):
    (tmp_path / "x.py").write_text("def sweep(): pass\n")
    assert find_measure(tmp_path / "x.py") is None
