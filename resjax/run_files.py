"""What the files of a run folder hold: written by training, read by it again and by analysis.

Whatever a file holds instead, reading it ends in a ValueError that names the file.
"""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

LARGEST_STEP = 2**53

RENAMED_FIELDS = {
    "data.subset": "data.subset_seed",
    "train.accumulate": "train.accumulation_steps",
    "transfer.stage_factor": "transfer.layer_decay",
}
"""Config fields by the names that earlier versions wrote, and their names now."""


class Metric(NamedTuple):
    """A metric by its name in metrics.jsonl, and how it is compared and printed."""

    name: str
    lower_is_better: bool = True
    unit: str = ""  # "fraction" is printed as per cent

    @property
    def label(self) -> str:
        """The name with the unit in which the metric is printed: "error (%)", "angle (rad)"."""
        unit = "%" if self.unit == "fraction" else self.unit
        return f"{self.name} ({unit})" if unit else self.name

    @property
    def scale(self) -> int:
        """The factor between a value in a file and the number printed for it."""
        return 100 if self.unit == "fraction" else 1

    def format(self, value: float, deviation: float = math.nan) -> str:
        """Returns "12.34 ± 0.56" in the unit of `label`, without a NaN deviation; "–" for NaN."""
        form = ".2f" if self.unit == "fraction" else ".4g"
        numbers = (f"{self.scale * n:{form}}" for n in (value, deviation) if not math.isnan(n))
        return " ± ".join(numbers) or "–"


def primary_metric(provenance: Mapping[str, Any]) -> Metric:
    """Returns the metric that ranks a run's checkpoints, from the content of provenance.json.

    Runs of earlier versions, which do not name it, are classifiers.
    """
    named = provenance.get("primary_metric")
    if isinstance(named, dict) and isinstance(named.get("name"), str):
        return Metric(**{key: named[key] for key in Metric._fields if key in named})
    return Metric("error", unit="fraction")


def rename_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config in which fields with an earlier version's names have today's."""
    renamed = copy.deepcopy(dict(config))
    for old, new in RENAMED_FIELDS.items():
        section, _, name = old.partition(".")
        fields = renamed.get(section)
        if not isinstance(fields, dict) or name not in fields:
            continue
        value = fields.pop(name)
        *sections, name = new.split(".")
        target = renamed
        for section in sections:
            target = target.setdefault(section, {})
        target.setdefault(name, value)
    return renamed


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged, not a JSON object")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, at least in its outline; raises as `read_json_object`."""
    content = read_json_object(path)
    data = content.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise ValueError(f"{path}: damaged, no config: it has no data.name")
    return rename_fields(content)


def read_summary(path: Path) -> dict[str, float]:
    """A summary.json, its nulls, which stand for what was not finite, as NaN.

    Raises as `read_json_object`.
    """
    content = read_json_object(path)
    if not all(map(_is_number, content.values())) or not _is_step(content.get("steps")):
        raise ValueError(f"{path}: damaged, not a summary")
    return {name: math.nan if value is None else value for name, value in content.items()}


def read_measurements(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; none where there is no file.

    Without its newline the last line is still being written, or was when the run was killed; if it
    is not whole it is left out.

    Raises:
      ValueError: names the first line that is no measurement.
    """
    if not path.exists():
        return []
    *whole, tail = path.read_bytes().split(b"\n")
    lines = list(map(parse_measurement, whole))
    if None in lines:
        raise ValueError(f"{path}, line {lines.index(None) + 1}: damaged, not a measurement")
    return [line for line in (*lines, parse_measurement(tail)) if line is not None]


def parse_measurement(text: str | bytes) -> dict[str, Any] | None:
    """One line of a metrics.jsonl, its nulls as NaN; None for anything else."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not _is_step(line.get("step")):
        return None
    if line.get("split") not in ("train", "test"):
        return None
    values = {name: value for name, value in line.items() if name not in ("step", "split")}
    if not all(map(_is_number, values.values())):
        return None
    nulls = {name: math.nan for name, value in values.items() if value is None}
    return {**line, **nulls}


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_STEP


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold, or null."""
    if type(value) is int:
        return abs(value) <= LARGEST_STEP
    return value is None or isinstance(value, float)
