"""Writes a run as a TensorBoard event file, without TensorFlow.

The folder of a run holds one event file with every value once. A run that begins anew gets a new
file, and the old one is emptied, not removed: a running TensorBoard goes on reading the file that
it has open, and never opens the new one if that file is gone. The new file starts with the mark of
a restart at step 0, at which TensorBoard drops the values that it has of the run.
"""

import math
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from resjax.tracking import End, Row, TrackedRun

PREFIX = "events.out.tfevents."
SCALARS = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
STATUS = {"finished": api_pb2.STATUS_SUCCESS, "unfinished": api_pb2.STATUS_UNKNOWN}


class TensorBoard:
    """One run as an event file; scalars are float32, as in every event file."""

    def __init__(self, run: TrackedRun):
        for unfinished in run.folder.glob(f".{PREFIX}*"):  # of a follower that was killed
            unfinished.unlink()
        self._old = [*run.folder.glob(f"{PREFIX}*")]
        numbers = [int(path.name.split(".")[3]) for path in self._old]
        for empty in [path for path in self._old if not path.stat().st_size]:
            self._old.remove(empty)
            empty.unlink()
        number = max([int(time.time()), *(each + 1 for each in numbers)])  # names are read in order
        self._path = run.folder / f"{PREFIX}{number}.resjax"
        self._hidden: Path | None = self._path.with_name(f".{self._path.name}")
        self._file = self._hidden.open("wb")
        self._records = RecordWriter(self._file)
        self._step = 0
        start = _seconds(run.provenance.get("start"))
        self._write(start, file_version="brain.Event:2")
        self._write(start, session_log=SessionLog(status=SessionLog.START))
        session = SessionStartInfo(group_name=run.id, start_time_secs=start)
        for name, value in _flatten(run.config).items():
            hparam = session.hparams[name]
            if isinstance(value, bool):
                hparam.bool_value = value
            elif isinstance(value, int | float):
                hparam.number_value = value
            else:
                hparam.string_value = str(value)
        tag = metadata.SESSION_START_INFO_TAG
        self._write(start, _hparams(tag, HParamsPluginData(session_start_info=session)))

    def log(self, row: Row) -> None:
        """Adds a row as one event: its scalars, and a histogram over layers per diagnostic."""
        summary = Summary(value=[_scalar(name, value) for name, value in row.scalars.items()])
        for name, values in row.layers.items():
            if finite := [value for value in values.values() if math.isfinite(value)]:
                summary.MergeFrom(histogram_pb(f"{name}/all_layers", finite))
        self._step = row.step
        self._write(row.time, summary, row.step)

    def flush(self) -> None:
        """Writes the file; the first call makes it visible and empties the old one."""
        self._file.flush()
        if self._hidden is not None:
            self._hidden.rename(self._path)
            self._hidden = None
            for path in self._old:
                os.truncate(path, 0)

    def close(self, end: End) -> None:
        """Adds the summary as scalars `summary/NAME`, and the state as the text `state`."""
        now = time.time()
        summary = text_pb("state", end.text)
        summary.value.extend(_scalar(f"summary/{name}", x) for name, x in end.summary.items())
        self._write(now, summary, self._step)
        status = STATUS.get(end.state, api_pb2.STATUS_FAILURE)
        info = HParamsPluginData(session_end_info=SessionEndInfo(status=status, end_time_secs=now))
        self._write(now, _hparams(metadata.SESSION_END_INFO_TAG, info), self._step)
        self.flush()
        self._file.close()

    def _write(
        self, seconds: float, summary: Summary | None = None, step: int = 0, **content: Any
    ) -> None:
        event = Event(wall_time=seconds, step=step, summary=summary, **content)
        self._records.write(event.SerializeToString())


def _scalar(name: str, value: float) -> Summary.Value:
    return Summary.Value(tag=name, simple_value=value, metadata=SCALARS)


def _hparams(tag: str, content: HParamsPluginData) -> Summary:
    described = metadata.create_summary_metadata(content)
    return Summary(value=[Summary.Value(tag=tag, metadata=described, tensor=metadata.NULL_TENSOR)])


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a config by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _seconds(start: Any) -> float:
    """Returns an ISO 8601 time in seconds since the epoch; the current time if it is invalid."""
    try:
        return datetime.fromisoformat(start).timestamp()
    except (TypeError, ValueError):
        return time.time()
