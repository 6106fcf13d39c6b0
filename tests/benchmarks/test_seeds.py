"""Checks that the contenders of the seeds benchmark train the same networks, and its page."""

import importlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def seeds(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("seeds")


class Measured(NamedTuple):
    record: dict[str, Any]
    losses: dict[str, list[list[float]]]  # by contender: (rounds, seeds)
    remaining: list[Any]  # processes


@pytest.fixture(scope="module")
def measured(seeds: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Returns the results for two seeds of the smallest network."""
    before = multiprocessing.active_children()
    path = tmp_path_factory.mktemp("seeds") / "result.json"
    losses: dict[str, list[list[float]]] = {name: [] for name in seeds.CONTENDERS}

    def recorded(name: str, contender: Callable[..., AbstractContextManager[Any]]) -> Any:
        @contextmanager
        def made(case: Any) -> Iterator[Any]:
            with contender(case) as ready:

                def train() -> list[float]:
                    losses[name].append(ready.train())
                    return losses[name][-1]

                yield ready._replace(train=train)

        return made

    with pytest.MonkeyPatch.context() as patch:
        for name, contender in seeds.CONTENDERS.items():
            patch.setitem(seeds.CONTENDERS, name, recorded(name, contender))
        case = seeds.Case("quickstart", 8, "float32", 2, steps=2, dispatches=2, rounds=2)
        seeds.measure([case], path, minutes=10)
    [record] = json.loads(path.read_text())["cases"]
    remaining = [child for child in multiprocessing.active_children() if child not in before]
    return Measured(record, losses, remaining)


def test_every_contender_runs_in_every_round(measured: Measured) -> None:
    assert not measured.record["failed"]
    for name in ("in turn", "vmapped", "processes"):
        rates = measured.record["images_per_second"][name]
        assert len(rates) == 2
        assert min(rates) > 0
        assert measured.record["compile_seconds"][name] > 0


def test_all_contenders_train_the_same_networks(measured: Measured) -> None:
    expected = np.array(measured.losses["in turn"])
    assert expected.shape == (3, 2)  # one more round before the clock starts
    assert np.unique(expected).size == expected.size  # different for each seed and round
    np.testing.assert_allclose(measured.losses["vmapped"], expected, rtol=1e-2)
    np.testing.assert_allclose(measured.losses["processes"], expected, rtol=1e-2)


def test_no_process_remains(measured: Measured) -> None:
    assert not measured.remaining


@contextmanager
def instant(case: Any) -> Iterator[Any]:
    yield importlib.import_module("seeds").Contender(lambda: [], 1.0)


@contextmanager
def lost(case: Any) -> Iterator[Any]:
    raise EOFError
    yield


@contextmanager
def too_large(case: Any) -> Iterator[Any]:
    raise RuntimeError("out of memory\nand a page of buffers")
    yield


def test_a_failed_contender_is_skipped_with_a_reason(
    seeds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"in turn": instant, "vmapped": too_large, "processes": lost}
    monkeypatch.setattr(seeds, "CONTENDERS", found)
    seeds.measure(seeds.PLANS["gpu"][:1], tmp_path / "seeds-testing.json", minutes=1)
    seeds.report(tmp_path, tmp_path)
    text = (tmp_path / "seeds.md").read_text()
    name = "cifar10 depth 20 bfloat16, 2 seeds"
    assert f"{name}: no vmapped, RuntimeError out of memory.\n" in text
    assert f"{name}: no processes, EOFError.\n" in text
    assert "| 1.0 |  |  |" in text  # seconds to compile


def test_no_case_starts_after_the_last_minute(seeds: ModuleType, tmp_path: Path) -> None:
    seeds.measure(seeds.PLANS["cpu"], tmp_path / "result.json", minutes=-1)
    assert not (tmp_path / "result.json").exists()


def page(seeds: ModuleType, folder: Path, workers: int) -> str:
    """Returns the page of a machine with a default number of workers, measured with two."""
    rates = {"in turn": [1000, 2000], "vmapped": [500, 500], "processes": [1200, 2800]}
    case = seeds.Case("quickstart", 8, "float32", 2, 25, 10)
    record = {
        "case": case._asdict(),
        "batch": 64,
        "compile_seconds": dict.fromkeys(rates, 12.34),
        "images_per_second": rates,
        "failed": {},
    }
    content = {
        "provenance": seeds.provenance() | {"device": "Testing 1", "commit": "c0ffee"},
        "default_workers": workers,
        "cases": [record],
    }
    (folder / "seeds-testing.json").write_text(json.dumps(content))
    seeds.report(folder, folder)
    return (folder / "seeds.md").read_text()


def test_the_page_shows_medians_and_ratios_within_rounds(seeds: ModuleType, tmp_path: Path) -> None:
    text = page(seeds, tmp_path, workers=2)
    assert (
        "| quickstart depth 8 | 64 | float32 | 2 | 1,500 (1,000 to 2,000) "
        "| 500 (500 to 500) | 0.38 | 2,000 (1,200 to 2,800) | 1.30 | 12.3 | 12.3 | 12.3 |"
    ) in text
    assert "## Testing 1" in text
    assert "commit c0ffee" in text


@pytest.mark.parametrize(
    ("workers", "text"),
    [
        (1, "trains one run after another on this machine."),
        (2, "starts 2 processes on this machine; their speed relative to in turn: 1.30 at quick"),
        (3, "starts 3 processes on this machine; their gain was not measured."),
    ],
)
def test_the_page_describes_the_default_workers_and_their_gain(
    seeds: ModuleType, tmp_path: Path, workers: int, text: str
) -> None:
    assert text in page(seeds, tmp_path, workers)
