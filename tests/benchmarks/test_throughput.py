"""Checks the measurements of the throughput benchmark, and its page."""

import importlib.util
import json
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest

from resjax.data import DATASETS
from resjax.models.presets import PRESETS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
README = (BENCHMARKS.parent / "README.md").read_text()
CEILING = {"flops": 2e9, "bytes": 1e9}


@pytest.fixture
def throughput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Returns the benchmark with a device of 2 GFLOP/s and 1 GB/s, and 64 images of CIFAR."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("throughput", BENCHMARKS / "throughput.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "ceilings", lambda dtype, cpu: script.Ceilings(**CEILING))
    small = DATASETS["synthetic_cifar"]._replace(train_images=64, test_images=8)
    monkeypatch.setitem(DATASETS, "synthetic_cifar", small)
    return script


def measured(throughput: ModuleType, path: Path, rounds: int, *contenders: str) -> dict[str, Any]:
    case = throughput.Case("cifar_resnet8", 4, "float32", 2, rounds, contenders)
    throughput.measure([case], path, minutes=1)
    [record] = json.loads(path.read_text())["cases"]
    return record


def test_every_contender_runs_in_every_round(throughput: ModuleType, tmp_path: Path) -> None:
    record = measured(throughput, tmp_path / "result.json", 2, "scan", "unroll", "run")
    assert not record["failed"]
    assert record["parameters"] == PRESETS["cifar_resnet8"].parameters
    assert list(record["contenders"]) == ["scan", "unroll", "run"]
    for entry in record["contenders"].values():
        assert len(entry["images_per_second"]) == 2
        assert min(entry["images_per_second"]) > 0
        assert entry["compile_seconds"] > 0
        # Parameters, momentum, and for four images the outputs of two convolutions per stage.
        activations = 4 * 2 * (16 * 32**2 + 32 * 16**2 + 64 * 8**2)
        assert entry["peak_bytes"] > 4 * (2 * record["parameters"] + activations)


