"""Reads the files of a run folder, for training, which writes them, and for analysis.

A file that holds anything else raises a DamagedFileError.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

from resjax.disk import CHECKSUMS, digest
from resjax.errors import UserError

LARGEST_STEP = 2**53

SCHEMA_VERSION = 2
"""The version of config.json that is written today; version 1 has no entry `schema_version`."""


RENAMED_FIELDS = {
    "data.subset": "data.subset_seed",
    "train.accumulate": "train.accumulation_steps",
    "train.label_smoothing": "task.options.label_smoothing",
    "transfer.stage_factor": "transfer.layer_decay",
}
"""Config fields by the names that earlier versions wrote, and their names now."""


class DamagedFileError(UserError, ValueError):
    """A file of a run folder holds something that no run writes."""

    def __init__(self, path: Path, damage: str):
        super().__init__(f"{path}: damaged, {damage}; restore it from a copy or move it away")
        self.damage = damage


DISPLAY_NAMES = {
    **{"miou": "mIoU", "iou": "IoU", "ap": "AP", "ap50": "AP50", "ap75": "AP75", "map": "mAP"},
    **{"auc": "AUC", "mae": "MAE", "mse": "MSE", "rmse": "RMSE", "psnr": "PSNR", "ssim": "SSIM"},
}
"""Abbreviations as prose and figures print them, by the names of metrics in files."""


def display_name(name: str) -> str:
    """Returns the name of a metric for prose: "mIoU" for "miou", "learning rate"."""
    return DISPLAY_NAMES.get(name, name.replace("_", " "))


class Metric(NamedTuple):
    """A metric by its name in metrics.jsonl, its direction and its unit."""

    name: str
    lower_is_better: bool = True
    unit: str = ""  # a "fraction" is shown in per cent

    @property
    def label(self) -> str:
        """The name with the unit in which the metric is printed: "error (%)", "angle (rad)"."""
        unit = "%" if self.unit == "fraction" else self.unit
        return f"{self.title} ({unit})" if unit else self.title

    @property
    def title(self) -> str:
        """The name for prose, as `display_name` returns it."""
        return display_name(self.name)

    @property
    def scale(self) -> int:
        """The factor between a value in a file and the number printed for it."""
        return 100 if self.unit == "fraction" else 1

    def format(self, value: float, deviation: float = math.nan) -> str:
        """Returns "12.34 ± 0.56" in the unit of `label`, without a NaN deviation; "–" for NaN."""
        form = ".2f" if self.unit == "fraction" else ".4g"
        numbers = (f"{self.scale * n:{form}}" for n in (value, deviation) if not math.isnan(n))
        return " ± ".join(numbers) or "–"


class ScheduleChange(NamedTuple):
    """A run's number of steps changed, and with it the rates of steps that it had trained."""

    step: int  # number of steps that it had trained
    steps: tuple[int, int]  # of the whole run, before and after


class Devices(NamedTuple):
    """The devices of all processes that trained a run together."""

    number: int
    kind: str
    processes: int | None = None  # None: an earlier version did not record it

    def __str__(self) -> str:
        processes = f" of {self.processes} processes" if (self.processes or 1) > 1 else ""
        return f"{self.number} x {self.kind}{processes}"

    def same_as(self, other: "Devices") -> bool:
        """Returns whether both are as many devices of one kind in as many processes."""
        known = None not in (self.processes, other.processes)
        return self[:2] == other[:2] and (not known or self.processes == other.processes)


class DeviceChange(NamedTuple):
    """A run continued on other devices, with the same batches in the same order."""

    step: int  # number of steps that it had trained
    before: Devices
    after: Devices

    def __str__(self) -> str:
        return f"at step {self.step}, {self.before} to {self.after}"


class Divergence(NamedTuple):
    """When and why a run diverged."""

    step: int  # of the first metrics that are not finite
    reason: str  # on one line


class RunError(NamedTuple):
    """Why the last attempt to train or measure a run failed, as error.json holds it.

    Attributes:
      launch: the ID of the launch whose worker failed.
      attempts: how many attempts of this launch have failed.
      retry: whether this launch tries again.
      error: the error on one line; error.txt has the traceback.
      state: "failed", or "not measured" if the run is trained.
      time: when, in ISO 8601 with the offset from UTC.
      others: the failed attempts of other launches by their IDs.
    """

    launch: str
    attempts: int
    retry: bool
    error: str
    state: str
    time: str
    others: dict[str, int]


