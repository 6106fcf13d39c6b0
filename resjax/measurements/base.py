"""A finished run, opened again so that its network can be measured."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resjax.config import Config
from resjax.data.normalization import normalize
from resjax.errors import UserError
from resjax.models.resnet import build
from resjax.run_files import checkpoint_digest, find_divergence, read_summary
from resjax.tasks import Task
from resjax.tasks.base import Batch, Sums
from resjax.train.loop import restore_run
from resjax.train.progress import Warn, print_warning
from resjax.train.step import eval_step
from resjax.train.trainer import Trainer

Evaluation = Callable[[Any, Batch], Sums]


class FinishedRun:
    """A finished run with its trained network, which an experiment's `measure` receives.

    Attributes:
      folder: of the run.
      config: resolved.
      step: the last one.
      checkpoint: digest of the checkpoint of that step.
      model: the network. In training mode its BN layers use the statistics of the whole batch, on
        however many devices the run was trained.
      task: loss and metrics.
      variables: `params` and `batch_stats` after the last step, in the layout of `model.loop`.
      ema: the moving average of these variables; None if the run has none.
    """

    folder: Path
    config: Config
    step: int
    checkpoint: str
    model: nn.Module
    task: Task
    variables: dict[str, Any]
    ema: dict[str, Any] | None

    def __init__(self, folder: Path, warn: Warn = print_warning):
        """Restores the last checkpoint of a run.

        Args:
          folder: of the run.
          warn: called for a damaged checkpoint.

        Raises:
          UserError: the run is not finished, has diverged, or its last checkpoint is missing or
            damaged.
        """
        require_measurable(folder)
        steps = int(read_summary(folder / "summary.json")["steps"])
        trainer, restored = restore_run(folder, str(steps), warn)
        state = jax.device_get(trainer.backend.unreplicate(restored.state)._replace(key=None))
        self.folder, self.config, self.step = folder, trainer.config, restored.step
        self.checkpoint = checkpoint_digest(folder, self.step)
        self.task = trainer.task
        self.model = build(trainer.config.model, head=trainer.task.head())
        self.variables = jax.tree.map(jnp.asarray, state.variables)
        self.ema = jax.tree.map(jnp.asarray, state.ema)
        self._trainer: Trainer = trainer
        self._normalize = jax.jit(partial(normalize, statistics=trainer.statistics))
        self._resident: dict[Any, list[Batch]] = {}
        self._evaluations: dict[int, tuple[Any, Evaluation]] = {}

    def batches(self, split: str = "test", count: int | None = None) -> Iterator[Batch]:
        """Yields the examples of a split as they are evaluated: cropped, normalized, not augmented.

        Args:
          split: "train" or "test".
          count: how many examples, spread evenly over the split; None for all.

        Yields:
          `image` (n, h, w, c) in float32, `label` (n,), and `weight` (n,), which is 0 for examples
          that only fill the last batch. All batches have at most `data.eval_batch_size` examples,
          and one shape.
        """
        source = self._trainer.source
        if split not in source.examples:
            raise UserError(f"split {split!r}: name train or test")
        batches: Any = self._resident.get((split, count))
        if batches is None:
            batches = source.read(split, count)
            if not source.streamed:  # then it fits on the device
                batches = [jax.tree.map(jnp.asarray, batch) for batch in batches]
                self._resident[split, count] = batches
        for batch in batches:
            yield {**batch, "image": self._normalize(batch["image"])}

    def evaluate(
        self,
        variables: Any = None,
        model: Any = None,
        split: str = "test",
        count: int | None = None,
    ) -> dict[str, float]:
        """Returns the task's metrics over a split, in evaluation mode.

        Args:
          variables: of the model; those of the run by default.
          model: anything with the network's `apply`; by default the network. It is compiled at the
            first call, so pass the same object for many variables.
          split: as for `batches`.
          count: as for `batches`.
        """
        model = self.model if model is None else model
        if id(model) not in self._evaluations:  # stored with the model, so that its id stays unique
            step = jax.jit(partial(eval_step, model=model, task=self.task))
            self._evaluations[id(model)] = model, step
        _, evaluation = self._evaluations[id(model)]
        variables = self.variables if variables is None else variables
        sums: Any = None
        for batch in self.batches(split, count):
            added = evaluation(variables, batch)
            sums = added if sums is None else jax.tree.map(jnp.add, sums, added)
        return self._trainer.metric_values({"sums": sums})


def require_measurable(folder: Path) -> None:
    """Checks that a run can be measured; reads no checkpoint yet.

    Raises:
      UserError: the run is not finished, has diverged, or has no checkpoint of its last step.
    """
    if not (summary := folder / "summary.json").exists():
        raise UserError(f"{folder}: cannot be measured: it is not a finished run")
    if divergence := find_divergence(folder):
        raise UserError(
            f"{folder}: cannot be measured: it diverged at step {divergence.step}: "
            f"{divergence.reason}"
        )
    step = int(read_summary(summary)["steps"])
    if not (folder / "checkpoints" / str(step)).is_dir():
        raise UserError(
            f"{folder}: cannot be measured: it has no checkpoint of step {step}; copy its folder "
            "checkpoints back, or delete the run and train it again"
        )
