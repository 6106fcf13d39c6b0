"""Launches in processes of their own, at the same time and one after the other, that are killed.

Training is replaced by a function that writes files; see replaced.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from resjax.config import default_config, override
from resjax.machine import available_cores
from resjax.sweeps.experiment import plan
from resjax.sweeps.plan_files import write_sweep

SCRIPT = Path(__file__).with_name("replaced.py")
SEEDS = """
from resjax.sweeps import param

def sweep():
    return param("seed", range({}, {}))
"""


@pytest.fixture
def sweeps(tmp_path):
    """Starts launches and workers, which begin at `go`; knows what they logged."""
    processes = []
    log = tmp_path / "log"
    log.touch()

    def start(*arguments, nproc="", meet=1, **faults):
        variables = {"RUN_LOG": str(log), "NPROC": nproc, "MEET": str(meet)}
        environment = os.environ | variables | {"FAULTS": json.dumps(faults)}
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    def launch(workdir="w", seeds=(0, 8), workers=1, retries=1, **faults):
        experiment = tmp_path / f"seeds{seeds[0]}to{seeds[1]}.py"
        experiment.write_text(SEEDS.format(*seeds))
        typed = f"--workers={workers}", f"--retries={retries}"
        return start("launch", experiment, tmp_path / workdir, *typed, **faults)

    def lines(kind):
        """Returns the lines of a kind, without it: names of runs, and the number of the process."""
        found = [line.split() for line in log.read_text().splitlines()]
        return [words for first, *words in found if first == kind]

    def wait_until(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.005)

    def go(*started):
        wait_until(lambda: len(lines("ready")) == len(processes))
        (tmp_path / "go").touch()

    def ended(process):
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    yield SimpleNamespace(
        start=start, launch=launch, lines=lines, wait_until=wait_until, go=go, ended=ended
    )
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def metrics(workdir):
    return {path.parent.name: path.read_bytes() for path in workdir.glob("runs/*/metrics.jsonl")}


def expected(seeds, steps=10):
    """Returns the metrics of each seed in an uninterrupted sweep."""
    return sorted(
        "".join(
            json.dumps({"step": step, "split": "train", "loss": seed + 1 / step}) + "\n"
            for step in range(1, steps + 1)
        ).encode()
        for seed in range(*seeds)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_two_launches_at_once_train_every_run_exactly_once(sweeps, tmp_path, workers):
    both = [sweeps.launch(workers=workers, meet=2 * workers) for _ in range(2)]
    sweeps.go()
    ends = [sweeps.ended(process) for process in both]
    assert [code for code, _ in ends] == [0, 0], ends
    for kind in ("begin", "end"):
        assert sorted(Counter(name for name, _ in sweeps.lines(kind)).values()) == [1] * 8
    assert len({process for _, process in sweeps.lines("end")}) == 2 * workers
    assert sum(output.count("  finished  ") for _, output in ends) == 8
    assert sum(output.count("  finished before  ") for _, output in ends) == 8
    assert sorted(metrics(tmp_path / "w").values()) == expected((0, 8))


def test_launches_of_two_plans_share_a_folder_and_the_runs_that_both_have(sweeps, tmp_path):
    both = [sweeps.launch(seeds=seeds, meet=2) for seeds in ((0, 6), (3, 9))]
    sweeps.go()
    assert [sweeps.ended(process)[0] for process in both] == [0, 0]
    assert sorted(Counter(name for name, _ in sweeps.lines("end")).values()) == [1] * 9
    assert sorted(metrics(tmp_path / "w").values()) == expected((0, 9))
    assert len(list((tmp_path / "w" / "plans").iterdir())) == 2
    newest = json.loads((tmp_path / "w" / "sweep.json").read_text())
    assert (tmp_path / "w" / "plans" / f"{newest['plan']}.jsonl").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_whose_launcher_is_killed_goes_on_with_the_same_results(sweeps, tmp_path, workers):
    first = sweeps.launch(workers=workers)
    sweeps.go()
    sweeps.wait_until(lambda: len(sweeps.lines("step")) > 25)
    first.kill()
    first.wait()
    begun = {name for name, _ in sweeps.lines("begin")} - {name for name, _ in sweeps.lines("end")}
    assert begun
    code, output = sweeps.ended(sweeps.launch(workers=workers))
    assert (code, output.count("  finished  ")) == (0, 8 - output.count("  finished before  "))
    assert sorted(Counter(name for name, _ in sweeps.lines("end")).values()) == [1] * 8
    assert sorted(metrics(tmp_path / "w").values()) == expected((0, 8))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_keeps_its_number_of_threads_in_another_launch(sweeps, workers):
    first = sweeps.launch(seeds=(0, 3), nproc="7")
    sweeps.go()
    sweeps.wait_until(lambda: len(sweeps.lines("step")) > 3)
    first.kill()
    first.wait()
    assert sweeps.ended(sweeps.launch(seeds=(0, 3), workers=workers, nproc="5"))[0] == 0
    (name, *_), *others = sweeps.lines("threads")
    assert {number for other, number, _ in others if other == name} == {"7"}
    shared = str(max(1, available_cores() // 2))
    assert {number for other, number, _ in others if other != name} == {["5", shared][workers - 1]}


def test_a_waiting_launch_takes_over_when_the_other_is_killed(sweeps, tmp_path):
    first = sweeps.launch(seeds=(0, 1))
    sweeps.go()
    sweeps.wait_until(lambda: sweeps.lines("step"))
    os.kill(first.pid, signal.SIGSTOP)  # alive, and holds its run
    second = sweeps.launch(seeds=(0, 2))
    sweeps.wait_until(lambda: sweeps.lines("end"))
    assert second.poll() is None
    first.kill()
    code, output = sweeps.ended(second)
    assert code == 0
    assert "  running elsewhere: process " in output
    assert output.count("  finished  ") == 2
    assert sorted(metrics(tmp_path / "w").values()) == expected((0, 2))


def test_a_run_whose_worker_process_is_killed_is_tried_again(sweeps, tmp_path):
    launch = sweeps.launch(workers=2)
    sweeps.go()
    sweeps.wait_until(lambda: sweeps.lines("step"))
    name, _, process = sweeps.lines("step")[0]
    os.kill(int(process), signal.SIGKILL)
    code, output = sweeps.ended(launch)
    assert code == 0
    lost = next(line for line in output.splitlines() if "tried again" in line)
    assert lost.startswith(name)
    assert "failed, tried again: the worker process ended by SIGKILL" in lost
    assert output.count("  finished  ") == 8
    assert sorted(metrics(tmp_path / "w").values()) == expected((0, 8))
    assert not list(tmp_path.glob("w/runs/*/error.*"))


def test_a_run_that_kills_every_process_fails_after_its_retries_and_the_rest_goes_on(
    sweeps, tmp_path
):
    launch = sweeps.launch(workers=2, retries=2, seed3="kill")
    sweeps.go()
    code, output = sweeps.ended(launch)
    assert code == 1
    assert output.count("failed, tried again: the worker process ended by SIGKILL") == 2
    assert output.count("failed: the worker process ended by SIGKILL") == 1
    assert output.count("  finished  ") == 7
    assert Counter(name for name, _ in sweeps.lines("begin"))[name_of(3, tmp_path)] == 3


def name_of(seed, tmp_path):
    return next((tmp_path / "w" / "runs").glob(f"seed{seed}-*")).name


@pytest.fixture
def stored(tmp_path, request):
    """A plan of six seeds in the folder `w`, of 10 steps or as many as a test says."""
    steps = getattr(request, "param", 10)
    experiment = tmp_path / "seeds.py"
    experiment.write_text(SEEDS.format(0, 6))
    planned = plan(experiment, override(default_config(), {"train.steps": steps}))
    return write_sweep(planned, tmp_path / "w", "resjax sweep", "one")


def worker(sweeps, tmp_path, stored, launch="one", **faults):
    typed = f"--plan={stored.digest}", f"--launch={launch}", "--retries=1"
    return sweeps.start("worker", tmp_path / "w", *typed, **faults)


def test_workers_share_the_runs_and_the_retries_of_their_launch(sweeps, tmp_path, stored):
    several = [worker(sweeps, tmp_path, stored, seed2="raise", seed4="once") for _ in range(3)]
    sweeps.go()
    ends = [sweeps.ended(process) for process in several]
    assert [code for code, _ in ends] == [0, 0, 0]
    attempts = Counter(name for name, _ in sweeps.lines("begin"))
    twice = {name_of(2, tmp_path), name_of(4, tmp_path)}
    assert attempts == {run.folder.name: 1 + (run.folder.name in twice) for run in stored.runs}
    assert sum(output.count("  finished  ") for _, output in ends) == 5
    assert sum(output.count("failed: ValueError: no room at all") for _, output in ends) == 1
    late = worker(sweeps, tmp_path, stored)
    assert sweeps.ended(late) == (0, "0 runs ended here; none is left to take\n")
    again = worker(sweeps, tmp_path, stored, launch="two")
    assert "1 runs ended here" in sweeps.ended(again)[1]
    assert sorted(metrics(tmp_path / "w").values()) == expected((0, 6))


@pytest.mark.parametrize("stored", [30], indirect=True)
def test_a_worker_that_is_stopped_saves_its_run_and_another_goes_on(sweeps, tmp_path, stored):
    first = worker(sweeps, tmp_path, stored)
    sweeps.go()
    sweeps.wait_until(lambda: len(sweeps.lines("step")) > 35)
    first.send_signal(signal.SIGUSR1)
    code, output = sweeps.ended(first)
    assert code == 128 + signal.SIGUSR1
    assert "; the run under way has saved; another worker goes on from here" in output
    assert len(sweeps.lines("end")) < 6
    assert sweeps.ended(worker(sweeps, tmp_path, stored))[0] == 0
    assert sorted(metrics(tmp_path / "w").values()) == expected((0, 6), steps=30)
    steps = Counter((name, step) for name, step, _ in sweeps.lines("step"))
    assert set(steps.values()) == {1}


def test_a_worker_that_is_stopped_as_its_run_finishes_ends(sweeps, tmp_path, stored):
    stopped = worker(sweeps, tmp_path, stored, seed="finish")
    sweeps.go()
    sweeps.wait_until(lambda: sweeps.lines("step"))
    stopped.terminate()
    code, output = sweeps.ended(stopped)
    assert (code, output.count("  finished  ")) == (143, len(sweeps.lines("end")))


def test_a_worker_leaves_a_run_to_the_process_that_holds_it(sweeps, tmp_path, stored):
    first = worker(sweeps, tmp_path, stored)
    sweeps.go()
    sweeps.wait_until(lambda: sweeps.lines("step"))
    os.killpg(first.pid, signal.SIGSTOP)
    code, output = sweeps.ended(worker(sweeps, tmp_path, stored))
    assert (code, "5 runs ended here" in output) == (0, True)


def test_a_worker_of_an_unknown_or_damaged_plan_ends_in_one_line(sweeps, tmp_path, stored):
    sweeps.go()
    unknown = sweeps.start("worker", tmp_path / "w", "--plan=none", "--launch=one")
    code, output = sweeps.ended(unknown)
    assert (code, output.count("\n")) == (2, 1)
    assert "none.jsonl: no such plan" in output
    with (tmp_path / "w" / "plans" / f"{stored.digest}.jsonl").open("a") as file:
        file.write("{}\n")
    code, output = sweeps.ended(worker(sweeps, tmp_path, stored))
    assert (code, output.count("\n")) == (2, 1)
    assert "damaged, not the plan that was written" in output