CLASSIFICATION_ERROR = Metric("error", unit="fraction")
"""The primary metric of runs of earlier versions, which do not name it."""


def primary_metric(provenance: Mapping[str, Any], path: Path) -> Metric:
    """Returns the primary metric that the content of the provenance.json at `path` names."""
    entry = provenance.get("primary_metric", CLASSIFICATION_ERROR._asdict())
    try:
        metric = Metric(**entry)
    except TypeError:
        metric = None
    if metric is None or [type(value) for value in metric] != [str, bool, str]:
        raise DamagedFileError(path, "primary_metric is not a name, a direction and a unit")
    return metric


EVALUATIONS = {"train": "train_set", "test": "test"}
"""Splits that are evaluated, and the names of their lines in metrics.jsonl."""

SPLITS = ("train", *EVALUATIONS.values())
"""Splits of lines of metrics.jsonl: `train` is the mean over the steps since the last line, in
training mode on images as the config augments them; the others are evaluations of whole splits."""

MARKS = {"sweep.json": "sweep", "weights.json": "weights", "dataset_info.json": "dataset"}
"""Files that mark the kind of a folder."""


def is_run_folder(folder: Path) -> bool:
    """Returns whether a run was trained there; Hugging Face's folders have a config.json too."""
    marks = ("checkpoints", "provenance.json")
    return (folder / "config.json").is_file() and any((folder / mark).exists() for mark in marks)


def folder_kind(folder: Path) -> str | None:
    """Returns "sweep", "weights", "dataset" or "run", or None if nothing marks the folder."""
    kinds = (kind for mark, kind in MARKS.items() if (folder / mark).is_file())
    return next(kinds, "run" if is_run_folder(folder) else None)


def require_kind(folder: Path, kind: str) -> None:
    """Raises a UserError that names the kind of a folder if it is marked as another kind."""
    found = folder_kind(folder)
    if found in (kind, None):
        return
    runs = sorted(folder.glob("runs/*")) if found == "sweep" else []
    such = f", such as {runs[0]}" if runs else ""
    hint = {"sweep": f"; its runs are in {folder / 'runs'}{such}"}.get(found, "")
    raise UserError(f"{folder} is a {found} folder, not a {kind} folder{hint}")


def schedule_changes(provenance: Mapping[str, Any]) -> list[ScheduleChange]:
    """Returns the changes that a provenance.json records, without entries of another form."""
    entries = provenance.get("schedule_changes")
    changes = []
    for entry in entries if isinstance(entries, list) else ():
        match entry:
            case {"step": int(step), "steps": [int(before), int(after)]}:
                changes.append(ScheduleChange(step, (before, after)))
    return changes


def trained_on(provenance: Mapping[str, Any]) -> list[tuple[int, Devices]]:
    """Returns the devices that trained a run, each with the first of its steps.

    They follow from the launches in a provenance.json. A launch begins at the step of the
    checkpoint that it restored, so it replaces what earlier launches trained after that step.
    """
    resumed = provenance.get("resumed")
    launches = [{**provenance, "step": 0}, *(resumed if isinstance(resumed, list) else ())]
    trained: list[tuple[int, Devices]] = []
    for launch in launches:
        match launch:
            case {"step": int(step), "devices": [_, *_] as names, "device_kind": str(kind)}:
                processes = launch.get("processes")
                devices = Devices(len(names), kind, processes if type(processes) is int else None)
                trained = [each for each in trained if each[0] < step]
                if not trained or not trained[-1][1].same_as(devices):
                    trained.append((step, devices))
    return trained


def device_changes(provenance: Mapping[str, Any]) -> list[DeviceChange]:
    """Returns the changes of devices of a run; see `trained_on`."""
    return [
        DeviceChange(step, before, after)
        for (_, before), (step, after) in itertools.pairwise(trained_on(provenance))
    ]


