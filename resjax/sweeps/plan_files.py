"""Writes and reads the files of a sweep folder that describe the runs of a launch.

`plans/DIGEST.jsonl` holds a plan: a line about the experiment, then one line per run. A worker
needs only the sweep folder and the digest. The file is named by its content, so each plan is
written once, and launches of different plans in one folder do not disturb each other. `sweep.json`
lists the runs of the newest launch.
"""

import hashlib
import json
import secrets
import tokenize
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from resjax.config import to_dict
from resjax.disk import write_atomically
from resjax.errors import UserError
from resjax.run_files import DamagedFileError, experiment_name
from resjax.sweeps.experiment import Plan
from resjax.sweeps.measure import Measure, measure_in
from resjax.sweeps.status import RunStatus
from resjax.train import records


class StoredPlan(NamedTuple):
    """A plan as its file holds it."""

    digest: str
    runs: list[RunStatus]
    measure: Measure | None


def new_launch() -> str:
    """Returns an ID for a launch, such as `20261126-145601-3f9a1c`."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def write_sweep(plan: Plan, workdir: Path, command: str, launch: str) -> StoredPlan:
    """Writes the plan, `sweep.json` and a copy of the experiment file; creates the folder `runs`.

    Args:
      plan: the resolved runs.
      workdir: the sweep folder.
      command: the command line, for `sweep.json`.
      launch: the ID of the launch, for `sweep.json`.
    """
    for name in ("runs", "plans"):
        (workdir / name).mkdir(parents=True, exist_ok=True)
    stored = _write_plan(plan, workdir)
    write_atomically(workdir / "experiment.py", plan.experiment.read_bytes())
    runs = [{"folder": f"runs/{run.name}", "overrides": run.overrides} for run in plan.runs]
    content = {
        "experiment": experiment_name(plan.experiment),
        "file": str(plan.experiment),
        "command": command,
        "plan": stored.digest,
        "launch": launch,
        "runs": runs,
    }
    records.write_json(workdir / "sweep.json", content)
    return stored


def read_plan(workdir: Path, digest: str) -> StoredPlan:
    """Reads a plan of a sweep folder.

    Raises:
      UserError: the folder has no such plan, or its file is damaged.
    """
    path = plan_file(workdir, digest)
    if not path.exists():
        raise UserError(f"{path}: no such plan; `resjax sweep` writes it")
    content = path.read_bytes()
    if _digest(content) != digest:
        raise DamagedFileError(path, "not the plan that was written")
    return _parse(content, workdir)


def plan_digest(plan: Plan) -> str:
    """Returns the digest of a plan, which names its file; writes nothing."""
    return _digest(_encode(plan))


def _encode(plan: Plan) -> bytes:
    return "".join(f"{json.dumps(line, default=str)}\n" for line in _lines(plan)).encode()


def _write_plan(plan: Plan, workdir: Path) -> StoredPlan:
    content = _encode(plan)
    path = plan_file(workdir, _digest(content))
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content)
    return _parse(content, workdir)


def _lines(plan: Plan) -> Iterator[dict[str, Any]]:
    with tokenize.open(plan.experiment) as file:
        source = file.read()
    name = experiment_name(plan.experiment)
    yield {"experiment": name, "file": str(plan.experiment), "source": source}
    for run in plan.runs:
        yield {
            "folder": f"runs/{run.name}",
            "program": _program(to_dict(replace(run.config, seed=0))),
            "overrides": run.overrides,
            "config": to_dict(run.config),
        }


def _program(config: dict[str, Any]) -> str:
    """Returns a text that is equal for runs that share a compiled program."""
    return _digest(json.dumps(config).encode())


def _parse(content: bytes, workdir: Path) -> StoredPlan:
    header, *runs = map(json.loads, content.splitlines())
    return StoredPlan(
        _digest(content),
        [RunStatus(workdir / run["folder"], run["config"], run["program"]) for run in runs],
        measure_in(header["source"], header["experiment"], Path(header["file"])),
    )


def plan_file(workdir: Path, digest: str) -> Path:
    """Returns the file of a plan."""
    return workdir / "plans" / f"{digest}.jsonl"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
