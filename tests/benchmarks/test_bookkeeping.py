"""Checks what the bookkeeping benchmark measures, and its page."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def bookkeeping(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("bookkeeping")


def test_every_step_is_measured_in_every_round(bookkeeping: ModuleType, tmp_path: Path) -> None:
    bookkeeping.measure([200], rounds=2, path=tmp_path / "bookkeeping-testing.json")
    content = json.loads((tmp_path / "bookkeeping-testing.json").read_text())
    [case] = content["cases"]
    assert case["runs"] == 200
    assert {name: len(each) for name, each in case["seconds"].items()} == dict.fromkeys(
        bookkeeping.STEPS, 2
    )
    assert all(min(each) > 0 for each in case["seconds"].values())


def test_the_page_shows_medians_growth_and_limits(bookkeeping: ModuleType, tmp_path: Path) -> None:
    cases = [
        {"runs": runs, "seconds": {name: [x, 2 * x, x] for name in bookkeeping.STEPS}}
        for runs, x in ((1000, 0.1), (10_000, 1.5))
    ]
    origin = bookkeeping.provenance() | {"device": "Testing 1", "commit": "c0ffee"}
    content = {"provenance": origin, "cases": cases}
    (tmp_path / "bookkeeping-testing.json").write_text(json.dumps(content))
    bookkeeping.report(tmp_path, tmp_path)
    text = (tmp_path / "bookkeeping.md").read_text()
    row = "| `load_runs`, from its cache | 0.10 (0.10 to 0.20) | 1.50 (1.50 to 3.00) | 15.0 |"
    assert row in text
    assert "expand and claim 3.0 s (limit 10 s)" in text
    assert "## Testing 1" in text
    assert "commit c0ffee" in text