def rename_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config in which fields with an earlier version's names have today's."""
    renamed = dict(config)
    renamed.pop("schema_version", None)  # is no field
    for old, new in RENAMED_FIELDS.items():
        section, _, name = old.partition(".")
        fields = renamed.get(section)
        if not isinstance(fields, dict) or name not in fields:
            continue
        renamed[section] = dict(fields)  # `config` stays as it is
        value = renamed[section].pop(name)
        *sections, name = new.split(".")
        target = renamed
        for section in sections:
            target[section] = dict(target.get(section, {}))
            target = target[section]
        target.setdefault(name, value)
    return renamed


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises FileNotFoundError without a file."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise DamagedFileError(path, "not a JSON object")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """Returns a config.json with today's field names; checks only that it has `data.name`."""
    content = read_json_object(path)
    data = content.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise DamagedFileError(path, "not a config: it has no data.name")
    return rename_fields(content)


def read_summary(path: Path) -> dict[str, float]:
    """Returns a summary.json with NaN for each null."""
    content = read_json_object(path)
    if not all(map(_is_number, content.values())) or not _is_step(content.get("steps")):
        raise DamagedFileError(path, "not a summary")
    return {name: math.nan if value is None else value for name, value in content.items()}


class Findings(NamedTuple):
    """Rows that an experiment's `measure` returned for a run: a file of the folder `measurements`.

    Attributes:
      step: the step of the checkpoint that was measured.
      rows: values by name: numbers, texts and booleans; NaN for a number that is not finite.
      code: digest of the source of `measure`.
      checkpoint: digest of the checkpoint.
    """

    step: int
    rows: list[dict[str, Any]]
    code: str
    checkpoint: str


def findings_path(folder: Path, experiment: str) -> Path:
    """Returns the file of a run folder that holds what an experiment's `measure` found."""
    return folder / "measurements" / f"{experiment}.json"


