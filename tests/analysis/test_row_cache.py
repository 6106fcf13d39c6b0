"""The cache of the runs table never changes the table, whatever the cache file holds."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from resjax.analysis import row_cache, runs
from resjax.analysis.row_cache import RowCache
from resjax.analysis.runs import load_runs

Maker = Callable[..., Path]
RESULTS = Path(__file__).parents[2] / "experiments" / "results"


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches small tables too, and files that were just written, in a folder of the test."""
    folder = tmp_path / "caches"
    monkeypatch.setattr(row_cache, "user_caches", lambda: folder)
    monkeypatch.setattr(row_cache, "MIN_RUNS", 1)
    monkeypatch.setattr(row_cache, "SETTLED_SECONDS", -60)
    return folder


def cache_file(caches: Path) -> Path:
    [file] = (caches / "runs").iterdir()
    return file


def uncached(root: Path) -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_cache, "MIN_RUNS", 10**9)
        return load_runs(root)


def reads(root: Path) -> list[str]:
    """Loads the table and returns the names of the runs whose files were read."""
    read, row = [], runs._row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_row", lambda folder: read.append(folder.name) or row(folder))
        assert_frame_equal(load_runs(root), uncached(root))
    return read[: len(read) - len(uncached(root))]


@pytest.fixture
def sweep(make_sweep: Maker, caches: Path) -> Path:
    special = {"depth20_none_seed0": {"stop": 0.5}, "depth8_pad_seed1": {"diverge": 0.5}}
    return make_sweep(depths=(8, 20), points=5, **special)


def test_a_table_is_read_from_its_runs_once(sweep: Path) -> None:
    assert len(reads(sweep)) == 12
    assert reads(sweep) == []


def test_the_cached_table_of_committed_results_equals_the_one_from_their_files(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_runs(RESULTS)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_row", None)
        assert_frame_equal(load_runs(RESULTS), first, check_exact=True)
    assert_frame_equal(first, uncached(RESULTS), check_exact=True)


def test_only_a_changed_run_is_read_again(sweep: Path) -> None:
    load_runs(sweep)
    run = sweep / "runs" / "depth20-none-seed0"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 300, "split": "test", "loss": null, "error": 0.5}\n')
    assert reads(sweep) == [run.name]
    assert reads(sweep) == []


@pytest.mark.parametrize("name", ["config.json", "provenance.json", "summary.json"])
def test_a_change_that_keeps_size_and_time_is_seen(sweep: Path, name: str) -> None:
    load_runs(sweep)
    file = sweep / "runs" / "depth8-pad-seed0" / name
    time, text = file.stat().st_mtime_ns, file.read_text()
    changed = text.replace("8", "9", 1).replace("pad", "dap", 1)
    assert changed != text
    file.write_text(changed)
    os.utime(file, ns=(time, time))
    assert reads(sweep) == ["depth8-pad-seed0"]


def test_a_file_that_comes_or_goes_is_seen(sweep: Path) -> None:
    load_runs(sweep)
    run = sweep / "runs" / "depth8-none-seed2"
    (run / "diverged.json").write_text('{"step": 3, "reason": "made up"}')
    assert reads(sweep) == [run.name]
    assert load_runs(sweep)["diverged"].sum() == 2
    (run / "summary.json").unlink()
    assert reads(sweep) == [run.name]
    assert (~load_runs(sweep)["finished"]).sum() == 2


def test_another_run_in_the_place_of_a_run_is_seen(sweep: Path) -> None:
    load_runs(sweep)
    one, other = (sweep / "runs" / f"depth{depth}-pad-seed0" for depth in (8, 20))
    one.rename(sweep / "aside")
    other.rename(one)
    (sweep / "aside").rename(other)
    assert reads(sweep) == [one.name, other.name]


def test_a_damaged_run_is_named_each_time(sweep: Path) -> None:
    (sweep / "runs" / "depth8-pad-seed0" / "config.json").write_text("{")
    for _ in range(2):
        warnings: list[str] = []
        assert len(load_runs(sweep, warn=warnings.append)) == 11
        assert "config.json: damaged" in warnings[0]


