"""Run folders that grow, without training, and readers of what trackers have written."""

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from resjax.config import default_config, digest, override, resolve, to_dict
from resjax.tracking import End, Row, TrackedRun
from resjax.train import records
from resjax.train.records import JsonLinesFile


class FakeRun:
    """A run folder, written as training writes it: line by line, and rewound by a resume."""

    def __init__(self, folder: Path, **overrides: Any):
        fields = {name.replace("__", "."): value for name, value in overrides.items()}
        self.folder, self.config = folder, resolve(override(default_config(), fields))
        self.id = digest(self.config)
        (folder / "checkpoints").mkdir(parents=True)
        records.write_json(folder / "config.json", to_dict(self.config))
        self._files: list[JsonLinesFile] = []
        self.start()

    def start(self, metrics: str = "", layers: str = "") -> None:
        """Begins to train, from the text of the files at a checkpoint."""
        self.close()
        (self.folder / "lock").touch()
        self._metrics = JsonLinesFile(self.folder / "metrics.jsonl", metrics)
        self._layers = JsonLinesFile(self.folder / "layers.jsonl", layers)
        self._files = [self._metrics, self._layers]

    def train(self, *steps: int, shift: float = 0.0) -> None:
        """Writes the lines of steps: training, diagnostics, evaluation."""
        for step in steps:
            loss = shift + 1 / (3 + step)
            self._metrics.write({"step": step, "split": "train", "loss": loss, "error": loss / 7})
            for layer in range(3):
                norm = math.nan if step == 2 and layer == 1 else loss * (1 + layer)
                line = {"step": step, "layer": f"stage1/block{layer}", "gradient_norm": norm}
                self._layers.write(line)
            self._metrics.write({"step": step, "split": "test", "loss": loss / 3, "error": 0.1})

    @property
    def texts(self) -> tuple[str, str]:
        return self._metrics.text, self._layers.text

    def close(self) -> None:
        for file in self._files:
            file.close()

    def stop(self) -> None:
        """Ends as a run does that a signal has stopped."""
        (self.folder / "lock").unlink(missing_ok=True)

    def finish(self, **values: float) -> None:
        records.write_json(self.folder / "summary.json", {"steps": 9, "test_error": 0.1, **values})
        self.stop()

    def diverge(self) -> None:
        content = {"step": 4, "reason": "the loss is not finite"}
        records.write_json(self.folder / "diverged.json", content)
        self.stop()


@pytest.fixture
def fake_run(tmp_path: Path) -> Iterator[Callable[..., FakeRun]]:
    """A function from a name and overrides to a run folder whose training has begun."""
    made: list[FakeRun] = []

    def make(name: str = "run", **overrides: Any) -> FakeRun:
        made.append(FakeRun(tmp_path / name, **overrides))
        return made[-1]

    yield make
    for run in made:
        run.close()


