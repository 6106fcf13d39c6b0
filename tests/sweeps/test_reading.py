"""`resjax status`: the states of runs, read from their folders at any moment on any machine."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from resjax.cli import main
from resjax.cli import status as command
from resjax.config import default_config, override, resolve, to_dict
from resjax.errors import UserError
from resjax.run_files import folder_kind
from resjax.sweeps import reading
from resjax.sweeps.experiment import plan
from resjax.sweeps.failures import Failure, Retries
from resjax.sweeps.plan_files import write_sweep
from resjax.sweeps.reading import StatusReader, estimate
from resjax.sweeps.status import RunStatus, State, duration
from resjax.train import lock, records
from resjax.train.lock import try_claim
from resjax.train.progress import Progress

RESULTS = Path(__file__).parents[2] / "experiments" / "results"

SWEEP = """
from resjax.sweeps import param, product

def sweep(depths=(8, 14), seeds=(0, 1, 2)):
    return product(param("model.depth", depths), param("seed", seeds))
"""

MEASURE = """
def measure(run):
    return {"found": 1}
"""


@pytest.fixture
def new_sweep(tmp_path):
    """Returns a function that writes a sweep of six runs of 100 steps, none of which has begun."""

    def write(source=SWEEP, name="w", **sweep):
        experiment = tmp_path / "depth.py"
        experiment.write_text(source)
        fields = {"train.steps": 100, "data.batch_size": 10}
        fields |= {f"sweep.{keyword}": values for keyword, values in sweep.items()}
        planned = plan(experiment, override(default_config(), fields))
        write_sweep(planned, tmp_path / name, "resjax sweep", "launch-1")
        return tmp_path / name

    return write


def runs_of(root):
    return [root / run["folder"] for run in json.loads((root / "sweep.json").read_text())["runs"]]


def begin(folder, content=None, step=40):
    folder.mkdir(parents=True, exist_ok=True)
    records.write_json(folder / "config.json", content or {"data": {"name": "digits"}})
    (folder / "provenance.json").write_text("{}")
    lines = [{"step": each, "split": "train", "loss": 1.0} for each in range(10, step + 1, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def finish(folder, seconds=50.0, **values):
    begin(folder, step=100)
    summary = {"steps": 100, "test_error": 0.25, "images_per_second": 20.0, "seconds": seconds}
    records.write_json(folder / "summary.json", summary | values)


def fail(folder, retry=False, state="failed"):
    Retries("launch-1", 1 if retry else 0).record(folder, Failure("no room", "", state), 0)


def held_elsewhere(folder, beats=1, **note):
    """Writes the lock of a process on another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = {"host": "node7", "process": 4711, "boot": "b", "token": "0123456789abcdef"}
    holder |= {"job": "SLURM 12_3", "since": "2026-11-26T15:00:00+00:00"}
    (folder / "lock").write_bytes(lock._content(holder, {"beats": beats, **note}))


def states(root):
    [sweep] = StatusReader(root).read()
    return [str(run.state) for run in sweep.runs]


def test_a_sweep_that_has_not_begun_is_queued(new_sweep):
    [sweep] = StatusReader(new_sweep()).read()
    assert sweep.counts["queued"] == len(sweep.runs) == 6
    assert (sweep.experiment, sweep.launch) == ("depth", "launch-1")
    assert not sweep.ended


