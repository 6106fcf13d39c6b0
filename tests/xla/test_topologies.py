"""Names of topologies, and what is said if one cannot be described."""

import importlib.util
import os
import subprocess
import sys

import pytest

from resjax.errors import UserError
from resjax.xla import topologies


@pytest.mark.parametrize(
    "name", ["", "tpu", "tpu:v5e", "tpu:v9:2x2", "tpu:v5e:2x", "gpu:h999", "gpu:h100:0", "cpu:a:1"]
)
def test_an_unknown_topology_is_refused_with_examples(name):
    with pytest.raises(UserError, match="no such topology; known are, for example, tpu:v5e:2x2"):
        topologies.describe(name)


@pytest.mark.parametrize(("name", "extra"), [("tpu:v5e:2x2", "tpu"), ("gpu:h100", "cuda")])
def test_a_missing_compiler_is_one_line_that_names_the_extra(monkeypatch, name, extra):
    monkeypatch.setattr(topologies, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refusal:
        topologies.describe(name)
    assert str(refusal.value) == (f'--topology={name} needs a compiler: pip install ".[{extra}]"')


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, extra tpu")
def test_a_slice_that_does_not_exist_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"--topology=tpu:v5e:3x7: .*not divisible") as refusal:
        topologies.describe("tpu:v5e:3x7")
    assert "\n" not in str(refusal.value)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, extra tpu")
def test_describing_a_slice_prints_nothing():
    script = "from resjax.xla.topologies import describe; describe('tpu:v5e:2x2')"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