def expected(folder: Path) -> dict[str, dict[int, float]]:
    """Returns the values that a tracker must show: by name and step, the latest line counts."""
    values: dict[str, dict[int, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        for name, value in _values(line, "split").items():
            content = json.loads(line)
            values.setdefault(f"{content['split']}/{name}", {})[content["step"]] = value
    layers = folder / "layers.jsonl"
    for line in layers.read_text().splitlines() if layers.exists() else ():
        for name, value in _values(line, "layer").items():
            content = json.loads(line)
            values.setdefault(f"{name}/{content['layer']}", {})[content["step"]] = value
    return values


def _values(line: str, label: str) -> dict[str, float]:
    content = json.loads(line)
    names = content.keys() - {"step", label}
    return {name: math.nan if content[name] is None else content[name] for name in names}


class Shown(NamedTuple):
    """What a tracker shows of a run; a value that comes twice is an error.

    Attributes:
      values: by name and step.
      histograms: numbers of layers, by name and step.
      config: by dotted name.
      state: the last one.
    """

    values: dict[str, dict[int, float]]
    histograms: dict[str, dict[int, int]]
    config: dict[str, Any]
    state: str


def add(table: dict[str, dict[int, Any]], name: str, step: int, value: Any) -> None:
    points = table.setdefault(name, {})
    assert step not in points, f"{name} comes twice at step {step}"
    points[step] = value


def read_tensorboard(folder: Path) -> Shown:
    """Reads a run's event file with TensorBoard's own reader, which shows what a user sees."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata
    from tensorboard.util import tensor_util

    sizes = {"scalars": 0, "tensors": 0, "histograms": 0}
    accumulator = EventAccumulator(str(folder), size_guidance=sizes, purge_orphaned_data=False)
    accumulator.Reload()
    values: dict[str, dict[int, float]] = {}
    histograms: dict[str, dict[int, int]] = {}
    state = ""
    for name in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(name):
            add(values, name, event.step, event.value)
    config: dict[str, Any] = {}
    for name in accumulator.Tags()["tensors"]:
        plugin = accumulator.SummaryMetadata(name).plugin_data
        for event in accumulator.Tensors(name):
            if plugin.plugin_name == "histograms":
                counts = tensor_util.make_ndarray(event.tensor_proto)[:, 2]
                add(histograms, name, event.step, int(counts.sum()))
            elif name == "state":
                state = tensor_util.make_ndarray(event.tensor_proto).item().decode()
        if name == metadata.SESSION_START_INFO_TAG:
            session = metadata.parse_session_start_info_plugin_data(plugin.content)
            for hparam, value in session.hparams.items():
                config[hparam] = getattr(value, value.WhichOneof("kind"))
    return Shown(values, histograms, config, state)


def read_wandb(folder: Path) -> Shown:
    """Reads the records of a run's only offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = folder.glob("wandb/offline-run-*/run-*.wandb")
    values: dict[str, dict[int, float]] = {}
    histograms: dict[str, dict[int, int]] = {}
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for content in _leveldb_records(file.read_bytes()):
        record = Record.FromString(content)
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
        for item in record.summary.update:
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        for item in record.history.item:
            keys, value = [*item.nested_key] or [item.key], json.loads(item.value_json)
            if keys[1:] == ["values"]:
                add(histograms, keys[0], record.history.step.num, sum(value))
            elif not keys[1:] and not keys[0].startswith("_"):
                add(values, keys[0], record.history.step.num, float(value))
    return Shown(values, histograms, config, summary.get("state", ""))


def _leveldb_records(content: bytes) -> Iterator[bytes]:
    """Yields the records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    position, parts = 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


class Recorder:
    """A tracker in memory; `runs` holds what it shows, `begun` the ids of runs in order."""

    runs: dict[str, Shown]
    begun: list[str]

    def __init__(self, run: TrackedRun):
        self.shown = self.runs[run.id] = Shown({}, {}, run.config, "begun")
        self.begun.append(run.id)
        self._id = run.id

    def log(self, row: Row) -> None:
        for name, value in row.scalars.items():
            add(self.shown.values, name, row.step, value)

    def flush(self) -> None:
        pass

    def close(self, end: End) -> None:
        self.runs[self._id] = self.shown._replace(state=end.text)


@pytest.fixture
def recorder() -> type[Recorder]:
    """A tracker in memory, for this test alone."""
    return type("Recorder", (Recorder,), {"runs": {}, "begun": []})


READERS: dict[str, Callable[[Path], Shown]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
}


@pytest.fixture(params=READERS)
def tracker(request: pytest.FixtureRequest) -> str:
    """The name of each tracker; skipped unless the extra `tracking` is installed."""
    for package in ("tensorboard", "wandb"):
        pytest.importorskip(package, reason="needs the extra `tracking`")
    return request.param


@pytest.fixture
def read_shown() -> Callable[[str, Path], Shown]:
    """A function from a tracker's name and the folder it writes to, to what it shows."""
    return lambda tracker, folder: READERS[tracker](folder)


@pytest.fixture
def require_shown() -> Callable[..., None]:
    """A function that fails unless every value of a run is shown once and bit for bit."""
    return _require_shown


def _require_shown(run: Path, shown: Shown, tracker: str = "") -> None:
    wanted = expected(run)
    if tracker == "tensorboard":  # which stores float32
        wanted = {n: {s: float(np.float32(x)) for s, x in p.items()} for n, p in wanted.items()}
    found = {name: p for name, p in shown.values.items() if not name.startswith("summary/")}
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        assert found[name].keys() == points.keys(), name
        np.testing.assert_array_equal([found[name][step] for step in points], [*points.values()])