def test_every_state_is_read_from_the_folder_of_a_run(new_sweep):
    root = new_sweep(seeds="0,1,2,3,4,5")
    runs = runs_of(root)
    (root / "runs" / "empty").mkdir()
    begin(runs[1])
    finish(runs[2])
    fail(runs[3])
    begin(runs[4])
    records.write_json(runs[4] / "diverged.json", {"step": 30, "reason": "the loss is not finite"})
    finish(runs[5], test_loss=math.nan)
    with (runs[5] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "split": "test", "loss": null}\n')
    held_elsewhere(runs[6], state="training", step=30, steps=100, images_per_second=10.0)
    held_elsewhere(runs[7], state="measuring")
    begin(runs[8])
    fail(runs[8], retry=True)
    assert states(root)[:9] == [
        *("queued", "interrupted", "finished", "failed", "diverged", "diverged"),
        *("running", "measuring", "failed"),
    ]
    assert {*map(str, State)} == {*states(root)}
    [sweep] = StatusReader(root).read()
    assert sweep.runs[1].progress.step == 40
    assert sweep.runs[3].error == "no room"
    assert sweep.runs[4].error == "step 30: the loss is not finite"
    assert (sweep.runs[8].retry, sweep.runs[3].retry) == (True, False)
    assert sweep.other_runs == 1


def test_a_run_that_a_live_process_here_holds_is_running_with_its_progress(new_sweep):
    root = new_sweep()
    folder = runs_of(root)[0]
    with try_claim(folder) as claim:
        claim.note(state="training", step=30, steps=100, images_per_second=20.0, seconds_left=35.0)
        claim.beat()
        [sweep] = StatusReader(root).read()
        run = sweep.runs[0]
        assert (run.state, run.alive, run.seconds_left) == ("running", True, 35.0)
        assert (run.progress.step, run.progress.steps) == (30, 100)
        assert sweep.working == 1
        assert run.cells[1] == f"running on {run.holder['host']}"
        assert run.cells[4] == "35 s left"
    assert states(root)[0] == "queued"


def test_the_lock_of_a_dead_process_here_is_no_running_run(new_sweep):
    root = new_sweep()
    folder = runs_of(root)[0]
    begin(folder)
    claims = "import os, sys; from pathlib import Path; from resjax.train.lock import try_claim; "
    claims += "try_claim(Path(sys.argv[1])); os._exit(0)"
    subprocess.run([sys.executable, "-c", claims, str(folder)], check=True)
    assert (folder / "lock").exists()
    assert states(root)[0] == "interrupted"


def test_the_last_beat_of_another_machine_is_unknown_until_it_was_watched(new_sweep, monkeypatch):
    root = new_sweep()
    folder = runs_of(root)[0]
    held_elsewhere(folder, beats=1, step=10, steps=100)
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    reader = StatusReader(root)

    def look(seconds):
        clock[0] += seconds
        [sweep] = reader.read()
        return sweep.runs[0]

    assert look(0).cells[1] == "running on node7 (SLURM 12_3), last beat unknown"
    assert look(4).beat_seconds is None
    held_elsewhere(folder, beats=2, step=20, steps=100)
    run = look(4)
    assert (run.cells[1], run.progress.step) == ("running on node7 (SLURM 12_3)", 20)
    for _ in range(5):
        run = look(4)
    assert run.cells[1].endswith("last beat 20 s ago")
    for _ in range(5):
        run = look(4)
    assert run.state == "queued"  # as the lock is dead, and nothing else is there


def test_clocks_of_two_machines_are_not_compared(new_sweep):
    root = new_sweep()
    folder = runs_of(root)[0]
    held_elsewhere(folder, step=10, steps=100)
    for when in (0, 2**33):
        os.utime(folder / "lock", (when, when))
        assert states(root)[0] == "running"


def test_reading_again_reads_only_what_has_changed(new_sweep, monkeypatch):
    root = new_sweep()
    runs = runs_of(root)
    for folder in runs[:3]:
        finish(folder)
    begin(runs[3])
    monkeypatch.setattr(reading, "SETTLED_SECONDS", -60)
    judged, judge = [], reading._judge
    monkeypatch.setattr(
        reading, "_judge", lambda run, *a: judged.append(run.folder) or judge(run, *a)
    )
    reader = StatusReader(root)
    reader.read()
    assert judged == runs[:4]
    reader.read()
    assert judged == runs[:4]
    finish(runs[3])
    [sweep] = reader.read()
    assert judged[4:] == [runs[3]]
    assert sweep.counts["finished"] == 4
    shutil.rmtree(runs[0])
    finish(runs[4])
    [sweep] = reader.read()
    assert judged[5:] == [runs[4]]
    assert (sweep.counts["finished"], sweep.counts["queued"]) == (4, 2)


