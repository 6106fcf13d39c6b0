"""Checks the measurements of the feeds benchmark, and its page."""

import gc
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def feeds(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Returns the benchmark with batches of four images."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("feeds", BENCHMARKS / "feeds.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "BATCH", 4)
    return script


def small_plan(feeds: ModuleType, **changes: Any) -> Any:
    tiny = {"photos": 3, "repeats": 2, "workers": (0,), "batches": 2, "rounds": 2}
    return feeds.Plan(**tiny | {"memory_images": 40, "samples": 4, "resident_steps": 3} | changes)


def test_every_decoder_runs_in_every_round_or_is_skipped_with_a_reason(
    feeds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "feeds_torch", raising=False)
    feeds.measure(small_plan(feeds), tmp_path / "result.json", ["decoding"])
    part = json.loads((tmp_path / "result.json").read_text())["decoding"]
    assert part["failed"].keys() == {"PyTorch"}
    for name in ("resjax", "Grain's processes"):
        assert len(part["images_per_second"][name]["0"]) == 2
        assert min(part["images_per_second"][name]["0"]) > 0
    assert part["provenance"]["versions"].keys() >= {"grain", "pillow", "jax"}


def test_pytorchs_loader_returns_batches_of_the_same_shape_and_type(
    feeds: ModuleType, tmp_path: Path
) -> None:
    pytest.importorskip("torchvision")
    import feeds_torch

    examples = feeds.photos(tmp_path, small_plan(feeds))
    paths = [examples.root / file for file in examples.files]
    images, _ = next(iter(feeds_torch.loader(paths, 224, 4, 0)))
    with feeds.stream(
        examples, feeds.order(examples), batch_size=4, seed=0, crop=feeds.CROP
    ) as feed:
        ours = next(feed).images
    assert images.permute(0, 2, 3, 1).shape == ours.shape
    assert images.numpy().dtype == ours.dtype


def test_batches_made_in_advance_are_not_timed(
    feeds: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(feeds.time, "monotonic", lambda: now[0])

    def batches() -> Any:
        while True:
            now[0] += 0.5
            yield

    made = batches()
    assert feeds.rate(made, workers=2, count=10) == 8
    assert now[0] == (5 + 10) / 2


def test_memory_is_sampled_from_the_first_batch_to_the_last(feeds: ModuleType) -> None:
    found = feeds.memory(small_plan(feeds, workers=(1,)))
    assert found["images"] == 40
    assert len(found["mebibytes"]) == 4
    assert min(found["mebibytes"]) > 50  # NumPy in this process and in a worker


def test_memory_includes_that_of_this_process(feeds: ModuleType) -> None:
    gc.collect()  # frees memory of other tests
    before = feeds.used_mebibytes()
    held = np.ones(2**26, np.uint8)
    assert abs(feeds.used_mebibytes() - before - held.nbytes / 2**20) < 8


def test_the_device_resident_feed_is_measured_in_images_per_second(
    feeds: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = feeds.on_device(small_plan(feeds, resident="digits"))
    ticks = iter([1.0, 1.25])
    monkeypatch.setattr(feeds.time, "monotonic", lambda: next(ticks))
    assert measured() == 3 * 4 / 0.25


def test_a_photo_compresses_like_a_photograph(feeds: ModuleType) -> None:
    file = io.BytesIO()
    feeds.photo(np.random.default_rng(0)).save(file, "JPEG", quality=90)
    assert 40_000 < len(file.getvalue()) < 110_000  # ImageNet's mean is 110 kB, at quality 96


def part(feeds: ModuleType, **found: Any) -> dict[str, Any]:
    provenance = {
        "device": "cpu",
        "cpu": "Testing 1",
        "cores": 2,
        "start": "2000-01-01T00:00:00",
        "command": "feeds.py measure",
        "commit": "c0ffee",
        "dirty": True,
        "python": "3.13.0",
        "versions": {"grain": "0.2.18"},
    }
    return {"provenance": provenance, "plan": feeds.Plan(workers=(1, 2))._asdict(), **found}


def page(feeds: ModuleType, folder: Path, **parts: Any) -> str:
    (folder / "feeds-testing.json").write_text(json.dumps(parts))
    feeds.report(folder, folder)
    return (folder / "feeds.md").read_text()


def test_the_page_shows_medians_and_ratios_within_rounds(feeds: ModuleType, tmp_path: Path) -> None:
    rates = {
        "resjax": {"1": [400.0, 900.0, 500.0], "2": [800.0, 1800.0, 1000.0]},
        "PyTorch": {"1": [400.0, 450.0, 250.0], "2": [400.0, 450.0, 250.0]},
        "Grain's processes": {},
    }
    failed = {"Grain's processes": "No module named 'grain'"}
    decoding = part(feeds, bytes_per_image=6e4, images_per_second=rates, failed=failed)
    text = page(feeds, tmp_path, decoding=decoding)
    assert "| workers | resjax | PyTorch | resjax / PyTorch |" in text
    assert "| 1 | 500 (400 to 900) | 400 (250 to 450) | 2.00 |" in text
    assert "Speed of two workers relative to one: resjax 2.00, PyTorch 1.00." in text
    assert "No Grain's processes: No module named 'grain'." in text
    assert "of 60 kB each" in text


def test_the_page_compares_the_device_with_every_other_feed(
    feeds: ModuleType, tmp_path: Path
) -> None:
    rates = {"device-resident": [400_000.0, 420_000.0], "Grain": [4_000.0, 3_000.0]}
    text = page(feeds, tmp_path, residence=part(feeds, dataset="mnist", images_per_second=rates))
    assert "| mnist | images per second | device-resident / this |" in text
    assert "| Grain | 3,500 (3,000 to 4,000) | 120.00 |" in text


def test_the_page_shows_provenance(feeds: ModuleType, tmp_path: Path) -> None:
    used = part(feeds, images=20_000, workers=2, mebibytes=[300.0, 310.0, 320.0, 305.0])
    text = page(feeds, tmp_path, memory=used)
    assert "## Testing 1, 2 cores" in text
    assert "commit c0ffee and changes; Python 3.13.0, grain 0.2.18." in text
    assert "the first 300 MiB, the last 305, the peak 320; median of the first half 305" in text


def test_measuring_one_part_preserves_the_others(
    feeds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"decoding": "kept", "memory": "old"}))
    monkeypatch.setitem(feeds.PARTS, "memory", lambda plan: {"mebibytes": [1.0]})
    feeds.measure(small_plan(feeds), path, ["memory"])
    result = json.loads(path.read_text())
    assert result["decoding"] == "kept"
    assert result["memory"]["mebibytes"] == [1.0]
