"""A network as a program: what another Python, which has no resjax, finds in it."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from resjax.cli import main
from resjax.inference.predict import classifier
from resjax.inference.program import export_program

ELSEWHERE = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("resjax", "flax"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import numpy as np
from jax import export
program, images, found = sys.argv[1:]
exported = export.deserialize(bytearray(open(program, "rb").read()))
np.save(found, exported.call(np.load(images)))
"""


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)


def test_a_program_runs_without_resjax_with_the_same_probabilities(run, weights, images, tmp_path):
    out = tmp_path / "new" / "net.stablehlo"
    assert main(["export", str(run), "--format=stablehlo", f"--out={out}"]) == 0
    given, found = tmp_path / "images.npy", tmp_path / "found.npy"
    np.save(given, images)
    typed = [sys.executable, "-c", ELSEWHERE, str(out), str(given), str(found)]
    subprocess.run(typed, check=True, cwd=tmp_path)
    np.testing.assert_allclose(np.load(found), classifier(weights)(images), rtol=1e-4, atol=1e-7)


def test_one_program_takes_any_batch_and_runs_everywhere(weights, images, tmp_path):
    export_program(weights, tmp_path / "net")
    exported = jax.export.deserialize(bytearray((tmp_path / "net").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    whole = exported.call(images)
    for batch in (1, 2):
        np.testing.assert_allclose(exported.call(images[:batch]), whole[:batch], rtol=1e-4)


def test_a_program_has_no_convolution_optimized_for_this_machine(weights, tmp_path):
    export_program(weights, tmp_path / "net")
    exported = jax.export.deserialize(bytearray((tmp_path / "net").read_bytes()))
    text = exported.mlir_module()
    assert "stablehlo.convolution" in text
    assert "stride = [1, 2]" not in text
    assert "optimization_barrier" not in text


def test_a_batch_can_be_fixed(weights, images, tmp_path):
    description = export_program(weights, tmp_path / "net", batch=3)
    exported = jax.export.deserialize(bytearray((tmp_path / "net").read_bytes()))
    assert exported.in_avals[0].shape == (3, 8, 8, 1)
    assert json.loads(description.read_text())["input"]["shape"] == [3, 8, 8, 1]


def test_the_description_documents_inputs_and_outputs(weights, tmp_path):
    described = json.loads(export_program(weights, tmp_path / "net").read_text())
    assert described["input"] == {"dtype": "uint8", "shape": ["batch", 8, 8, 1]}
    assert described["class_names"] == list("0123456789")
    assert described["preprocessing"]["shorter_side"] == 8


def test_the_torchvision_file_is_written(run, tmp_path):
    out = tmp_path / "net.safetensors"
    assert main(["export", str(run), "--format=torchvision", f"--out={out}"]) == 0
    assert "layer3.0.conv2.weight" in load_file(out)