def test_a_folder_that_has_just_changed_is_read_again(new_sweep, monkeypatch):
    root = new_sweep()
    finish(runs_of(root)[0])
    monkeypatch.setattr(reading, "SETTLED_SECONDS", 3600)
    judged = []
    monkeypatch.setattr(reading, "_judge", lambda run, *_: judged.append(run))
    reader = StatusReader(root)
    reader.read()
    reader.read()
    assert len(judged) == 2


def test_a_later_launch_of_another_plan_is_seen(new_sweep):
    root = new_sweep()
    reader = StatusReader(root)
    for folder in runs_of(root):
        finish(folder)
    assert reader.read()[0].counts["finished"] == 6
    new_sweep(depths="8,14,20")
    [sweep] = reader.read()
    assert (sweep.counts["finished"], sweep.counts["queued"]) == (6, 3)
    new_sweep(depths="20")
    [sweep] = reader.read()
    assert (sweep.counts["queued"], sweep.other_runs) == (3, 6)


def test_a_run_is_finished_when_it_is_measured(new_sweep):
    root = new_sweep(SWEEP + MEASURE)
    runs = runs_of(root)
    for folder in runs:
        finish(folder)
    fail(runs[1], state="not measured")
    [sweep] = StatusReader(root).read()
    assert sweep.runs[0].cells[1] == "interrupted: not measured yet"
    assert sweep.runs[1].cells[1] == "failed: not measured: no room"


@pytest.mark.parametrize("content", ["", "{", "[]", "\0\0", '{"steps": "many"}'])
@pytest.mark.parametrize("name", ["summary.json", "error.json", "diverged.json", "lock", "plan"])
def test_damaged_files_are_borne(new_sweep, name, content):
    root = new_sweep()
    finish(runs_of(root)[0])
    begin(runs_of(root)[1])
    if name == "plan":
        [path] = (root / "plans").iterdir()
        path.write_text(content)
        assert states(root)[:3] == ["finished", "interrupted", "queued"]
        return
    for folder in runs_of(root)[:2]:
        (folder / name).write_text(content)
    [sweep] = StatusReader(root).read()
    if name in ("summary.json", "diverged.json"):
        assert sweep.runs[1].state == "interrupted"
        assert name in sweep.runs[1].error
    assert sweep.counts["queued"] == 4


def test_a_damaged_list_of_runs_is_an_error_of_one_line(new_sweep, capsys):
    root = new_sweep()
    (root / "sweep.json").write_text('{"runs": [{"folder": "../../elsewhere"}]}')
    assert main(["status", str(root)]) == 2
    error = capsys.readouterr().err
    assert "outside of the sweep" in error
    assert error.count("\n") == 1


