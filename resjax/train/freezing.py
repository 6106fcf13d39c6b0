"""Which parameters train, from which step on, and at what share of the learning rate.

Parameters are selected by their paths, such as `stage4/block1/Conv_0/kernel`. A user's patterns are
matched against the paths of the unrolled network; in a scanned network the equal blocks of a stage
are stacked in one array, whose parts train together or not at all.

A schedule is a sequence of phases. Each phase trains the parameters of the phase before and some
more, so the optimizer state of those that train already is never touched. A frozen leaf of a tree
is None, which JAX does not count as a leaf: it has no gradient, no optimizer state and no decay.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from resjax.config import Transfer
from resjax.errors import UserError
from resjax.models.layout import matches, path_name

Tree = Any
NEVER = math.inf


class Phase(NamedTuple):
    """A part of training in which the same parameters train.

    Attributes:
      first_step: the step with which it begins.
      thaws: paths of the parameters that begin to train.
      trains: paths of all that train: these, and those of the phases before.
    """

    first_step: int
    thaws: frozenset[str]
    trains: frozenset[str]


def starts(paths: Mapping[str, tuple[str, ...]], transfer: Transfer) -> dict[str, float]:
    """Returns the epoch from which each parameter trains, `NEVER` if it stays frozen.

    Args:
      paths: from `unrolled_paths`.
      transfer: the section with `freeze` and `thaw`.

    Raises:
      UserError: a pattern matches no parameter or only a part of an array, or nothing trains at the
        start.
    """
    frozen = [pattern.strip() for pattern in transfer.freeze.split(",") if pattern.strip()]
    patterns = {f"transfer.freeze={pattern}": pattern for pattern in frozen}
    patterns |= {
        f"transfer.thaw.{pattern}={epoch:g}": pattern for pattern, epoch in transfer.thaw.items()
    }
    for field, pattern in patterns.items():
        _require_whole(field, pattern, paths)

    def start(path: str) -> float:
        thawing = [pattern for pattern in transfer.thaw if matches(pattern, path)]
        if thawing:
            return max((len(pattern), transfer.thaw[pattern]) for pattern in thawing)[1]
        return NEVER if any(matches(pattern, path) for pattern in frozen) else 0.0

    epochs = {name: start(unrolled[0]) for name, unrolled in paths.items()}
    if min(epochs.values()) > 0:
        raise UserError(
            "transfer.freeze and transfer.thaw: nothing trains at the start; let something, "
            "such as transfer.thaw.head=0"
        )
    return epochs


def phases(epochs: Mapping[str, float], steps_per_epoch: float) -> tuple[Phase, ...]:
    """Returns the phases in order; the first one begins at step 0.

    A parameter that trains from an epoch on trains from the first step that begins in it.

    Args:
      epochs: from which each parameter trains, from `starts`.
      steps_per_epoch: a fraction if batches span the ends of epochs.
    """
    begins: dict[int, set[str]] = {}
    for name, epoch in epochs.items():
        if epoch != NEVER:
            begins.setdefault(math.ceil(epoch * steps_per_epoch), set()).add(name)
    made: list[Phase] = []
    for step, thaws in sorted(begins.items()):
        before = made[-1].trains if made else frozenset[str]()
        made.append(Phase(step, frozenset(thaws), before | thaws))
    return tuple(made)


def frozen_modules(paths: Iterable[str], trains: Collection[str]) -> frozenset[str]:
    """Returns the modules all of whose own parameters are frozen."""
    return frozenset(map(_module, paths)) - frozenset(map(_module, trains))


def split(tree: Tree, chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Splits a tree into the leaves whose paths are `chosen`, and the others; None elsewhere."""

    def where(wanted: bool) -> Tree:
        return jax.tree.map_with_path(
            lambda path, leaf: leaf if chosen(path_name(path)) == wanted else None, tree
        )

    return where(True), where(False)


def merge(*trees: Tree) -> Tree:
    """Merges trees of one structure; each leaf comes from the first tree that has it."""
    return jax.tree.map(
        lambda *leaves: next((leaf for leaf in leaves if leaf is not None), None),
        *trees,
        is_leaf=lambda leaf: leaf is None,
    )


def rate_factors(
    paths: Collection[str], transfer: Transfer, learning_rate: float
) -> dict[str, float]:
    """Returns the factor on the learning rate of each parameter; the head's is 1.

    Stem, stages and head are groups; the last norm of a pre-activation network belongs to the last
    stage. `layer_decay` is the factor from a group to the one before it. With `first_rate`, the
    rate of the stem, the rates of the groups up to the head are evenly spaced on a logarithmic
    scale, as with fastai's `slice(first_rate, learning_rate)`.
    """
    stages = max((_stage(path) for path in paths), default=0)
    factor = transfer.layer_decay
    if transfer.first_rate is not None:
        factor = (transfer.first_rate / learning_rate) ** (1 / (stages + 1))

    def away_from_head(path: str) -> int:
        top = path.partition("/")[0]
        own = {"head": stages + 1, "norm": stages}.get(top, _stage(path))
        return stages + 1 - own

    return {path: factor ** away_from_head(path) for path in paths}


def _stage(path: str) -> int:
    """Returns the number of a parameter's stage, 0 outside of all stages."""
    found = re.match(r"stage(\d+)/", path)
    return int(found[1]) if found else 0


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _require_whole(field: str, pattern: str, paths: Mapping[str, tuple[str, ...]]) -> None:
    """Refuses a pattern that matches no parameter, or only some of the blocks in one array."""
    matched = [[matches(pattern, path) for path in unrolled] for unrolled in paths.values()]
    if not any(map(any, matched)):
        modules = ", ".join(dict.fromkeys(path.partition("/")[0] for path in paths))
        raise UserError(f"{field}: matches no parameter; the network has {modules}")
    if any(any(blocks) and not all(blocks) for blocks in matched):
        raise UserError(
            f"{field}: matches some of a stage's equal blocks, which are scanned together; set "
            "model.loop=unroll"
        )