def read_findings(path: Path) -> Findings:
    """Returns a file of the folder `measurements`; raises FileNotFoundError without a file."""
    content = read_json_object(path)
    match [content.get(name) for name in Findings._fields]:
        case [step, [*rows], str(code), str(checkpoint)] if _is_step(step):
            if all(map(_is_row, rows)):
                filled = [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
                return Findings(step, filled, code, checkpoint)
    raise DamagedFileError(path, "not what an experiment measured")


def checkpoint_digest(folder: Path, step: int) -> str:
    """Returns the digest of a run's checkpoint, or "" without one."""
    path = folder / "checkpoints" / str(step) / CHECKSUMS
    return digest(path) if path.exists() else ""


def experiment_name(experiment: Path) -> str:
    """Returns the name of an experiment: that of its file, even for the copy in a sweep folder."""
    plan = experiment.with_name("sweep.json")
    if experiment.name == "experiment.py" and plan.exists():
        return planned_experiment(plan)
    return experiment.stem


def planned_experiment(plan: Path) -> str:
    """Returns the name of the experiment that a sweep.json plans."""
    return str(read_json_object(plan).get("experiment"))


def recorded_threads(folder: Path) -> int | None:
    """Returns the number of CPU threads with which a run began; None if no file says so."""
    threads = _provenance(folder).get("threads")
    return threads if type(threads) is int and threads > 0 else None


def recorded_feed(folder: Path) -> Literal["device", "stream"] | None:
    """Returns how a run's dataset was fed when it began; None if no file says so."""
    feed = _provenance(folder).get("feed")
    return feed if feed in ("device", "stream") else None


def recorded_loop(folder: Path) -> Literal["scan", "unroll"] | None:
    """Returns whether a run began with scanned or unrolled blocks; None if no file says so."""
    content = _provenance(folder)
    # Earlier versions of resjax scanned every network on CPU, and had no such entry at first.
    loop = content.get("loop", "scan" if content.get("device_kind") == "cpu" else None)
    return loop if loop in ("scan", "unroll") else None


def _provenance(folder: Path) -> dict[str, Any]:
    """Returns the content of provenance.json; empty if it is missing or damaged."""
    with contextlib.suppress(OSError, DamagedFileError):
        return read_json_object(folder / "provenance.json")
    return {}


def read_divergence(folder: Path) -> Divergence | None:
    """Returns what a run folder's diverged.json says, or None without that file."""
    path = folder / "diverged.json"
    if not path.exists():
        return None
    content = read_json_object(path)
    step, reason = content.get("step"), content.get("reason")
    if not _is_step(step) or not isinstance(reason, str):
        raise DamagedFileError(path, "not a step and a reason")
    return Divergence(step, " ".join(reason.split()))


def find_divergence(folder: Path) -> Divergence | None:
    """Returns when and why a run diverged, or None if it did not.

    A run with `train.nonfinite=record`, or of an earlier version, has no diverged.json; its metrics
    are not finite at the end.
    """
    if found := read_divergence(folder):
        return found
    summary = folder / "summary.json"
    if summary.exists() and all(map(math.isfinite, final_metrics(read_summary(summary)).values())):
        return None
    bad: dict[str, Divergence] = {}  # by split, the first of its last lines that are not finite
    for line in read_measurements(folder / "metrics.jsonl"):
        step, split = line["step"], line["split"]
        names = [name for name in line if name != "split" and not math.isfinite(line[name])]
        if not names:
            bad.pop(split, None)
        elif split not in bad:
            skipped = "; all steps are skipped" if line.get("skipped") == 1 else ""
            bad[split] = Divergence(step, f"the {split} {names[-1]} is not finite{skipped}")
    return min(bad.values(), key=lambda divergence: divergence.step, default=None)


def find_error(folder: Path) -> RunError | None:
    """Returns why a run failed, or None if no intact error.json says so."""
    with contextlib.suppress(OSError, DamagedFileError):  # the next attempt replaces it
        content = read_json_object(folder / "error.json")
        match [content.get(name) for name in RunError._fields]:
            case [str(), int(), bool(), str(), str(), str(), {**others}]:
                if {*map(type, others.values())} <= {int}:
                    return RunError(**{name: content[name] for name in RunError._fields})
    return None


def final_metrics(summary: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics of a summary: `train_loss`, `test_error`, ..."""
    return {name: x for name, x in summary.items() if name.startswith(("train_", "test_"))}


def read_measurements(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl in order, or [] if there is no file.

    An incomplete last line is left out: it is still being written, or was when the run was killed.
    """
    return _read_lines(path, parse_measurement)


def read_layers(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a layers.jsonl (step, layer and values), as `read_measurements` does."""
    return _read_lines(path, parse_layer)


def parse_measurement(text: str | bytes) -> dict[str, Any] | None:
    """Returns a line of metrics.jsonl with NaN for each null, or None for any other text."""
    return _parse_line(text, "split", lambda split: split in SPLITS)


def parse_layer(text: str | bytes) -> dict[str, Any] | None:
    """Returns a line of layers.jsonl with NaN for each null, or None for any other text."""
    return _parse_line(text, "layer", lambda layer: isinstance(layer, str))


def _read_lines(
    path: Path, parse: Callable[[bytes], dict[str, Any] | None]
) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    *complete, last = map(parse, path.read_bytes().split(b"\n"))
    if None in complete:
        number = complete.index(None) + 1
        raise DamagedFileError(path, f"line {number} is not a line of {path.name}")
    return [line for line in (*complete, last) if line is not None]


def _parse_line(
    text: str | bytes, label: str, is_valid: Callable[[Any], bool]
) -> dict[str, Any] | None:
    """Returns a JSON object with a step, a valid `label` and numbers."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    if not _is_step(line.get("step")) or not is_valid(line.get(label)):
        return None
    values = {name: value for name, value in line.items() if name not in ("step", label)}
    if not all(map(_is_number, values.values())):
        return None
    return line | {name: math.nan for name, value in values.items() if value is None}


def _is_step(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= LARGEST_STEP


def _is_row(value: Any) -> bool:
    """Returns whether a value is an object of numbers, texts and booleans."""
    return isinstance(value, dict) and all(
        isinstance(each, str | bool) or _is_number(each) for each in value.values()
    )


def _is_number(value: Any) -> bool:
    """Returns whether a value is null or a number that a float represents."""
    if type(value) is int:
        return abs(value) <= LARGEST_STEP
    return value is None or isinstance(value, float)
