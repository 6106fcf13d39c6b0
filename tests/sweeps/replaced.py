"""Launches a sweep, or works on one, with training replaced by a function that writes files.

    python replaced.py launch EXPERIMENT WORKDIR [--workers=N] [--retries=N]
    python replaced.py worker FOLDER --plan=DIGEST --launch=ID

The environment variable RUN_LOG names a file that gets a line for each beginning, step and end of
a run; launches and workers begin when a file beside it, `go`, exists. FAULTS says in JSON what
happens to runs by the beginning of their names: they `raise`, always or `once`, `kill` their
process, or `finish` when they are stopped. MEET is a number of processes, all of which have begun a
run before any ends one.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

from resjax.config import default_config, override, to_dict
from resjax.machine import threads
from resjax.train import records
from resjax.train.progress import Progress
from resjax.train.signals import Stopped, StopRequest, stop_on_signals

SECONDS = 0.02  # for a step
LOG = Path(os.environ["RUN_LOG"])


def log(*words):
    with LOG.open("a") as file:
        file.write(" ".join(map(str, (*words, os.getpid()))) + "\n")


def train(config, workdir, on_progress=None, stop=None, claim=None):
    """Writes a line of metrics.jsonl in each step, after those that are there."""
    log("begin", workdir.name)
    log("threads", workdir.name, threads())
    records.write_json(workdir / "config.json", to_dict(config))
    if not (workdir / "provenance.json").exists():
        records.write_json(workdir / "provenance.json", {"threads": threads()})
    meet(int(os.environ.get("MEET", "1")))
    fault = fail(workdir)
    metrics, steps = workdir / "metrics.jsonl", config.train.steps
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    with metrics.open("a") as file, (stop or StopRequest()).graceful():
        for step in range(done + 1, steps + 1):
            time.sleep(SECONDS)
            loss = config.seed + 1 / step
            file.write(json.dumps({"step": step, "split": "train", "loss": loss}) + "\n")
            file.flush()
            log("step", workdir.name, step)
            on_progress(Progress(step, steps, {"train_loss": loss}, 7.0))
            if stop and stop.signal and step < steps and fault != "finish":
                raise Stopped(stop.signal, f" at step {step} of {steps}, saved")
    records.write_json(workdir / "summary.json", {"steps": steps, "test_error": 0.25})
    log("end", workdir.name)


def meet(number):
    while True:
        words = [line.split() for line in LOG.read_text().splitlines()]
        if len({process for kind, *_, process in words if kind == "begin"}) >= number:
            return
        time.sleep(0.01)


def fail(workdir):
    faults = json.loads(os.environ.get("FAULTS", "{}"))
    fault = next((how for name, how in faults.items() if workdir.name.startswith(name)), None)
    attempted = workdir / "attempted"
    if fault == "raise" or (fault == "once" and not attempted.exists()):
        attempted.touch()
        raise ValueError("no room\nat all")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return fault


def replace(name, **contents):
    """Replaces a module, which is never imported: JAX takes seconds."""
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(contents)


# Worker processes import this file too.
replace("resjax.train.loop", train=train)
replace("resjax.xla.compilation_cache", enable_compilation_cache=lambda: None)
replace("resjax.xla.devices", require_devices=lambda: None)


def main():
    log("ready")
    while not LOG.with_name("go").exists():
        time.sleep(0.01)
    if sys.argv[1] == "worker":
        from resjax.sweeps import worker

        return worker.main(sys.argv[2:])
    from resjax.sweeps import local
    from resjax.sweeps.experiment import plan
    from resjax.sweeps.launchers import Options

    parser = argparse.ArgumentParser()
    parser.add_argument("experiment", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--retries", type=int, default=1)
    args = parser.parse_args(sys.argv[2:])
    planned = plan(args.experiment, override(default_config(), {"train.steps": 10}))
    options = Options(args.workers, args.retries)
    with stop_on_signals(notify=print) as stop:
        return min(1, local.launch(planned, args.workdir, "resjax sweep", options, stop))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Stopped as error:
        sys.exit(error.code)
