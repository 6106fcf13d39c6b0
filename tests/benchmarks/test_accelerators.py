"""Checks what the benchmark finds in programs for accelerators, and its page."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs the compiler of TPUs: pip install ".[tpu]" (0.7 GB)',
)


@pytest.fixture(scope="module")
def accelerators(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("accelerators")


@pytest.fixture(scope="module", params=["tpu:v5e:2x2", "tpu:v5p:2x2x1"])
def small(
    request: pytest.FixtureRequest,
    accelerators: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Returns the record of a network of eight layers in bfloat16, compiled for four TPUs."""
    case = accelerators.Case(
        "small", "quickstart.py", {"model.depth": 8, "model.dtype": "bfloat16"}
    )
    folder = tmp_path_factory.mktemp("accelerators")
    path, programs = folder / "result.json", folder / "programs"
    accelerators.measure([case], request.param, path, programs)
    first = json.loads(path.read_text())["cases"]["small"]
    accelerators.measure([case], request.param, path, programs)
    assert json.loads(path.read_text())["cases"]["small"] == first  # from the programs kept
    return first


@needs_tpu_compiler
def test_a_program_in_bfloat16_has_no_convolution_in_float32(small: dict[str, Any]) -> None:
    convolutions = small["train"]["convolutions"]
    assert set(convolutions) == {"bf16"}
    assert convolutions["bf16"] == 7 + 7 + 6  # forward, of the weights, of the images


@needs_tpu_compiler
def test_the_compiled_arithmetic_is_that_of_the_traced_step(small: dict[str, Any]) -> None:
    assert 4 * small["train"]["device_flops"] == pytest.approx(small["flops"], rel=0.1)


@needs_tpu_compiler
def test_bn_has_one_collective_per_layer_and_pass(small: dict[str, Any]) -> None:
    found = small["train"]["collectives"]
    assert small["norms"] == 7
    assert found["BN, forward"]["number"] <= 7
    assert found["BN, backward"]["number"] <= 7
    assert sum(entry["number"] for entry in found.values()) < 2 * 7 + 4
    assert found["BN, forward"]["bytes"] <= 2 * 4 * small["norm_channels"]


@needs_tpu_compiler
def test_memory_and_times_are_recorded(small: dict[str, Any]) -> None:
    assert 2**20 < small["train"]["peak_bytes"] < 2**30
    assert small["train"]["compile_seconds"] > 0
    assert 1e-5 < small["train"]["predicted_seconds"] < 1e-2


def result(accelerators: ModuleType, devices: int = 4) -> dict[str, Any]:
    """Returns the content of a result file with one case."""
    chip = accelerators.CHIPS["TPU v5 lite"]
    program = {
        "compile_seconds": 12.3,
        "peak_bytes": 3 * 2**20,
        "kernels": dict.fromkeys(accelerators.KINDS, 2.0) | {"convolution": 56.0},
        "traffic": 140.1e6,
        "convolutions": {"bf16": 54.0, "bf16 x f32": 2.0},
        "collectives": {
            "BN, forward": {"number": 38.0, "bytes": 8000.0},
            "BN, backward": {"number": 19.0, "bytes": 5000.0},
            "all-reduce": {"number": 3.0, "bytes": 1e6},
        },
        "costly": [{"kind": "reduction", "source": "a/b", "seconds": 1e-4, "number": 9.0}],
        "predicted_seconds": 2e-3,
    }
    origin = accelerators.provenance() | {"commit": "c0ffee", "dirty": False}
    record = {
        "provenance": origin,
        "batch": 128,
        "dtype": "float32",
        "flops": 788e9,
        "norms": 19,
        "norm_channels": 688,
        "train": program,
        "evaluation": program,
    }
    return {
        "topology": "tpu:v5e:2x2",
        "chip": chip._asdict(),
        "devices": devices,
        "memory": chip.memory,
        "cases": {"ResNet-20": record},
    }


def page(accelerators: ModuleType, folder: Path, content: dict[str, Any]) -> str:
    (folder / "accelerators-testing.json").write_text(json.dumps(content))
    accelerators.report(folder, folder)
    return (folder / "accelerators.md").read_text()


def test_the_page_shows_needs_kernels_and_collectives(
    accelerators: ModuleType, tmp_path: Path
) -> None:
    text = page(accelerators, tmp_path, result(accelerators))
    # 788 GFLOP on 4 x 197 TFLOP/s take 1 ms. Prefetches and scalars are no kernels of their own.
    assert "| ResNet-20 | 128 | 3 | 3 | 12 + 12 | 788 | 140.1 | 68 | 1 | 2 | 64,000 |" in text
    assert "54 bf16, 2 bf16 x f32 |" in text
    # Two sums of two numbers of 4 bytes for each of 688 channels.
    assert "| ResNet-20 | 19 | 38 | 19 | 38 | 13.0 | 11.0 | 3 all-reduce | 1,000 |" in text
    assert "| `a/b` | reduction | 9 | 100.0 |" in text
    assert "commit c0ffee" in text


def test_the_page_names_the_networks_that_were_not_compiled(
    accelerators: ModuleType, tmp_path: Path
) -> None:
    text = page(accelerators, tmp_path, result(accelerators))
    assert "Not compiled: quickstart; ResNet-20, bfloat16; ResNet-20, sharded; " in text


def test_the_page_says_if_a_case_is_of_another_commit(
    accelerators: ModuleType, tmp_path: Path
) -> None:
    content = result(accelerators)
    other = json.loads(json.dumps(content["cases"]["ResNet-20"]))
    other["provenance"] |= {"commit": "abcdef0123", "dirty": True, "start": "2999"}
    content["cases"]["ResNet-56"] = other
    text = page(accelerators, tmp_path, content)
    assert "commit c0ffee;" in text
    assert "ResNet-56 is of commit abcdef0 and changes." in text


def test_one_device_has_no_collectives_to_show(accelerators: ModuleType, tmp_path: Path) -> None:
    text = page(accelerators, tmp_path, result(accelerators, devices=1))
    assert "Collectives per training step" not in text
    assert "ResNet-20, sharded" not in text


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("--topology=nonsense",), "no such topology; known are, for example, tpu:v5e:2x2"),
        (("--topology=gpu:h100", "--only=["), "--only: [: no regular expression"),
        (("--topology=gpu:h100", "--only=VGG"), "--only=VGG matches none of: quickstart;"),
    ],
)
def test_a_mistake_is_refused_in_one_line(
    accelerators: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    typed: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["accelerators.py", "measure", *typed])
    with pytest.raises(SystemExit, match="2"):
        accelerators.main()
    assert message in capsys.readouterr().err.splitlines()[-1]
