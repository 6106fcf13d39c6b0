"""Fields whose values exclude each other."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from resjax.config.schema import Config, Data, Optimizer, Transfer
from resjax.data import invalid_name
from resjax.models.presets import nearest

SCHEDULES = ("steps", "constant", "cosine", "onecycle", "he2015")
TASKS = "classification", "segmentation", "detection"  # as resjax.tasks.TASKS, which imports JAX
TRACKERS = ("tensorboard", "wandb")  # the packages that they need have these names


def conflicts(config: Config) -> Iterator[str]:
    """Yields a one-line message for each combination of values that cannot work."""
    yield from _unknown_names(config)
    yield from _uneven_intervals(config)
    yield from _in_data(config.data)
    yield from _in_optimizer(config.optimizer, config.train.steps)
    yield from _in_transfer(config.transfer)
    if config.data.normalization == "weights" and config.transfer.weights is None:
        yield "data.normalization=weights: needs transfer.weights"


def _unknown_names(config: Config) -> Iterator[str]:
    for path, name, known in (
        ("task.name", config.task.name, TASKS),
        ("optimizer.schedule", config.optimizer.schedule, SCHEDULES),
        ("track", config.track or TRACKERS[0], TRACKERS),
    ):
        if name not in known and ":" not in name:
            hint = f"{nearest(name, known)} (or package.module:name of your own)"
            yield f"{path}={name}: unknown{hint}"


def _uneven_intervals(config: Config) -> Iterator[str]:
    log_every = config.train.log_every
    for path, every in (
        ("train.eval_every", config.train.eval_every),
        ("train.checkpoint_every", config.train.checkpoint_every),
        ("diagnostics.every", config.diagnostics.every),
    ):
        if every % log_every:
            below = every - every % log_every
            near = " or ".join(str(near) for near in (below, below + log_every) if near)
            yield (
                f"{path}={every}: must be a multiple of train.log_every={log_every}, the steps of "
                f"one dispatch; nearest: {near}"
            )


def _in_data(data: Data) -> Iterator[str]:
    if why := invalid_name(data.name):
        yield f"data.name: {why}"
    classes = f"data.classes={_joined(data.classes)}"
    if len(data.classes) == 1:
        yield f"{classes}: a single class cannot be classified; name two or more, or none for all"
    if len(set(data.classes)) < len(data.classes):
        yield f"{classes}: names a class twice"
    if data.subset_seed and data.per_class is None:
        yield f"data.subset_seed={data.subset_seed}: needs data.per_class, the number to draw"
    if len(data.color_jitter) not in (0, 3):
        yield (
            f"data.color_jitter={_joined(data.color_jitter)}: needs three strengths, of "
            "brightness, contrast and saturation; 0 turns one off"
        )


def _in_optimizer(optimizer: Optimizer, steps: int) -> Iterator[str]:
    if any(earlier >= later for earlier, later in pairwise(optimizer.boundaries)):
        yield f"optimizer.boundaries={_joined(optimizer.boundaries)}: must increase"
    warmup = f"optimizer.warmup_steps={optimizer.warmup_steps}"
    if optimizer.warmup_steps >= steps:
        yield f"{warmup}: must be below train.steps={steps}"
    if optimizer.warmup_steps and optimizer.schedule in ("he2015", "onecycle"):
        yield f"{warmup}: the schedule {optimizer.schedule} has its own warm-up; set 0"
    if optimizer.nesterov and not optimizer.momentum:
        yield "optimizer.nesterov=true: needs optimizer.momentum above 0"


def _in_transfer(transfer: Transfer) -> Iterator[str]:
    if transfer.first_rate is not None and transfer.layer_decay != 1:
        yield (
            f"transfer.layer_decay={transfer.layer_decay:g} and "
            f"transfer.first_rate={transfer.first_rate:g}: both set each stage's rate; set only one"
        )
    if transfer.weights is None and transfer.head != "keep":
        yield f"transfer.head={transfer.head}: needs transfer.weights"


def _joined(values: tuple[Any, ...]) -> str:
    return ",".join(each if isinstance(each, str) else f"{each:g}" for each in values)
