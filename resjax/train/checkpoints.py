"""A run's checkpoints, by Orbax: the newest few, whole states."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from resjax.train.step import State

KEPT = 2  # newest ones


class Checkpoints:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: Path):
        self._manager = ocp.CheckpointManager(
            folder.resolve(),  # a relative one fails later, in the background
            options=ocp.CheckpointManagerOptions(max_to_keep=KEPT),
        )

    def save(self, state: State, step: int) -> None:
        """Starts to save; the next call or `close` waits for the end."""
        self._manager.save(step, args=ocp.args.StandardSave(_plain(state)))

    def restore(self, like: State) -> State | None:
        """The newest state, or None where there is none.

        Args:
          like: a state of the same shapes, on the devices where the restored one is to lie.
        """
        if (step := self._manager.latest_step()) is None:
            return None
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        saved = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        return State(**{**saved, "key": jax.random.wrap_key_data(saved["key"])})

    def close(self) -> None:
        self._manager.close()


def _plain(state: State) -> dict[str, Any]:
    return {**state._asdict(), "key": jax.random.key_data(state.key)}
