"""Checks the measurements of the freezing benchmark, and its page."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def freezing(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("freezing")


@pytest.fixture(scope="module")
def measured(freezing: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns the results for the smallest network."""
    path = tmp_path_factory.mktemp("freezing") / "result.json"
    freezing.measure([freezing.Case("cifar_resnet8", 32, 16, "float32", 1, rounds=2)], path)
    [record] = json.loads(path.read_text())["cases"]
    return record["contenders"]


def test_fewer_trainable_layers_need_less_optimizer_state_and_memory(
    measured: dict[str, Any],
) -> None:
    full, last, head = (measured[trains] for trains in ("all", "last stage", "head"))
    assert (full["trainable"], head["trainable"]) == (75_290, 650)
    assert full["trainable"] > last["trainable"] > head["trainable"]
    for found in (full, last, head):
        # The momentum of each trainable parameter, and one counter of steps.
        assert found["optimizer_bytes"] == 4 * (found["trainable"] + 1)
        assert len(found["seconds"]) == 2
    assert full["peak_bytes"] > last["peak_bytes"] > head["peak_bytes"]


def test_the_page_shows_medians_and_ratios_within_rounds(
    freezing: ModuleType, tmp_path: Path
) -> None:
    described = {"peak_bytes": 3 * 2**20, "optimizer_bytes": 2**19, "compile_seconds": 12.34}
    seconds = {"all": [3.0, 8.0], "head": [1.0, 2.0]}
    record = {
        "case": freezing.Case("resnet50", 128, 16, "float32", 1)._asdict(),
        "contenders": {
            trains: {**described, "trainable": 1234, "seconds": values}
            for trains, values in seconds.items()
        },
    }
    origin = freezing.provenance() | {"device": "Testing 1", "commit": "c0ffee"}
    content = {"provenance": origin, "cases": [record]}
    (tmp_path / "freezing-testing.json").write_text(json.dumps(content))
    freezing.report(tmp_path, tmp_path)
    text = (tmp_path / "freezing.md").read_text()
    assert (
        "| resnet50 float32 | 16 x 128² | head | 1,234 | 1.500 (1.000 to 2.000) | 0.29 "
        "| 3.00 | 0.50 | 12.3 |"
    ) in text
    assert "## Testing 1" in text
    assert "commit c0ffee" in text
