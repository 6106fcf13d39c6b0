"""`resjax verify` names every damaged file of a run, and finds an intact run intact."""

import json
import os
import shutil

import jax.numpy as jnp
import pytest

from resjax.config import to_dict
from resjax.errors import UserError
from resjax.run_files import CLASSIFICATION_ERROR
from resjax.train import records
from resjax.train.checkpoints import CheckpointManager
from resjax.train.verify import verify


@pytest.fixture(scope="module")
def intact(configure, tmp_path_factory):
    """The folder of a finished run of 8 steps, whose network is one array."""
    run = tmp_path_factory.mktemp("intact") / "run"
    run.mkdir()
    config = to_dict(configure())
    metrics = records.JsonLinesFile(run / "metrics.jsonl", "")
    layers = records.JsonLinesFile(run / "layers.jsonl", "")
    checkpoints = CheckpointManager(run / "checkpoints", CLASSIFICATION_ERROR)
    for step in (4, 8):
        layers.write({"step": step, "layer": "stem", "norm": step / 8})
        for split in ("train", "test"):
            metrics.write({"step": step, "split": split, "loss": 1 / step, "error": 0.5})
        record = {"config": config, "metrics": metrics.text, "layers": layers.mark}
        checkpoints.save({"kernel": jnp.full((256,), step / 3)}, step, record)
    for file in (checkpoints, metrics, layers):
        file.close()
    summary = {"steps": 8, "train_loss": 1 / 8, "test_loss": 1 / 8, "test_error": 0.5}
    for name, content in (("config", config), ("provenance", {}), ("summary", summary)):
        records.write_json(run / f"{name}.json", content)
    return run


def test_an_intact_run_gets_one_line(intact):
    (finding,) = verify(intact.parent)
    assert (finding.path, finding.damaged) == (intact, False)
    assert finding.message == "intact: 4 lines of metrics; checkpoints: 4, 8"


def test_arrays_that_are_not_finite_are_named(intact, tmp_path):
    checkpoints = CheckpointManager(tmp_path / "run" / "checkpoints", CLASSIFICATION_ERROR)
    shutil.copytree(intact, tmp_path / "run", dirs_exist_ok=True)
    record = {"config": json.loads((intact / "config.json").read_text()), "metrics": ""}
    state = {
        "params": {"kernel": jnp.array([1.0, jnp.nan])},
        "opt_state": {"mu": jnp.array(jnp.inf)},
    }
    checkpoints.save(state, 12, record)
    checkpoints.close()
    named, _ = verify(tmp_path / "run")
    assert named.path == tmp_path / "run" / "checkpoints" / "12"
    assert not named.damaged  # it is what the run saved
    assert named.message == "intact, but params/kernel is not finite (1 of 2 values)"


def flip(path):
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def change(**values):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def repeat(path):
    path.write_text(2 * path.read_text())


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("checkpoints/4/record/metadata", flip, "record/metadata changed since it was saved"),
        ("checkpoints/8/commit_success.txt", os.unlink, "commit_success.txt is missing"),
        ("checkpoints/8/state/_METADATA", os.unlink, "state/_METADATA is missing"),
        ("checkpoints/8/SHA256SUMS", os.unlink, "SHA256SUMS is missing"),
        ("checkpoints/8", shutil.rmtree, "no intact checkpoint of its last step, 8"),
        ("metrics.jsonl", flip, "damaged: line 4 is not a line of metrics.jsonl"),
        ("metrics.jsonl", os.unlink, "missing"),
        ("diverged.json", lambda path: path.write_text("{}"), "damaged: not a step and a reason"),
        ("metrics.jsonl", repeat, "damaged: steps repeat or decrease"),
        ("layers.jsonl", flip, "damaged: the newest checkpoint has other lines"),
        ("layers.jsonl", os.unlink, "missing"),
        ("config.json", os.unlink, "missing"),
        ("config.json", change(seed=1), "damaged: the newest checkpoint has another config"),
        ("provenance.json", os.unlink, "missing"),
        ("summary.json", change(test_loss=1), "damaged: test_loss is not that of the last line"),
        ("summary.json", lambda path: path.write_text("{}"), "damaged: not a summary"),
    ],
)
def test_a_damaged_file_is_named(intact, tmp_path, name, damage, message):
    run = tmp_path / "above" / "run"
    shutil.copytree(intact, run)
    damage(run / name)
    findings = verify(tmp_path)
    assert all(finding.damaged for finding in findings)
    assert any(message in finding.message for finding in findings)
    assert all("\n" not in finding.message for finding in findings)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="contains no runs"):
        verify(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        verify(tmp_path / "nowhere")
