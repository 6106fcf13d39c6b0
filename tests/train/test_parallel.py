"""However a run is spread over devices and processes, it is the same run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest

from resjax.train import parallel
from resjax.train.loop import evaluate

RUN = {
    "model.depth": 8,
    "model.width": 8,
    "data.batch_size": 32,
    "data.eval_batch_size": 100,  # 4 batches of 90, none of which divides among eight
    "data.crop_padding": 1,
    "data.flip": True,
    "data.random_erasing": 0.5,
    "data.mixup": 1.0,
    "data.cutmix": 1.0,
    "optimizer.learning_rate": 0.01,  # so small that no rounding grows
    "optimizer.ema_decay": 0.9,
    "train.log_every": 2,
    "train.eval_every": 10,
    "train.checkpoint_every": 10,
    "train.steps": 20,
}
FROZEN = {"transfer.freeze": "stem,stage1"}
ONE = {
    "one device": {},
    "one device, accumulated": {"train.accumulation_steps": 2},
    "one device, frozen": FROZEN,
}
JIT = {
    "jit": {},
    "jit, 8 shards": {"parallel.shard_parameters": 8},
    "jit, bn alone": {"parallel.bn_devices": 1},
    "jit, 2 shards, bn in pairs": {"parallel.shard_parameters": 2, "parallel.bn_devices": 2},
    "jit, accumulated": {"train.accumulation_steps": 2},
    "jit, 2 shards, frozen": {"parallel.shard_parameters": 2, **FROZEN},
}
PMAP = {
    "pmap": {"parallel.backend": "pmap"},
    "pmap, bn alone": {"parallel.backend": "pmap", "parallel.bn_devices": 1},
    "pmap, bn in pairs": {"parallel.backend": "pmap", "parallel.bn_devices": 2},
    "pmap, accumulated": {"parallel.backend": "pmap", "train.accumulation_steps": 2},
    "pmap, frozen": {"parallel.backend": "pmap", **FROZEN},
}
STREAM = {"data.feed": "stream", "data.workers": 0}
STREAMS = {
    "one": {
        "stream": STREAM,
        "stream, accumulated": {**STREAM, "train.accumulation_steps": 2},
    },
    "jit": {"stream, jit, accumulated": {**STREAM, "train.accumulation_steps": 2}},
    "pmap": {
        "stream, pmap": {**STREAM, "parallel.backend": "pmap"},
        "stream, pmap, accumulated": {
            **STREAM,
            "parallel.backend": "pmap",
            "train.accumulation_steps": 2,
        },
    },
}
EVERY_WAY = (*ONE, *JIT, *PMAP)
UNMIXED = {"data.mixup": 0.0, "data.cutmix": 0.0}
REFUSED = {
    "batch": {"data.batch_size": 36, **UNMIXED},
    "batch of too few": {"data.batch_size": 4, **UNMIXED},
    "accumulated batch": {"data.batch_size": 40, "train.accumulation_steps": 3, **UNMIXED},
    "pairs": {"data.batch_size": 40},
    "shards": {"parallel.shard_parameters": 3},
    "bn": {"parallel.bn_devices": 3},
    "bn under pmap": {"parallel.backend": "pmap", "parallel.bn_devices": 16},
    "shards under pmap": {"parallel.backend": "pmap", "parallel.shard_parameters": 2},
}
QUICK = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # to compile


def ask(process, line):
    process.stdin.write(line + "\n")
    process.stdin.flush()


def answer(process):
    line = process.stdout.readline()
    assert line, "virtual_devices.py failed; its traceback is on the standard error"
    return json.loads(line)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What virtual_devices.py found: of one device, of eight under jit and of eight under pmap."""
    folders = tmp_path_factory.mktemp("saved")
    program = [sys.executable, str(Path(__file__).with_name("virtual_devices.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": QUICK}
    asked = {
        "one": {"devices": 1, "ways": ONE, "saves": "one device"},
        "jit": {"devices": 8, "ways": JIT, "saves": "jit, 8 shards", "refused": REFUSED},
        "pmap": {"devices": 8, "ways": PMAP, "saves": "pmap"},
    }
    for name, streams in STREAMS.items():
        asked[name] |= {"streams": streams, "epochs": [name] if name in ("jit", "pmap") else []}
    processes = {name: subprocess.Popen(program, **pipes) for name in asked}
    try:
        for name, process in processes.items():
            ask(process, json.dumps(asked[name] | {"run": RUN, "folder": str(folders / name)}))
        answers = {"resumed": {}}
        for process in processes.values():
            found = answer(process)
            answers |= {what: found[what] for what in found if found[what]}
        for name, saved_by in [("one", "pmap"), ("jit", "pmap"), ("pmap", "one")]:
            ask(processes[name], str(folders / saved_by))
            answers["resumed"][f"{name} from {saved_by}"] = answer(processes[name])
        return answers
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


same = partial(pytest.approx, rel=1e-4)


@pytest.mark.parametrize(
    ("way", "reference"),
    [
        ("jit", "one device"),
        ("jit, 8 shards", "one device"),
        ("pmap", "one device"),
        ("pmap, bn alone", "jit, bn alone"),
        ("jit, 2 shards, bn in pairs", "pmap, bn in pairs"),
        ("jit, accumulated", "one device, accumulated"),
        ("pmap, accumulated", "one device, accumulated"),
        ("jit, 2 shards, frozen", "one device, frozen"),
        ("pmap, frozen", "one device, frozen"),
    ],
)
def test_twenty_steps_have_the_same_losses(measured, way, reference):
    assert len(measured[way]["losses"]) == 10
    assert measured[way]["losses"] == same(measured[reference]["losses"])


@pytest.mark.parametrize(
    ("way", "reference"),
    [
        ("stream, pmap", "stream"),
        ("stream, pmap, accumulated", "stream, accumulated"),
        ("stream, jit, accumulated", "stream, accumulated"),
    ],
)
def test_a_stream_gives_every_way_the_same_batches(measured, way, reference):
    assert measured[way]["losses"] == same(measured[reference]["losses"])
    assert measured[way]["test"] == same(measured[reference]["test"])


def exactly_once(epoch):
    return sorted(epoch["taken"][:75]) == list(range(75))


@pytest.mark.parametrize("way", ["jit", "pmap"])
def test_every_example_comes_exactly_once_an_epoch(measured, way):
    assert exactly_once(measured[f"epoch of {way}"])


@pytest.mark.parametrize("way", ["jit", "pmap"])
def test_of_resident_data_a_device_holds_its_part_alone(measured, way):
    assert measured[f"epoch of {way}"]["held"] == 10  # of 75


def test_in_two_processes_every_example_comes_exactly_once_an_epoch(measured, coordinator):
    program = [sys.executable, str(Path(__file__).with_name("virtual_devices.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": QUICK}
    processes = [subprocess.Popen(program, **pipes) for _ in range(2)]
    for number, process in enumerate(processes):
        asked = {"devices": 4, "cluster": [coordinator, 2, number], "epochs": ["jit", "pmap"]}
        ask(process, json.dumps(asked))
    told = [process.communicate(timeout=100)[0].splitlines()[-1] for process in processes]
    for found in map(json.loads, told):  # Gloo's own lines come before
        for way in ("jit", "pmap"):
            assert exactly_once(found[f"epoch of {way}"])
            assert found[f"epoch of {way}"] == measured[f"epoch of {way}"]


def test_bn_over_fewer_images_is_another_run(measured):
    ways = ("pmap", "pmap, bn in pairs", "pmap, bn alone", "pmap, accumulated")
    firsts = sorted(measured[way]["losses"][0] for way in ways)
    for lower, higher in pairwise(firsts):
        assert higher > 1.001 * lower


@pytest.mark.parametrize("name", ["jit", "pmap"])
def test_on_one_device_every_choice_of_bn_devices_is_the_batch(configure, name):
    whole, alone = (
        parallel.backend(configure({"parallel.backend": name, "parallel.bn_devices": devices}))
        for devices in (0, 1)
    )
    assert whole.norm_options() in ({}, {"groups": 1})
    assert alone.norm_options() == whole.norm_options()


def test_evaluation_counts_every_example_once_however_its_batches_divide(measured):
    one = measured["one device"]["test"]
    for way in ("jit, 8 shards", "pmap"):
        assert measured[way]["test"] == pytest.approx(one, rel=1e-5)
    assert all(abs(360 * one[name] % 1 - 0.5) > 0.499 for name in ("error", "ema_error"))


@pytest.mark.parametrize(
    ("way", "shards"), [("jit, 2 shards, bn in pairs", 2), ("jit, 8 shards", 8)]
)
def test_parameters_and_optimiser_state_lie_in_parts(measured, way, shards):
    placed = measured[way]["placed"]
    for shape, parts in placed:
        assert len(parts) == 8
        divisible = any(side % shards == 0 for side in shape)
        of_one = prod(shape) // shards if divisible else prod(shape)
        assert {prod(part) for part in parts} == {of_one}
    whole = sum(prod(shape) for shape, _ in placed)
    of_one = sum(prod(parts[0]) for _, parts in placed)
    assert of_one < 1.05 * whole / shards


def test_without_shards_every_device_holds_all_parameters(measured):
    assert all(part == shape for shape, parts in measured["jit"]["placed"] for part in parts)


@pytest.mark.parametrize("way", EVERY_WAY)
def test_a_dispatch_moves_nothing_between_host_and_devices(measured, way):
    assert measured[way]["moved"] is None


@pytest.mark.parametrize("way", EVERY_WAY)
def test_the_old_state_s_memory_is_given_to_the_new_one(measured, way):
    assert measured[way]["donated"]


@pytest.mark.parametrize(
    "resumed",
    ["one from pmap", "pmap from one", "jit from pmap"],  # jit: onto parameters in 8 parts
)
def test_a_checkpoint_goes_on_under_another_backend(measured, resumed):
    assert measured["resumed"][resumed] == same(measured["one device"]["losses"][5:])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("batch", "data.batch_size=36 does not divide among 8 devices; nearest: 32 or 40"),
        ("batch of too few", "data.batch_size=4 does not divide among 8 devices; nearest: 8"),
        (
            "accumulated batch",
            "data.batch_size=40 does not divide among 8 devices and 3 accumulated parts; "
            "nearest: 24 or 48",
        ),
        (
            "pairs",
            "data.batch_size=40 does not divide among 8 devices, into pairs of images to mix; "
            "nearest: 32 or 48",
        ),
        ("shards", "parallel.shard_parameters=3 does not divide 8 devices"),
        (
            "bn",
            "parallel.bn_devices=3 does not divide 8 devices; valid: 1, 2, 4, 8, and 0 for all",
        ),
        (
            "bn under pmap",
            "parallel.bn_devices=16 does not divide 8 devices; valid: 1, 2, 4, 8, and 0 for all",
        ),
        ("shards under pmap", "parallel.shard_parameters=2 needs parallel.backend=jit"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(measured, case, message):
    assert measured["refused"][case] == message


@pytest.fixture
def coordinator():
    """An address at which two processes may meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def launch(tmp_path, coordinator):
    """A function from overrides to two processes of four devices each that train one run."""
    (tmp_path / "config.py").write_text(
        "from resjax.config import default_config\nget_config = default_config\n"
    )
    command = (sys.executable, "-c", "import sys; from resjax.cli import main; sys.exit(main())")
    started = []

    def launch(overrides):
        fields = [f"--config.{name}={value}" for name, value in (RUN | overrides).items()]
        for process in (0, 1):
            typed = (
                "train",
                f"--config={tmp_path / 'config.py'}",
                f"--workdir={tmp_path / 'run'}",
                f"--coordinator={coordinator}",
                "--processes=2",
                f"--process={process}",
            )
            with (tmp_path / f"out{process}").open("w") as out:
                environment = QUICK | {"JAX_NUM_CPU_DEVICES": "4"}
                started.append(
                    subprocess.Popen((*command, *typed, *fields), stdout=out, env=environment)
                )
        return started

    yield launch
    for process in started:
        process.kill()
        process.wait()


def train_losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == "train"]


def test_two_processes_have_the_losses_of_one_and_the_first_alone_writes(
    measured, launch, tmp_path
):
    assert [process.wait(timeout=120) for process in launch({})] == [0, 0]
    assert train_losses(tmp_path / "run") == same(measured["one device"]["losses"])
    assert (tmp_path / "run" / "summary.json").exists()
    told = [(tmp_path / f"out{process}").read_text() for process in (0, 1)]
    assert ["run folder: " in text for text in told] == [True, False]  # Gloo prints its own


@pytest.mark.slow
def test_two_processes_under_pmap_have_the_losses_of_one(measured, launch, tmp_path):
    processes = launch({"parallel.backend": "pmap"})
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert train_losses(tmp_path / "run") == same(measured["one device"]["losses"])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_other_ends_and_the_last_checkpoint_is_whole(
    launch, tmp_path, victim
):
    workdir = tmp_path / "run"
    processes = launch({"train.steps": 1_000_000})
    deadline = time.monotonic() + 120
    while not (workdir / "checkpoints" / "20").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    processes[victim].send_signal(signal.SIGKILL)
    assert processes[1 - victim].wait(timeout=60) != 0
    assert not (workdir / "summary.json").exists()
    found = evaluate(workdir)
    assert found["step"] >= 20
    assert 0 < found["test_loss"] < 10
