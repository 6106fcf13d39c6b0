"""Made-up run folders, on which an experiment's `figures` are tried before anything is trained.

Each has the config of a run of the sweep, and files with the same names, steps and metrics as those
of a real run, so that its tables have the same columns. The numbers mean nothing. A large sweep has
made-up runs for some of its seeds only.
"""

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis.claims import Claim
from resjax.analysis.experiment_figures import load_experiment, load_tables
from resjax.analysis.runs import Warn, load_measurements, load_runs
from resjax.analysis.statistics import FEWEST_SEEDS
from resjax.config import Config, to_dict
from resjax.data.datasets import empty_targets, open_dataset
from resjax.data.subsets import class_indices
from resjax.errors import UserError, one_line
from resjax.machine import safe_path
from resjax.run_files import CLASSIFICATION_ERROR, EVALUATIONS, Metric, experiment_name
from resjax.sweeps.experiment import Plan, Run

MOST_RUNS = 500  # of a sweep, beyond which the number of seeds is limited
MEASUREMENTS = 20  # per split of a run, at most
LAYERS = ("stem/Conv_0/kernel", "stage1/block1/Conv_0/kernel", "head/Dense_0/kernel")


class Metrics(NamedTuple):
    """The metrics of a task: the primary one, and the names of all."""

    primary: Metric
    names: tuple[str, ...]


KNOWN = {
    "classification": Metrics(CLASSIFICATION_ERROR, ("error", "loss")),
    "segmentation": Metrics(Metric("miou", False, "fraction"), ("accuracy", "loss", "miou")),
    "detection": Metrics(Metric("ap", False, "fraction"), ("ap", "ap50", "loss")),
}
"""Metrics of our own tasks, for which nothing needs to be traced."""


class NothingMadeUpError(Exception):
    """The metrics of a task are not known; the message says why."""


def rehearse(
    planned: Plan, workdir: Path, notify: Warn
) -> tuple[dict[str, Figure], list[Claim]] | None:
    """Draws an experiment's figures of made-up runs and judges its claims by them.

    So an error shows before anything is trained.

    Args:
      planned: the sweep.
      workdir: the sweep folder; measurements are made up from those in it.
      notify: called with a line if nothing can be made up.

    Returns:
      The figures by name and the claims, which mean nothing; None if nothing can be made up.

    Raises:
      UserError: `figures` or `claims` raises, or returns something else.
    """
    experiment = load_experiment(planned.experiment)
    if experiment.draw is None and experiment.judge is None:
        return {}, []
    try:
        runs = select_seeds(planned.runs)
        with made_up_runs({run.name: run.config for run in runs}) as folder:
            tables = load_tables(load_runs(folder), None)
            measured = made_up_measurements(tables.runs, workdir, experiment_name(experiment.file))
            tables = tables._replace(measurements=measured)
            if experiment.lacks_measurements(tables):
                raise NothingMadeUpError("no run is measured yet")
            return experiment.try_on(tables)
    except (NothingMadeUpError, OSError) as error:
        notify(f"figures() of {experiment.file} is not tried before training: {error}")
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            raise UserError(
                f"{error}, in figures() on made-up runs; nothing was trained. Fix it and launch "
                "again"
            ) from error
        notify(f"figures() needs files that made-up runs do not have: {error}")
    return None


