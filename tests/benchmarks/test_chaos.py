"""Runs the chaos benchmark on a small scale, and checks its page."""

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
    """Returns a plan with few failures of each kind."""
    damages = {"flips": 4, "truncations": 2, "deletions": 2, "inputs": 2}
    return chaos.Plan(kills=1, boundary_kills=3, steps=120, rounds=1, **damages)


def run_in_process(part: str, plan: Any, folder: Path) -> Any:
    """Runs a part in a process of its own, because failures of Orbax have side effects."""
    program = (
        "import chaos, json, pathlib, sys\n"
        "plan = chaos.Plan(**json.loads(sys.argv[2]))\n"
        "print(json.dumps(chaos.PARTS[sys.argv[1]](plan, pathlib.Path(sys.argv[3]))))\n"
    )
    words = [sys.executable, "-c", program, part, json.dumps(plan._asdict()), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if "PermissionError" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow  # tests/train/test_resume.py checks the same without processes
def test_a_killed_run_ends_like_an_uninterrupted_one(
    chaos: ModuleType, few: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    found = chaos.kills(few, tmp_path)
    assert found["kills"] >= 1
    assert found["runs"] > 0
    assert found["different"] == 0


@pytest.mark.slow  # tests/train/test_checkpoints.py checks the same without processes
def test_a_kill_at_any_boundary_of_a_save_leaves_whole_checkpoints(
    chaos: ModuleType, few: Any, tmp_path: Path
) -> None:
    found = chaos.boundaries(few, tmp_path)
    assert found["kills"] >= 3
    assert (found["refused"], found["lost"], found["different"]) == (0, 0, 0)
    assert found["live"]["times"] > 0
    assert found["live"]["damaged"] == 0


@pytest.mark.slow  # tests/train/test_checkpoints.py checks the same without processes
def test_damage_is_reported_and_the_previous_checkpoint_restored(few: Any, tmp_path: Path) -> None:
    outcomes = run_in_process("damage", few, tmp_path)["outcomes"]
    times = {"bit flipped": 4, "file truncated": 2, "file deleted": 2}
    for kind, both in outcomes.items():
        found = both["resjax"]
        # No array depends on the two files that Orbax writes at the commit.
        assert found.keys() <= {"reported, previous checkpoint restored", "restored correctly"}
        assert sum(found.values()) == times[kind]


@pytest.mark.slow  # tests/train/test_verify.py checks the same without processes
def test_a_damaged_file_ends_in_one_line_and_no_traceback(
    chaos: ModuleType, few: Any, tmp_path: Path
) -> None:
    outcomes = chaos.files(few, tmp_path)["outcomes"]
    for name, answers in outcomes.items():
        assert sum(answers.values()) == 2 * 4
        if name != "sweep.json":  # not a file of a run
            assert answers["verify 1"] == 2


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_do_not_wait_for_a_dead_one(
    chaos: ModuleType, few: Any, tmp_path: Path
) -> None:
    signals = chaos.processes(few, tmp_path)["signals"]
    stopped, killed = signals["SIGTERM"], signals["SIGKILL"]
    assert stopped["codes"] == [128 + signal.SIGTERM] * 2
    assert len(stopped["stopped"]) == 2
    assert len(set(stopped["stopped"])) == 1
    assert killed["codes"] == [75, -signal.SIGKILL]
    assert killed["seconds"] < 60
    assert not stopped["different"]
    assert not killed["different"]


@pytest.mark.slow  # tests/train/test_resume.py checks the same without a file system
def test_training_continues_on_a_full_disk(few: Any, tmp_path: Path) -> None:
    disks = run_in_process("disk", few, tmp_path)["disks"]
    passing, lasting = disks["for a while"], disks["to the end"]
    assert not passing["error"]
    assert passing["warnings"] > 0
    assert "could not be saved" in lasting["error"]
    assert "No space left on device" in lasting["error"]
    assert lasting["checkpoints"]
    assert not passing["different"]
    assert not lasting["different"]


def test_saving_is_timed_for_resjax_and_orbax(chaos: ModuleType, tmp_path: Path) -> None:
    state = chaos.Trainer(chaos.small_config()).init(0)
    seconds = chaos.one_round(tmp_path, state)
    assert {name.split()[0] for name in seconds} == {"resjax", "Orbax"}
    assert min(seconds.values()) > 0


def test_the_page_shows_the_results(chaos: ModuleType, tmp_path: Path) -> None:
    found = json.loads((BENCHMARKS / "results" / "chaos-cpu.json").read_text())
    chaos.report(BENCHMARKS / "results", tmp_path)
    page = (tmp_path / "chaos.md").read_text()
    assert page == (BENCHMARKS.parent / "docs" / "chaos.md").read_text()
    assert f"{found['kills']['kills']} SIGKILLs" in page
    assert f"Runs that ended differently: {found['kills']['different']}." in page
