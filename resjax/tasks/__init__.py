"""Tasks: what a network predicts, how predictions are scored, and which metric decides."""

import dataclasses

from resjax.config import Task as TaskConfig
from resjax.errors import UserError
from resjax.tasks.base import DatasetInfo, Metric, Task, weighted_sum
from resjax.tasks.classification import Classification
from resjax.tasks.detection import Detection
from resjax.tasks.segmentation import Segmentation
from resjax.user_code import import_name

__all__ = [
    "TASKS",
    "Classification",
    "DatasetInfo",
    "Detection",
    "Metric",
    "Segmentation",
    "Task",
    "find_task",
    "make_task",
    "weighted_sum",
]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "detection": Detection,
}


def find_task(name: str) -> type[Task]:
    """Returns the class of a task: one of TASKS, or the user's as `package.module:Class`.

    Raises:
      UserError: there is no such task.
    """
    try:
        cls = import_name(name) if ":" in name else TASKS[name]
    except (ImportError, KeyError) as error:
        raise UserError(f"task.name={name}: cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise UserError(f"task.name={name}: is no class derived from resjax.tasks.Task")
    return cls


def make_task(config: TaskConfig, dataset: DatasetInfo) -> Task:
    """Returns the task of a config for a dataset.

    Args:
      config: its `name` is one of TASKS, or a class of the user's as `package.module:Class`; its
        `options` are further fields of the class.
      dataset: what the task is trained on.

    Raises:
      UserError: there is no such task, or it has no such option.
    """
    cls = find_task(config.name)
    known = [field.name for field in dataclasses.fields(cls) if field.name != "dataset"]
    if unknown := sorted(config.options.keys() - known):
        raise UserError(
            f"task.options.{unknown[0]}: {config.name} has no such option; it has "
            f"{', '.join(known) or 'none'}"
        )
    try:
        return cls(dataset, **config.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"task.options: {error}") from error