def test_a_folder_without_runs_is_an_error_of_one_line(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "no sweep and no run here" in capsys.readouterr().err
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_runs_may_come_and_go_while_they_are_read(new_sweep):
    root = new_sweep()
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            for folder in runs_of(root):
                finish(folder)
                shutil.rmtree(folder, ignore_errors=True)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        reader = StatusReader(root)
        for _ in range(100):
            [sweep] = reader.read()
            assert len(sweep.runs) == 6
    finally:
        stop.set()
        thread.join()


def test_a_folder_above_shows_sweeps_and_then_runs_outside_of_them(new_sweep, tmp_path):
    for name in ("b", "a"):
        finish(runs_of(new_sweep(name=name))[0])
    finish(tmp_path / "alone")
    (tmp_path / "alone" / "checkpoints").mkdir()
    sweeps = StatusReader(tmp_path).read()
    assert [sweep.folder.name for sweep in sweeps] == ["a", "b", tmp_path.name]
    assert [len(sweep.runs) for sweep in sweeps] == [6, 6, 1]
    assert sweeps[2].experiment is None


def test_a_run_folder_is_a_run(tmp_path, monkeypatch):
    config = to_dict(resolve(override(default_config(), {"train.steps": 100})))
    begin(tmp_path / "run", config)
    monkeypatch.chdir(tmp_path / "run")
    for path in (tmp_path / "run", Path()):
        [sweep] = StatusReader(path).read()
        [run] = sweep.runs
        assert (run.state, run.progress.step, run.progress.steps) == ("interrupted", 40, 100)


def test_committed_results_are_finished_or_diverged():
    sweeps = StatusReader(RESULTS).read()
    assert sum(len(sweep.runs) for sweep in sweeps) > 500
    assert {run.state for sweep in sweeps for run in sweep.runs} == {"finished", "diverged"}
    assert all(sweep.ended for sweep in sweeps)


def test_status_writes_nothing(new_sweep):
    root = new_sweep()
    finish(runs_of(root)[0])
    held_elsewhere(runs_of(root)[1])
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    StatusReader(root).read()
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def run_status(
    program="p", step=None, held=False, seconds_left=None, state=State.QUEUED, rate=10.0
):
    content = {"train": {"steps": 100}, "data": {"batch_size": 10}}
    run = RunStatus(Path("x"), content, program)
    progress = None if step is None else Progress(step, 100, {}, rate)
    holder = {"host": "h"} if held else None
    run.observe(state, progress=progress, holder=holder, seconds_left=seconds_left)
    return run


def test_the_time_left_is_that_of_the_workers_at_work():
    running = [run_status(step=50, held=True, state=State.RUNNING) for _ in range(2)]
    assert estimate(running) == pytest.approx(50)
    assert estimate([*running, run_status(), run_status()]) == pytest.approx(150)
    assert estimate([*running, run_status()]) == pytest.approx(150)
    assert estimate([*running, run_status("other")]) == pytest.approx(150)  # as the mean run
    stopped = run_status(step=80, state=State.INTERRUPTED, rate=math.nan)
    assert estimate([*running, stopped]) == pytest.approx(70)
    assert estimate([run_status(step=50, held=True, seconds_left=7.0)]) == pytest.approx(7)


def test_the_time_left_of_unknown_programs_is_unknown_and_of_ended_runs_zero():
    assert estimate([run_status(), run_status()]) is None
    assert estimate([run_status(held=True, state=State.RUNNING)]) is None
    assert estimate([run_status(step=100, state=State.FINISHED)]) == 0
    assert estimate([run_status(state=State.FAILED)]) == 0
    finished = run_status(step=100, state=State.FINISHED)
    finished.progress = Progress(100, 100, {"seconds": 25.0}, 1000.0)
    assert estimate([finished, run_status()]) == pytest.approx(25)


def test_times_are_in_the_unit_that_suits_them():
    texts = [duration(seconds) for seconds in (0, 89, 90, 3600, 5400, 86_400, 200_000)]
    assert texts == ["0 s", "89 s", "2 min", "60 min", "1.5 h", "24.0 h", "2.3 days"]


def test_the_text_is_a_headline_and_a_row_per_run(new_sweep, capsys):
    root = new_sweep()
    finish(runs_of(root)[0])
    fail(runs_of(root)[1])
    held_elsewhere(runs_of(root)[2], step=50, steps=100, seconds_left=25.0)
    assert main(["status", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    counts = "6 runs: 3 queued, 1 running, 1 finished, 1 failed"
    assert lines[0] == f"{root}: {counts}; about 3 min left with 1 worker"
    assert len(lines) == 7
    assert lines[1].split()[1:4] == ["finished", "step", "100/100"]
    assert "test error 25.00 %  20 images/s" in lines[1]
    assert lines[2].endswith("failed: no room")
    assert "running on node7 (SLURM 12_3), last beat unknown" in lines[3]
    assert "step 50/100" in lines[3]
    assert lines[3].endswith("25 s left")


def test_a_long_list_leaves_out_queued_and_finished_runs(new_sweep, capsys):
    root = new_sweep(seeds=",".join(map(str, range(40))))
    finish(runs_of(root)[0])
    fail(runs_of(root)[1])
    assert main(["status", str(root)]) == 0
    head, row, rest = capsys.readouterr().out.splitlines()
    assert "80 runs: 78 queued, 1 finished, 1 failed" in head
    assert "no room" in row
    assert rest.strip() == "and 78 queued, 1 finished; --json lists all"


JSON_OF_A_RUN = {
    *("folder", "state", "step", "steps", "images_per_second", "seconds_left", "host", "process"),
    *("job", "since", "alive", "beat_seconds", "error", "attempts"),
}


def test_json_has_the_documented_entries(new_sweep, capsys):
    root = new_sweep()
    held_elsewhere(runs_of(root)[0], step=50, steps=100, images_per_second=20.0, seconds_left=25.0)
    fail(runs_of(root)[1])
    assert main(["status", str(root), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert {*content} == {"format", "time", "sweeps"}
    [sweep] = content["sweeps"]
    assert {*sweep} == {
        *("folder", "experiment", "launch", "counts", "workers", "seconds_left", "other_runs"),
        "runs",
    }
    assert sweep["counts"] == dict.fromkeys(map(str, State), 0) | {
        "queued": 4,
        "running": 1,
        "failed": 1,
    }
    running, failed, queued = sweep["runs"][:3]
    assert {*running} == {*failed} == {*queued} == JSON_OF_A_RUN
    assert running == {
        "folder": str(runs_of(root)[0]),
        "state": "running",
        "step": 50,
        "steps": 100,
        "images_per_second": 20.0,
        "seconds_left": 25.0,
        "host": "node7",
        "process": 4711,
        "job": "SLURM 12_3",
        "since": "2026-11-26T15:00:00+00:00",
        "alive": None,
        "beat_seconds": None,
        "error": None,
        "attempts": 0,
    }
    assert (failed["error"], failed["attempts"], failed["alive"]) == ("no room", 1, False)
    assert (queued["step"], queued["steps"]) == (None, 100)


def test_watching_prints_a_line_per_change_until_all_runs_have_ended(
    new_sweep, capsys, monkeypatch
):
    root = new_sweep(depths="8")
    runs = runs_of(root)
    steps = iter([lambda: None, *(lambda run=run: finish(run) for run in runs)])
    monkeypatch.setattr(command.time, "sleep", lambda _: next(steps)())
    assert main(["status", str(root), "--watch"]) == 0
    heads = capsys.readouterr().out.splitlines()
    assert [line.partition("runs: ")[2].partition(";")[0] for line in heads] == [
        "3 queued",
        "2 queued, 1 finished",
        "1 queued, 2 finished",
        "3 finished",
    ]


def test_watching_as_json_prints_a_document_per_line(new_sweep, capsys, monkeypatch):
    root = new_sweep(depths="8", seeds="0")
    monkeypatch.setattr(command.time, "sleep", lambda _: finish(runs_of(root)[0]))
    assert main(["status", str(root), "--watch", "--json"]) == 0
    counts = [
        json.loads(line)["sweeps"][0]["counts"] for line in capsys.readouterr().out.splitlines()
    ]
    assert [(each["queued"], each["finished"]) for each in counts] == [(1, 0), (0, 1)]


def test_control_characters_of_an_error_do_not_reach_the_terminal(new_sweep, capsys):
    root = new_sweep()
    Retries("x", 0).record(runs_of(root)[0], Failure("bad \x1b[31m [red]", ""), 0)
    main(["status", str(root)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"bad \x1b[31m [red]" in out


def test_a_folder_of_another_kind_is_named(tmp_path):
    (tmp_path / "weights.json").write_text("{}")
    assert folder_kind(tmp_path) == "weights"
    with pytest.raises(UserError, match="is a weights folder"):
        StatusReader(tmp_path).read()