@pytest.mark.parametrize("place", [0.0, 0.001, 0.3, 0.6, 0.9, 1.0])
def test_a_flipped_bit_in_the_cache_is_noticed(sweep: Path, caches: Path, place: float) -> None:
    load_runs(sweep)
    file = cache_file(caches)
    content = bytearray(file.read_bytes())
    content[round(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)
    assert len(reads(sweep)) == 12
    assert reads(sweep) == []


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff" * 99, b"[]\n{}", b"\0" * 10_000])
def test_a_file_that_is_no_cache_is_ignored(sweep: Path, caches: Path, content: bytes) -> None:
    load_runs(sweep)
    cache_file(caches).write_bytes(content)
    assert len(reads(sweep)) == 12


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content | {"code": "of another version"},
        lambda content: [content],
        lambda content: content | {"columns": []},
        lambda content: content | {"runs": {"runs/depth8-pad-seed0": 3}},
    ],
)
def test_a_sound_file_of_another_form_is_ignored(
    sweep: Path, caches: Path, damage: Callable[[object], object]
) -> None:
    load_runs(sweep)
    file = cache_file(caches)
    text = json.dumps(damage(json.loads(file.read_bytes().partition(b"\n")[2]))).encode()
    file.write_bytes(row_cache._digest(text).encode() + b"\n" + text)
    assert len(reads(sweep)) == 12


def test_a_cache_of_another_user_is_ignored(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_runs(sweep)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert len(reads(sweep)) == 12


def test_a_table_is_loaded_where_no_cache_can_be_written(sweep: Path, caches: Path) -> None:
    caches.write_text("a file in the place of the folder")
    assert len(reads(sweep)) == 12
    assert caches.is_file()


def test_a_table_is_loaded_without_a_home_folder(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(row_cache, "user_caches", homeless)
    assert len(reads(sweep)) == 12


def test_a_file_that_has_just_changed_is_not_cached(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_cache, "SETTLED_SECONDS", 3600)
    assert len(reads(sweep)) == len(reads(sweep)) == 12


def test_nothing_is_cached_among_the_results(sweep: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sweep.rglob("*")}
    load_runs(sweep)
    assert {path: path.stat().st_mtime_ns for path in sweep.rglob("*")} == before


def test_threads_that_load_at_once_do_not_harm_each_other(sweep: Path, caches: Path) -> None:
    expected, tables = uncached(sweep), list[pd.DataFrame]()

    def load() -> None:
        for _ in range(5):
            tables.append(load_runs(sweep))
            for file in (caches / "runs").glob("*.json"):
                file.unlink(missing_ok=True)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tables) == 20
    for table in tables:
        assert_frame_equal(table, expected)


def test_caches_that_nobody_used_for_months_are_removed(sweep: Path, caches: Path) -> None:
    (caches / "runs").mkdir(parents=True)
    old, young = caches / "runs" / "old.json", caches / "runs" / "young.json"
    for file in (old, young):
        file.write_text("")
    os.utime(old, (1e9, 1e9))
    load_runs(sweep)
    assert not old.exists()
    assert young.exists()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
)


@given(row=st.dictionaries(st.text(), VALUES))
def test_a_cached_row_has_the_values_and_types_of_the_row(
    tmp_path_factory: pytest.TempPathFactory, row: dict[str, object]
) -> None:
    root = tmp_path_factory.mktemp("root")
    (root / "file").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_cache, "user_caches", lambda: root / "caches")
        patch.setattr(row_cache, "SETTLED_SECONDS", -60)
        for read in (lambda _: row, None):
            cache = RowCache(root, ("file",), read, 100)
            assert repr(cache.row(root)) == repr(row)
            cache.save()


NAMES = st.text("abc_", min_size=1)
CONTENT = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda inner: st.dictionaries(NAMES, inner, max_size=4) | st.lists(inner, max_size=2),
)


@given(content=st.dictionaries(NAMES, CONTENT, min_size=1))
def test_nested_values_have_the_names_and_types_that_pandas_gives_them(
    content: dict[str, object],
) -> None:
    [expected] = pd.json_normalize(content).to_dict("records") or [{}]
    assert repr(runs._flatten(content)) == repr(expected)
