"""An attempt at one run: claims its folder, trains it and measures it, in the calling process."""

import math
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from resjax.config import Config, code_names, from_dict, to_dict
from resjax.errors import UserError, one_line
from resjax.machine import threads
from resjax.run_files import primary_metric, recorded_threads
from resjax.sweeps.measure import Measure, measure_run, needs_measuring
from resjax.sweeps.status import Measuring
from resjax.train import records
from resjax.train.progress import Progress
from resjax.train.signals import StopRequest
from resjax.user_code import trust


class Failure(NamedTuple):
    """Why a run failed, or, in the state "not measured", why the trained run was not measured."""

    error: str  # on one line
    report: str  # with the traceback, if there is one
    state: str = "failed"
    retry: bool = True  # whether another attempt may succeed


class Held(NamedTuple):
    """Another process trains or measures the run."""

    holder: str


class Finished(NamedTuple):
    """Another process has finished and measured the run since it was chosen."""


class OtherThreads(NamedTuple):
    """The run began on another number of threads, which only another process can use."""

    threads: int


Outcome = Failure | Held | Finished | OtherThreads | None
"""The end of an attempt; None if the run is trained and measured."""

Report = Callable[[Progress | Measuring], None]
Attempt = Callable[[Config, Path, Report, Measure | None], Outcome]


def attempt(
    config: Config,
    folder: Path,
    report: Report,
    measure: Measure | None = None,
    stop: StopRequest | None = None,
) -> Outcome:
    """Trains and measures one run in this process; returns the failure instead of raising it.

    Args:
      config: the resolved config of the run.
      folder: the run folder.
      report: called with the progress of the training, and when measuring begins.
      measure: the experiment's `measure`, if it has one.
      stop: a request to stop training.

    Raises:
      Stopped: stopping was requested; the run is saved.
    """
    from resjax.train.loop import train  # imports JAX, which takes seconds
    from resjax.xla.compilation_cache import enable_compilation_cache
    from resjax.xla.devices import require_devices

    state = Failure._field_defaults["state"]
    try:
        if finished(to_dict(config), folder, measure):
            return Finished()
        if other := _other_threads(folder):
            return other
        require_devices()
        enable_compilation_cache()
        train(config, folder, report, stop=stop)
        if measure and needs_measuring(measure, folder):
            state = "not measured"
            report(Measuring())
            trust(code_names(config))  # the user named this code when the sweep was launched
            measure_run(measure, folder)
    except Exception as error:
        if isinstance(error, UserError) and " is in use by " in str(error):
            return Held(str(error))
        text = str(error) if isinstance(error, UserError) else one_line(error)
        retry = not isinstance(error, UserError)
        return Failure(text, traceback.format_exc(), state, retry)
    return None


def _other_threads(folder: Path) -> OtherThreads | None:
    began = recorded_threads(folder)
    return None if began in (None, threads()) else OtherThreads(began)


def finished(content: dict[str, Any], folder: Path, measure: Measure | None) -> Progress | None:
    """Returns the end of a run that is trained, and measured if need be; None if it is not.

    Args:
      content: the config of the run, as `to_dict` returns it.
      folder: the run folder.
      measure: the experiment's `measure`, if it has one.
    """
    provenance = folder / "provenance.json"
    # A damaged file is reported when the run is trained.
    with suppress(UserError, ValueError, OSError):
        if not (summary := records.read_summary(folder / "summary.json")):
            return None
        if not has_config(folder, content) or (measure and needs_measuring(measure, folder)):
            return None
        steps, rate = int(summary["steps"]), summary.get("images_per_second", math.nan)
        primary = primary_metric(records.read_json(provenance) or {}, provenance)
        return Progress(steps, steps, summary, rate, primary)
    return None


def has_config(folder: Path, content: dict[str, Any]) -> bool:
    """Returns whether the config.json of a run folder is this config."""
    if (saved := records.read_json(folder / "config.json")) is None:
        return False
    # Configs that an earlier version wrote lack fields.
    return saved == {**saved, **content} or from_dict(saved) == from_dict(content)
