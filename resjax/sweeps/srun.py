"""A worker of a sweep that trains each run in several processes, on the nodes of a SLURM job.

    python -m resjax.sweeps.srun FOLDER --plan=DIGEST --launch=ID

It does what `resjax.sweeps.worker` does, but `srun` starts the processes of each run
(`resjax.sweeps.srun_member`), one for each task of the job. Process 0 claims the run. If a process
is lost, SLURM ends the others, and the run is tried again. Finished runs are measured in a child
process on the first node.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import Any

from resjax.run_files import Metric
from resjax.sweeps import worker
from resjax.sweeps.attempts import Failure, Finished, Held, Job, Outcome, Report
from resjax.sweeps.workers import STOP_SECONDS, Worker, whole_machine
from resjax.train.progress import Progress

MEMBER = [sys.executable, "-P", "-m", "resjax.sweeps.srun_member"]
SAVE, STOP = signal.SIGUSR2, signal.SIGUSR1  # which srun passes on to its processes
STOP_AGAIN_SECONDS = 5.0  # after which STOP is repeated
REPORT_LINES = 100  # of the processes' errors, for error.txt


class SrunWorker:
    """Trains one run after the other, each in the tasks of a job step; see `AnyWorker`."""

    def __init__(self) -> None:
        self.saved = False
        self._measuring = Worker(whole_machine())
        self._process: subprocess.Popen[str] | None = None
        self._stopped = threading.Event()

    def attempt(self, job: Job, report: Report) -> Outcome:
        """Trains a run in a job step, then measures it.

        Raises:
          SystemExit: `stop` was called meanwhile; ends the calling thread.
        """
        outcome = self._train(job, report)
        if outcome is None and job.measure:
            outcome = self._measuring.attempt(job, report)
            return None if isinstance(outcome, Finished) else outcome
        return outcome

    def _train(self, job: Job, report: Report) -> Outcome:
        if self._stopped.is_set():
            sys.exit()
        command = ["srun", "--kill-on-bad-exit=1", "--input=all", "--output=0", "--error=all"]
        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):  # which srun ignores
            command.append(f"--cpus-per-task={cores}")
        pipe, errors, end = subprocess.PIPE, deque[str](maxlen=REPORT_LINES), dict[str, Any]()
        with subprocess.Popen(
            [*command, *MEMBER], stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace"
        ) as process:
            self._process = process
            if self._stopped.is_set():  # before there was a process to stop
                self.stop()
            reader = threading.Thread(target=_pass_on, args=(process.stderr, errors), daemon=True)
            reader.start()
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError), process.stdin:
                request = {"folder": str(job.folder.absolute()), "config": job.content}
                json.dump(request, process.stdin)
            for line in process.stdout:
                end = _receive(line, report) or end
            code = process.wait()
            reader.join()
        self._process = None
        return self._outcome(end, code, errors)

    def _outcome(self, end: dict[str, Any], code: int, errors: deque[str]) -> Outcome:
        match end:
            case {"outcome": "done"}:
                return None
            case {"outcome": "held", "error": error}:
                return Held(error)
            case {"outcome": "failed", "error": error, "report": report, "user": user}:
                return Failure(error, report, retry=not user)
        self.saved = end.get("outcome") == "stopped"
        # SLURM sends SIGTERM to the job steps and to this process at once.
        ended = self.saved or code in (-signal.SIGTERM, 128 + signal.SIGTERM)
        if self._stopped.wait(STOP_SECONDS if ended else 0):
            sys.exit()
        said = [line.strip() for line in errors if line.startswith("srun: error:")]
        why = said[0].removeprefix("srun: error: ") if said else f"srun ended with code {code}"
        text = "the run was stopped by a signal" if self.saved else f"a process is lost: {why}"
        return Failure(text, f"{text}\n{''.join(errors)}")

    def save(self) -> None:
        """Requests a checkpoint of the run under way."""
        if process := self._process:
            process.send_signal(SAVE)

    def stop(self) -> None:
        """Stops the run, whose processes agree on a step and save."""
        self._stopped.set()
        self._measuring.stop()
        # srun drops signals until it has started the processes.
        while (process := self._process) and process.poll() is None:
            process.send_signal(STOP)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_AGAIN_SECONDS)

    def join(self) -> None:
        """Waits for the end of the processes."""
        if process := self._process:
            process.wait()
        self._measuring.join()


def _pass_on(stream: Any, errors: deque[str]) -> None:
    for line in stream:
        sys.stderr.write(line)
        sys.stderr.flush()
        errors.append(line)


def _receive(line: str, report: Report) -> dict[str, Any]:
    """Handles a line of process 0; returns its outcome, if the line has it."""
    message: Any = None
    with suppress(ValueError):
        message = json.loads(line)
    match message:
        case {"progress": [step, steps, metrics, rate, primary, test_step]}:
            report(Progress(step, steps, metrics, rate, Metric(*primary), test_step))
        case {"outcome": _}:
            return message
        case _:  # of the user's own code
            sys.stdout.write(line)
            sys.stdout.flush()
    return {}


if __name__ == "__main__":
    sys.exit(worker.main(worker=SrunWorker()))
