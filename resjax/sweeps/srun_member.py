"""One of the processes that train a run together; `srun` starts them inside a SLURM job.

Each reads the run from its standard input: a JSON object with `folder` and `config`. Process 0
claims the run folder and writes lines of JSON to standard output, which `resjax.sweeps.srun` reads:
`{"progress": ...}` while it trains, and at the end `{"outcome": ...}`, unless a signal stopped it.
"""

import json
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from resjax.config import code_names, from_dict
from resjax.errors import UserError, one_line
from resjax.machine import restart_with_huge_pages, use_threads
from resjax.run_files import recorded_threads
from resjax.terminal import standard_streams
from resjax.train.lock import InUseError
from resjax.train.progress import print_warning
from resjax.train.signals import Stopped, stop_on_signals
from resjax.user_code import trust


def main() -> int:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # before training there is nothing to save
    request = json.load(sys.stdin)
    with standard_streams() as keep_going:
        keep_going()
        return _train(request["config"], Path(request["folder"]))


def _train(content: dict[str, Any], folder: Path) -> int:
    """Joins the other processes and trains with them; returns the exit code."""
    if began := recorded_threads(folder):
        use_threads(began)
    from resjax.train import distributed

    distributed.join(distributed.Cluster())
    from resjax.train.loop import train
    from resjax.xla.compilation_cache import enable_compilation_cache
    from resjax.xla.devices import require_devices

    leads = distributed.is_main_process()

    def tell(**message: Any) -> None:
        if leads:
            print(json.dumps(message), flush=True)

    def notify(text: str) -> None:
        if leads:
            print_warning(text)

    # `srun` repeats it, also after `stop_on_signals`, which restores this handler.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        require_devices()
        enable_compilation_cache()
        config = from_dict(content)
        trust(code_names(config))  # the user named this code when the sweep was launched
        with (
            distributed.exit_when_peer_is_lost(),
            stop_on_signals(
                together=True, notify=notify, save_on=(signal.SIGHUP, signal.SIGUSR2)
            ) as stop,
        ):
            train(config, folder, lambda progress: tell(progress=progress), stop=stop, warn=notify)
    except Stopped:
        tell(outcome="stopped")  # exit code 0: srun ends the others at the first failure
    except InUseError as error:
        tell(outcome="held", error=str(error))
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else one_line(error)
        user = isinstance(error, UserError)
        tell(outcome="failed", error=text, report=traceback.format_exc(), user=user)
        if not leads:
            traceback.print_exc()
        return 1
    else:
        tell(outcome="done")
    return 0


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