def select_seeds(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs of a sweep, or, if it is large, those of the first seeds of each setting.

    Figures and claims depend on the settings and on how many seeds each has. At least
    `FEWEST_SEEDS` seeds of each setting remain, so that every claim is judged.
    """
    if len(runs) <= MOST_RUNS:
        return list(runs)
    settings = [repr([item for item in run.overrides.items() if item[0] != "seed"]) for run in runs]
    most, seen = max(FEWEST_SEEDS, MOST_RUNS // len({*settings})), Counter[str]()
    selected = []
    for run, setting in zip(runs, settings, strict=True):
        seen[setting] += 1
        if seen[setting] <= most:
            selected.append(run)
    return selected


@contextmanager
def made_up_runs(configs: Mapping[str, Config]) -> Iterator[Path]:
    """Writes a temporary sweep folder with a finished run of each config, and removes it.

    Args:
      configs: by the names of their run folders.

    Raises:
      NothingMadeUpError: a user's task cannot be evaluated.
    """
    metrics = _metrics_of_tasks(list(configs.values()))
    with tempfile.TemporaryDirectory(prefix="resjax-") as name:
        root = Path(name)
        for rank, (folder, config) in enumerate(configs.items()):
            done = rank / len(configs)
            _write_run(root / "runs" / folder, config, metrics[_task_of(config)], done)
        runs = [{"folder": f"runs/{folder}", "overrides": {}} for folder in configs]
        _write_json(root / "sweep.json", {"experiment": "", "command": "", "runs": runs})
        yield root


def made_up_measurements(runs: pd.DataFrame, workdir: Path, experiment: str) -> pd.DataFrame:
    """Returns measurements of made-up runs.

    Args:
      runs: the table of the made-up runs.
      workdir: a sweep folder. Each made-up run gets the rows of the first run measured there.
      experiment: the name of the experiment.

    Returns:
      A table like that of `load_measurements`; empty if no run of `workdir` is measured.
    """
    measured = pd.DataFrame(columns=["folder"])
    with suppress(UserError, OSError):  # there are no such runs; the report names damaged files
        measured = load_measurements(workdir, experiment, warn=lambda _: None)
    first = measured[measured["folder"] == measured["folder"].min()].drop(columns="folder")
    return runs[["folder"]].merge(first, how="cross")


def _write_run(folder: Path, config: Config, metrics: Metrics, rank: float) -> None:
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", to_dict(config))
    provenance = {"primary_metric": metrics.primary._asdict(), "start": "2000-01-01T00:00:00+00:00"}
    _write_json(folder / "provenance.json", provenance)
    lines = list(_measurements(config, metrics, rank))
    _write_lines(folder / "metrics.jsonl", lines)
    if config.diagnostics.every:
        from resjax.diagnostics import short_names  # imports JAX, which takes a second

        names = short_names(config.diagnostics)
        steps = _steps(config, config.diagnostics.every)
        layers = [{"step": step, "layer": layer} for step in steps for layer in LAYERS]
        _write_lines(
            folder / "layers.jsonl", [line | dict.fromkeys(names, 1 + rank) for line in layers]
        )
    last = {line["split"]: line for line in lines}
    primary = metrics.primary.name
    summary = {"steps": config.train.steps}
    for split, line in last.items():
        left_out = ("step", "split", "learning_rate", "skipped")
        summary |= {f"{split}_{name}": x for name, x in line.items() if name not in left_out}
    summary |= {f"best_test_{primary}": last["test"][primary], "best_test_step": config.train.steps}
    sizes = dict.fromkeys(("parameters", "macs", "peak_bytes"), 1000 * (config.model.depth or 1))
    times = {"compile_seconds": 1.0, "seconds": 1.0, "images_per_second": 1.0}
    _write_json(folder / "summary.json", {**summary, **sizes, "skipped_images": 0, **times})


def _measurements(config: Config, metrics: Metrics, rank: float) -> Iterator[dict[str, Any]]:
    train, steps = config.train, config.train.steps
    test_steps = set(_steps(config, train.eval_every))
    averaged = ("", "ema_") if config.optimizer.ema_decay else ("",)
    for step in sorted({*_steps(config, train.log_every), *test_steps}):
        low = 0.1 + 0.2 * rank + 0.6 * math.exp(-5 * step / steps)
        values = dict.fromkeys(metrics.names, low)
        if not metrics.primary.lower_is_better:
            values[metrics.primary.name] = 1 - low
        line: dict[str, Any] = {"step": step, "split": "train", **values}
        if train.nonfinite == "skip":
            line["skipped"] = 0.0
        yield line | {"learning_rate": config.optimizer.learning_rate}
        if step in test_steps:
            both = {f"{prefix}{name}": x for prefix in averaged for name, x in values.items()}
            for split in EVALUATIONS if train.evaluate_train else ("test",):
                yield {"step": step, "split": EVALUATIONS[split], **both}


def _steps(config: Config, every: int) -> list[int]:
    """Returns a run's last step and some multiples of `every` before it."""
    multiples = range(every, config.train.steps, every)
    thinned = multiples[:: 1 + len(multiples) // MEASUREMENTS]
    return [*thinned, config.train.steps]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content))


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _task_of(config: Config) -> str:
    return json.dumps(asdict(config.task), sort_keys=True)


def _metrics_of_tasks(configs: Sequence[Config]) -> dict[str, Metrics]:
    """Returns the metrics of each task; a user's task is traced in another process.

    That process sees no accelerator. JAX in this one would take the memory of the accelerators on
    which the workers train.
    """
    by_depth = sorted(configs, key=lambda config: config.model.depth or 0, reverse=True)
    tasks = {_task_of(config): config for config in by_depth}  # the shallowest network of each
    with safe_path(), ProcessPoolExecutor(1, get_context("spawn"), _hide_accelerators) as pool:
        try:
            return {
                task: KNOWN.get(config.task.name) or pool.submit(_find_metrics, config).result()
                for task, config in tasks.items()
            }
        except Exception as error:  # the runs will fail, each with its own report
            raise NothingMadeUpError(one_line(error)) from error


def _hide_accelerators() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"


def _find_metrics(config: Config) -> Metrics:
    """Returns the metrics of a config's task, from the shapes of an evaluation step alone."""
    import jax
    import jax.numpy as jnp

    from resjax.models.resnet import build
    from resjax.tasks import DatasetInfo, find_task, make_task
    from resjax.train.step import eval_step

    dataset = open_dataset(
        config.data.name,
        config.data.train_split,
        config.data.test_split,
        targets=find_task(config.task.name).targets,
    )
    classes, chosen = dataset.class_names, config.data.classes
    indices = class_indices(config.data.name, classes, chosen)
    classes = tuple(classes[index] for index in indices) or classes
    height, width, channels = dataset.image_shape or (32, 32, 3)
    side = config.data.image_size
    shape = (side or height, side or width, channels)
    task = make_task(config.task, DatasetInfo(classes, shape))
    model = build(config.model, head=task.head())

    def evaluate() -> Any:
        image = jnp.zeros((2, *shape))
        targets = jax.tree.map(jnp.asarray, empty_targets(dataset, shape, (2,)))
        batch = {"image": image, **targets, "weight": jnp.ones(2)}
        variables = model.init(jax.random.key(0), image)
        return eval_step(variables, batch, model=model, task=task)

    sums = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), jax.eval_shape(evaluate))
    return Metrics(task.primary, tuple(task.metrics(jax.device_get(sums))))
