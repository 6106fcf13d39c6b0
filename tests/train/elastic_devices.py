"""Trains runs on virtual CPU devices, leg by leg.

This is a program of its own, because the number of devices is fixed when JAX first looks for them.
It reads lines of JSON: first the number of devices and perhaps the processes to join, then legs of
runs. It writes what each leg says as a line of JSON.
"""

import json
import signal
import sys
from pathlib import Path

import jax

from resjax.config import default_config, override, resolve
from resjax.errors import UserError
from resjax.train import trainer
from resjax.train.distributed import Cluster, join
from resjax.train.loop import train
from resjax.train.signals import Stopped, StopRequest
from resjax.xla.compile_options import quick_compile


def leg(fields, folder, until, save_after):
    """Trains or resumes a run and returns what it says.

    Stops it some steps after `until`; a signal at `save_after` makes it save.
    """
    stop, warnings, ended = StopRequest(), [], ""

    def stop_after(progress):
        if until and progress.step >= until:
            stop.signal = signal.SIGTERM
        if progress.step == save_after:
            stop.receive(signal.SIGHUP)

    try:
        config = resolve(override(default_config(), fields))
        train(config, Path(folder), stop_after, stop=stop, warn=warnings.append)
    except (Stopped, UserError) as error:
        ended = str(error)
    return {"ended": ended, "warnings": warnings}


def main():
    trainer.step_compile = quick_compile  # the programs run for a few steps
    request = json.loads(input())
    jax.config.update("jax_num_cpu_devices", request["devices"])
    if request["cluster"]:
        join(Cluster(*request["cluster"]))
    for line in sys.stdin:
        print(json.dumps(leg(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