def test_a_package_that_is_not_installed_is_skipped_with_a_reason(
    throughput: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    record = measured(throughput, tmp_path / "result.json", 0, "scan", "torch")
    assert list(record["contenders"]) == ["scan"]
    assert record["failed"]["torch"] == "ModuleNotFoundError: no torch"


IMITATION = """
import json, os, sys

sys.stderr.write("a warning " * 100_000)
assert "jax" not in sys.modules
costs = {"compile_seconds": os.environ["GLIBC_TUNABLES"], "peak_bytes": sys.argv[1]}
print(json.dumps(costs | {"parameters": 78_042}), flush=True)
for count, _ in enumerate(sys.stdin, start=1):
    print(count, flush=True)
    if count == 2:
        sys.exit("out of memory")
"""


@pytest.fixture
def imitated(throughput: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns PyTorch's contender, whose process answers with its environment and arguments."""
    (tmp_path / "throughput_torch.py").write_text(IMITATION)
    monkeypatch.setattr(throughput, "__file__", str(tmp_path / "throughput.py"))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1")
    case = throughput.Case("cifar_resnet8", 4, "float32", 2, 3, ("torch",))
    return throughput.CONTENDERS["torch"](case)


def test_pytorch_runs_in_a_process_without_jax_and_huge_pages(imitated: Any) -> None:
    assert imitated.compile_seconds == "glibc.malloc.arena_max=1"
    settings = json.loads(imitated.peak_bytes)
    assert (settings["depth"], settings["batch"], settings["steps"]) == (8, [4, 32, 32, 3], 2)
    assert imitated.seconds() == 1
    imitated.end()


def test_a_process_that_ends_in_a_measurement_says_why(imitated: Any) -> None:
    assert [imitated.seconds(), imitated.seconds()] == [1, 2]
    with pytest.raises(RuntimeError, match="out of memory"):
        imitated.seconds()
    imitated.end()


def test_networks_of_different_sizes_are_not_compared(
    throughput: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for parameters, name in enumerate(("scan", "unroll")):
        contender = throughput.Contender(lambda: 1.0, 1.0, None, parameters)
        monkeypatch.setitem(throughput.CONTENDERS, name, lambda case, made=contender: made)
    with pytest.raises(AssertionError, match="unequal networks"):
        measured(throughput, tmp_path / "result.json", 1, "scan", "unroll")


def test_a_turn_on_cpu_begins_with_a_warm_up_and_a_case_ends_its_contenders(
    throughput: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, ended = iter([100.0, 0.5, 100.0, 0.25]), []
    contender = throughput.Contender(lambda: next(seconds), 1.0, None, 1, lambda: ended.append(1))
    monkeypatch.setitem(throughput.CONTENDERS, "torch", lambda case: contender)
    record = measured(throughput, tmp_path / "result.json", 2, "torch")
    assert record["contenders"]["torch"]["images_per_second"] == [2.0, 4.0]
    assert ended == [1]


def test_no_case_starts_after_the_last_minute(throughput: ModuleType, tmp_path: Path) -> None:
    throughput.measure(throughput.PLANS["cpu"], tmp_path / "result.json", minutes=-1)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("blocks", [1, 3])
def test_memory_traffic_is_that_of_the_convolutions(throughput: ModuleType, blocks: int) -> None:
    case = throughput.Case(f"cifar_resnet{6 * blocks + 2}", 2, "bfloat16", 1, 0, ("scan",))
    # Numbers per image after the stem and in each stage.
    image, wide, middle, deep = 3 * 32**2, 16 * 32**2, 32 * 16**2, 64 * 8**2
    written = wide + 2 * blocks * (wide + middle + deep)
    # The first convolution of a stage reads the output of the previous stage.
    read = image + 2 * blocks * (wide + middle + deep) + (wide - middle) + (middle - deep)
    preset = PRESETS[case.model]
    assert throughput.work(case) == (
        6 * 2 * preset.macs,
        2 * 2 * (3 * read + 11 * written) + 32 * preset.parameters,
    )


@pytest.mark.parametrize(("bytes_", "seconds"), [(10**9, 1.0), (3 * 10**9, 3.0)])
def test_the_roofline_is_the_slower_of_arithmetic_and_memory(
    throughput: ModuleType, bytes_: int, seconds: float
) -> None:
    case = throughput.Case("cifar_resnet8", 128, "float32", 1, 0, ())
    ceilings = throughput.Ceilings(**CEILING)
    needed = throughput.Work(2 * 10**9, bytes_)
    assert ceilings.images_per_second(case, needed) == 128 / seconds


def result(throughput: ModuleType, **contenders: list[float]) -> dict[str, Any]:
    """Returns the content of a result file: one case with these images per second."""
    case = throughput.Case("cifar_resnet20", 128, "float32", 1, 2, tuple(contenders))
    entries = {
        name: {"compile_seconds": 12.3, "peak_bytes": 3 * 2**20, "images_per_second": rates}
        for name, rates in contenders.items()
    }
    record = {
        "case": case._asdict(),
        "auto": "scan",
        "work": throughput.Work(1, 1)._asdict(),
        "roofline_images_per_second": 1000.0,
        "parameters": 269_722,
        "contenders": entries,
        "failed": {"unroll": "out of memory"},
    }
    provenance = throughput.provenance() | {"device": "Testing 1"}
    return {"provenance": provenance, "ceilings": {"float32": CEILING}, "cases": [record]}


def page(throughput: ModuleType, folder: Path, content: dict[str, Any]) -> str:
    (folder / "throughput-testing.json").write_text(json.dumps(content))
    throughput.report(folder, folder)
    return (folder / "throughput.md").read_text()


def test_the_page_shows_medians_and_ratios_within_rounds(
    throughput: ModuleType, tmp_path: Path
) -> None:
    rates = {
        "scan": [400.0, 800.0],
        "single": [300.0, 600.0],
        "run": [384.0, 776.0],
        "torch": [200.0, 400.0],
    }
    text = page(throughput, tmp_path, result(throughput, **rates))
    assert (
        "| cifar_resnet20 | 128 | float32 | 1,000 (m) | 600 (400 to 800) | 60% "
        "| 450 (300 to 600) | 75% | 580 (384 to 776) | 96% | 300 (200 to 400) | 2.00 |"
    ) in text
    assert "| cifar_resnet20 | 128 | float32 | 12.3 |  | 3 |  | 3 |" in text
    assert "cifar_resnet20 float32 batch 128: no unroll, out of memory." in text


def test_the_faster_of_pytorchs_modes_is_shown(throughput: ModuleType, tmp_path: Path) -> None:
    rates = {"scan": [400.0, 400.0], "torch": [200.0, 200.0], "torch-compiled": [500.0, 500.0]}
    assert "|  |  | 500 | 0.80 |" in page(throughput, tmp_path, result(throughput, **rates))


def test_the_page_shows_provenance(throughput: ModuleType, tmp_path: Path) -> None:
    content = result(throughput, scan=[1.0])
    content["provenance"] |= {"commit": "c0ffee", "dirty": True}
    text = page(throughput, tmp_path, content)
    assert "## Testing 1" in text
    assert "commit c0ffee and changes" in text
    assert f"jax {content['provenance']['versions']['jax']}" in text
    assert "2 GFLOP/s in a matrix product, 1.0 GB/s in a copy" in text


def test_the_figure_shows_compile_time_against_depth(
    throughput: ModuleType, tmp_path: Path
) -> None:
    content = result(throughput, scan=[1.0])
    before = page(throughput, tmp_path, content) and (tmp_path / "throughput.svg").read_bytes()
    assert before.startswith(b"<?xml")
    page(throughput, tmp_path, content)
    assert (tmp_path / "throughput.svg").read_bytes() == before
    content["cases"][0]["contenders"]["scan"]["compile_seconds"] = 40.0
    page(throughput, tmp_path, content)
    assert (tmp_path / "throughput.svg").read_bytes() != before


def test_pytorch_takes_part_in_every_round(throughput: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    record = measured(throughput, tmp_path / "result.json", 2, "scan", "torch")
    assert not record["failed"]
    assert min(record["contenders"]["torch"]["images_per_second"]) > 0


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet110", "resnet50"])
def test_the_networks_in_pytorch_have_the_same_number_of_parameters(
    throughput: ModuleType, name: str
) -> None:
    pytest.importorskip("torch")
    import throughput_torch

    if name == "resnet50":
        network = throughput_torch.resnet50(1000)
    else:
        depth = int(name.rpartition("resnet")[2])
        network = throughput_torch.cifar(depth, 3, 16, 10, throughput_torch.basic)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == PRESETS[name].parameters


def speeds(name: str, contender: str) -> list[list[float]]:
    """Returns images per second on CPU in each round, one list for each version of JAX."""
    files = sorted((BENCHMARKS / "results").glob("throughput-cpu-*.json"))
    records = [each for file in files for each in json.loads(file.read_text())["cases"]]
    chosen = [each for each in records if each["case"]["model"] == name]
    auto = {"step": chosen[0]["auto"]}.get(contender, contender)
    found = [each["contenders"][auto] for each in chosen if auto in each["contenders"]]
    return [each["images_per_second"] for each in found]


def test_the_readme_repeats_the_measured_hours() -> None:
    hours = [
        f"{64_000 * 128 / median(speeds(f'cifar_resnet{depth}', 'run')[0]) / 3600:.2g}"
        for depth in (20, 56, 110)
    ]
    assert f"| {', '.join(hours)} h, computed from [measured speeds]" in README


def test_the_readme_repeats_the_measured_ratios_to_pytorch() -> None:
    ratios = [
        median(ours / theirs for ours, theirs in zip(*rounds, strict=True))
        for name in ("cifar_resnet20", "cifar_resnet56", "resnet50")
        for rounds in zip(speeds(name, "step"), speeds(name, "torch"), strict=True)
    ]
    text = f"ResNet-20, 56 and 50 at {min(ratios):.1f} to {max(ratios):.1f} of PyTorch's speed"
    assert text in README.replace("\n", " ")
