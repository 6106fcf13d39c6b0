"""The chaos script in small: what it does to runs happens, and the page says what came of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def chaos(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("chaos")


@pytest.fixture(scope="module")
def few(chaos: ModuleType) -> Any:
    """As little of everything as shows something."""
    return chaos.Plan(kills=2, steps=120, flips=8, truncations=4, deletions=4, inputs=2, rounds=1)


def apart(part: str, plan: Any, folder: Path) -> Any:
    """A part in a process of its own: what Orbax leaves behind when it fails stays there."""
    program = (
        "import chaos, json, pathlib, sys\n"
        "plan = chaos.Plan(**json.loads(sys.argv[2]))\n"
        "print(json.dumps(chaos.PARTS[sys.argv[1]](plan, pathlib.Path(sys.argv[3]))))\n"
    )
    typed = [sys.executable, "-c", program, part, json.dumps(plan._asdict()), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(typed, capture_output=True, text=True, env=environment)
    if "PermissionError" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_that_is_killed_is_the_same_run_in_the_end(
    chaos: ModuleType, few: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    found = chaos.kills(few, tmp_path)
    assert found["kills"] >= 2
    assert found["runs"] > 0
    assert found["different"] == 0


def test_damage_is_told_and_the_checkpoint_before_is_used(few: Any, tmp_path: Path) -> None:
    outcomes = apart("damage", few, tmp_path)["outcomes"]
    told = {kind: both["resjax"] for kind, both in outcomes.items()}
    assert told == {
        "bit flipped": {"told, and the one before restored": 8},
        "file truncated": {"told, and the one before restored": 4},
        "file deleted": {"told, and the one before restored": 4},
    }


def test_a_bad_file_gets_a_line_and_no_traceback(
    chaos: ModuleType, few: Any, tmp_path: Path
) -> None:
    outcomes = chaos.files(few, tmp_path)["outcomes"]
    for name, answers in outcomes.items():
        assert sum(answers.values()) == 2 * 4
        if name != "sweep.json":  # which is no run's
            assert answers["verify 1"] == 2


@pytest.mark.slow
def test_two_processes_stop_at_one_step_and_do_not_wait_for_a_dead_one(
    chaos: ModuleType, few: Any, tmp_path: Path
) -> None:
    signals = chaos.processes(few, tmp_path)["signals"]
    stopped, killed = signals["SIGTERM"], signals["SIGKILL"]
    assert stopped["codes"] == [128 + signal.SIGTERM] * 2
    assert len(stopped["stopped"]) == 2
    assert len(set(stopped["stopped"])) == 1  # the same step
    assert killed["codes"] == [75, -signal.SIGKILL]
    assert killed["seconds"] < 60
    assert not stopped["different"]
    assert not killed["different"]


def test_a_full_disk_ends_no_run_that_can_go_on(few: Any, tmp_path: Path) -> None:
    disks = apart("disk", few, tmp_path)["disks"]
    passing, lasting = disks["for a while"], disks["to the end"]
    assert not passing["error"]
    assert passing["warnings"] > 0
    assert "could not be saved" in lasting["error"]
    assert "No space left on device" in lasting["error"]
    assert lasting["checkpoints"]
    assert not passing["different"]
    assert not lasting["different"]


def test_saving_is_timed_beside_orbax(chaos: ModuleType, tmp_path: Path) -> None:
    state = chaos.Program(chaos.small()).init(0)
    took = chaos.one_round(tmp_path, state)
    assert {name.split()[0] for name in took} == {"resjax", "Orbax"}
    assert all(seconds > 0 for seconds in took.values())


def test_the_page_shows_what_was_found(chaos: ModuleType, tmp_path: Path) -> None:
    found = json.loads((BENCHMARKS / "results" / "chaos-cpu.json").read_text())
    chaos.report(BENCHMARKS / "results", tmp_path)
    page = (tmp_path / "chaos.md").read_text()
    assert page == (BENCHMARKS.parent / "docs" / "chaos.md").read_text()
    assert f"{found['kills']['kills']} SIGKILLs" in page
    assert f"Runs that ended differently: {found['kills']['different']}." in page
