"""Checks that an experiment of your own can be launched.

::

    from resjax.sweeps.conformance import check_experiment
    check_experiment("my_experiment.py", config="quickstart")
"""

import tempfile
from pathlib import Path

from resjax.config import load
from resjax.config.python_files import find_script
from resjax.sweeps.experiment import plan
from resjax.sweeps.made_up import rehearse


def check_experiment(file: str | Path, config: str | Path) -> list[str]:
    """Checks an experiment on a config without training anything, and prints what it checked.

    Args:
      file: the experiment, or the name of one of ours.
      config: the config file, or the name of one of ours.

    Returns:
      The claims that hold, one sentence each.

    Raises:
      UserError: a run is impossible, or `figures` or `claims` raises or returns something else.
    """
    claims: list[str] = []

    def claim(text: str) -> None:
        claims.append(text)
        print(f"{Path(file).name}: {text}")

    planned = plan(find_script(str(file), "experiments"), load(config), str(config))
    claim(f"sweep() yields {len(planned.runs)} different runs, which are all possible")
    with tempfile.TemporaryDirectory() as folder:
        tried = rehearse(planned, Path(folder), print)
    if tried is not None:
        figures, judged = tried
        claim(f"figures() draws {', '.join(figures) or 'nothing'} from runs with made-up numbers")
        claim(f"claims() judges {len(judged)} claims by the same runs")
    return claims
