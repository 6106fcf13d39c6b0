"""A run goes on on another number of devices, with the same batches and equal losses."""

import json
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest

import resjax
from resjax.analysis.report import write_report
from resjax.errors import UserError
from resjax.models import resnet
from resjax.run_files import device_changes
from resjax.train import sources
from resjax.train import trainer as trainers
from resjax.train.loop import evaluate, train
from resjax.train.signals import Stopped, StopRequest

RUN = {
    "model.depth": 8,
    "model.width": 4,
    "model.stochastic_depth": 0.2,
    "data.batch_size": 32,
    "data.crop_padding": 1,
    "data.flip": True,
    "optimizer.learning_rate": 0.01,  # so small that rounding does not grow
    "optimizer.schedule": "constant",  # so that another number of steps is allowed
    "optimizer.ema_decay": 0.9,
    "train.accumulation_steps": 2,
    "train.log_every": 2,
    "train.eval_every": 8,
    "train.checkpoint_every": 8,
    "train.steps": 24,
}
STREAM = {"data.feed": "stream", "data.workers": 0, "parallel.backend": "pmap"}


class Process:
    """A process with some devices, or one of several that train together."""

    def __init__(self, devices, cluster=None):
        program = [sys.executable, str(Path(__file__).with_name("elastic_devices.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(program, **pipes)
        self._send({"devices": devices, "cluster": cluster})

    def start(self, folder, overrides=(), until=None, save_after=None):
        fields = RUN | dict(overrides)
        times = {"until": until, "save_after": save_after}
        self._send({"fields": fields, "folder": str(folder), **times})

    def result(self):
        line = next((line for line in self._process.stdout if line.startswith("{")), None)
        assert line, "elastic_devices.py failed; its traceback is on the standard error"
        return json.loads(line)

    def leg(self, *arguments, **keywords):
        self.start(*arguments, **keywords)
        return self.result()

    def close(self):
        self._process.kill()
        self._process.communicate()

    def _send(self, content):
        self._process.stdin.write(json.dumps(content) + "\n")
        self._process.stdin.flush()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of runs that continued on other devices, and what each of their legs said.

    Processes take turns, and two train at the same time.
    """
    root, said = tmp_path_factory.mktemp("elastic"), {"jit": [], "pmap": []}
    with ExitStack() as ending:

        def process(devices):
            made = Process(devices)
            ending.callback(made.close)
            return made

        one, two, eight = map(process, (1, 2, 8))
        two.start(root / "pmap", STREAM, until=6)
        one.leg(root / "whole")
        said["jit"].append(one.leg(root / "jit", until=4))
        shutil.copytree(root / "jit", root / "on one device")
        said["pmap"].append(two.result())
        eight.start(root / "pmap", STREAM)
        said["jit"].append(two.leg(root / "jit", until=10))
        said["pmap"].append(eight.result())
        # The steps of the last leg but one are shared out in parameters too.
        said["jit"].append(eight.leg(root / "jit", {"parallel.shard_parameters": 8}, until=16))
        said["jit"].append(one.leg(root / "jit"))
        yield SimpleNamespace(root=root, said=said, one=one, eight=eight)


def losses(folder):
    """All losses of a run, of the averaged parameters too, by step, split and name."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {
        (line["step"], line["split"], name): line[name]
        for line in lines
        for name in ("loss", "ema_loss")
        if name in line
    }


def equal(expected):
    return pytest.approx(expected, rel=1e-5, abs=0)


def provenance(folder):
    return json.loads((folder / "provenance.json").read_text())


def moves(folder):
    return [(each.before.number, each.after.number) for each in device_changes(provenance(folder))]


@pytest.mark.parametrize(
    ("way", "devices"), [("jit", [(1, 2), (2, 8), (8, 1)]), ("pmap", [(2, 8)])]
)
def test_a_run_that_changes_devices_has_the_losses_of_one_that_does_not(trained, way, devices):
    """Resident or streamed, accumulated, with averaged parameters, and sharded on eight devices."""
    assert moves(trained.root / way) == devices
    expected = losses(trained.root / "whole")
    assert len(expected) == 12 + 2 * 3
    assert losses(trained.root / way) == equal(expected)


def test_each_change_is_one_line_when_it_happens_and_an_entry_of_provenance(trained):
    first, *others = trained.said["jit"]
    assert first["warnings"] == []
    steps = [each["step"] for each in provenance(trained.root / "jit")["device_changes"]]
    changes = ("1 x cpu", "2 x cpu"), ("2 x cpu", "8 x cpu"), ("8 x cpu", "1 x cpu")
    for leg, step, (before, after) in zip(others, steps, changes, strict=True):
        (warning,) = leg["warnings"]
        assert f"continues from step {step} on {after} instead of {before}, with" in warning
        assert "\n" not in warning
    assert "device_changes" not in provenance(trained.root / "whole")


def test_tables_and_reports_say_which_runs_went_on_on_other_devices(trained):
    runs = resjax.load_runs(trained.root / "pmap", trained.root / "whole")
    step = provenance(trained.root / "pmap")["device_changes"][0]["step"]
    text = f"at step {step}, 2 x cpu to 8 x cpu"
    assert runs["device_changes"].fillna("").tolist() == [text, ""]
    report = write_report(trained.root / "pmap").read_text()
    assert "1 of 1 runs finished, 1 continued on other devices" in report


@pytest.mark.slow
def test_two_processes_go_on_from_one_and_one_from_two(trained, coordinator):
    folder = trained.root / "on one device"
    pair = [Process(1, [coordinator, 2, number]) for number in (0, 1)]
    try:
        fields = {"parallel.shard_parameters": 2, "train.steps": 16}  # each holds half of them
        for process, save_after in zip(pair, (None, 10), strict=True):
            process.start(folder, fields, save_after=save_after)
        assert [process.result()["ended"] for process in pair] == ["", ""]
        # A signal to one of them made both save, at the end of a line.
        steps = {int(path.name) for path in (folder / "checkpoints").iterdir()}
        assert steps & {12, 14}
    finally:
        for process in pair:
            process.close()
    (warning,) = trained.one.leg(folder)["warnings"]
    assert "on 1 x cpu instead of 2 x cpu of 2 processes, with" in warning
    assert losses(folder) == equal(losses(trained.root / "whole"))


@pytest.fixture
def coordinator():
    """An address at which two processes can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_sizes_that_eight_devices_cannot_divide_are_refused_with_numbers_that_can(trained):
    folder = trained.root / "refused"
    refused = {
        "data.batch_size": (36, "numbers of devices that divide it: 1, 2, 3, 6"),
        "parallel.shard_parameters": (3, "valid: 1, 2, 4, 8"),
    }
    for field, (value, end) in refused.items():
        assert trained.eight.leg(folder, {field: value})["ended"].endswith(end)
    assert not folder.exists()


SHORT = {"train.checkpoint_every": 2, "train.log_every": 2, "train.eval_every": 10}


@pytest.fixture
def stop_early():
    """A function that trains a config's run for some steps only."""

    def stop_early(config, folder):
        stop = StopRequest()

        def listen(progress):
            stop.signal = 15

        with pytest.raises(Stopped):
            train(config, folder, listen, stop=stop)

    return stop_early


def began_on(folder, devices):
    """Writes into provenance.json that a run began on so many devices."""
    content = provenance(folder) | {"devices": [f"CPU_{index}" for index in range(devices)]}
    (folder / "provenance.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("devices", "before", "now", "ends"),
    [
        (8, 1, 1, "over 16; resume on 8 devices with parallel.bn_devices=1"),
        (8, 4, 0, "over 16; resume on 8 devices with parallel.bn_devices=4"),
        (8, 8, 1, None),
        (8, 0, 1, None),
        (1, 1, 0, None),
    ],
)
def test_statistics_over_other_images_are_refused_before_anything_is_written(
    configure, regression, stop_early, tmp_path, devices, before, now, ends
):
    """The run of 16 images goes on on one device."""
    stop_early(configure(SHORT), tmp_path)
    began_on(tmp_path, devices)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["parallel"]["bn_devices"] = before
    (tmp_path / "config.json").write_text(json.dumps(saved))
    files = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    config = configure(SHORT | {"parallel.bn_devices": now})
    if ends is None:
        train(config, tmp_path, warn=lambda _: None)
        return
    with pytest.raises(UserError) as refusal:
        train(config, tmp_path)
    assert str(refusal.value).endswith(ends)
    assert f"over {16 * before // devices} images at a time, on {devices} devices" in str(
        refusal.value
    )
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json*")} == files


def test_a_network_without_batch_norm_goes_on_whatever_bn_devices_says(
    configure, regression, stop_early, tmp_path
):
    fields = SHORT | {"model.norm": "none", "parallel.bn_devices": 1}
    stop_early(configure(fields), tmp_path)
    began_on(tmp_path, 8)
    assert train(configure(fields), tmp_path, warn=lambda _: None)["steps"] == 10


def test_a_dataset_goes_on_as_a_stream_if_the_run_began_with_one(
    configure, regression, stop_early, tmp_path, monkeypatch
):
    """Other devices have other memory, and a sample of a stream has other statistics."""
    monkeypatch.setattr(sources, "SAMPLE", 100)
    config, folder = configure(SHORT | {"data.workers": 0}), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_fits", lambda *_: False)
        train(config, tmp_path / "whole")
        stop_early(config, folder)
    cached = lru_cache(maxsize=2)(trainers._cached_trainer.__wrapped__)
    monkeypatch.setattr(trainers, "_cached_trainer", cached)  # of another machine
    train(config, folder)
    assert (folder / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()
    assert evaluate(folder)["test_loss"] == evaluate(tmp_path / "whole")["test_loss"]


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_a_network_keeps_the_layout_with_which_the_run_began(
    loop, configure, stop_early, tmp_path, monkeypatch
):
    """Earlier versions of resjax had another `model.loop=auto` on CPU."""
    config = configure(SHORT | {"model.depth": 14, "train.steps": 6, "train.eval_every": 6})

    def choose(auto):
        chosen = {"auto": auto == "scan", "scan": True, "unroll": False}
        monkeypatch.setattr(resnet, "uses_scan", lambda loop, stages: chosen[loop])
        cached = lru_cache(maxsize=2)(trainers._cached_trainer.__wrapped__)
        monkeypatch.setattr(trainers, "_cached_trainer", cached)  # of another machine

    choose(auto=loop)
    train(config, tmp_path / "whole")
    stop_early(config, tmp_path / "run")
    choose(auto={"scan": "unroll", "unroll": "scan"}[loop])
    train(config, tmp_path / "run")
    whole, run = (tmp_path / name / "metrics.jsonl" for name in ("whole", "run"))
    assert run.read_bytes() == whole.read_bytes()
    assert evaluate(tmp_path / "run")["test_loss"] == evaluate(tmp_path / "whole")["test_loss"]
    assert provenance(tmp_path / "run")["loop"] == loop


def launch(step, devices, kind="cpu", **more):
    return {"step": step, "devices": ["d"] * devices, "device_kind": kind, **more}


@pytest.mark.parametrize(
    ("resumed", "changes"),
    [
        ([], []),
        ([launch(10, 1)], []),
        ([launch(10, 8)], ["at step 10, 1 x cpu to 8 x cpu"]),
        ([launch(10, 8), launch(10, 1)], []),  # the steps on eight devices were lost
        ([launch(10, 8), launch(20, 2), launch(5, 2)], ["at step 5, 1 x cpu to 2 x cpu"]),
        ([launch(10, 8), launch(0, 2)], []),  # no checkpoint was intact
        ([launch(10, 1, "H100")], ["at step 10, 1 x cpu to 1 x H100"]),
        ([launch(10, 1, processes=2)], []),  # a run of a version that did not record processes
        (
            [launch(10, 2, processes=1), launch(20, 2, processes=2)],
            ["at step 10, 1 x cpu to 2 x cpu", "at step 20, 2 x cpu to 2 x cpu of 2 processes"],
        ),
        (["damaged", {"step": 3}, launch("4", 8)], []),
    ],
)
def test_changes_follow_from_the_launches_whose_steps_still_count(resumed, changes):
    first = launch(None, 1)
    del first["step"]
    assert list(map(str, device_changes(first | {"resumed": resumed}))) == changes
