"""Which parameters train, from when on, and at what share of the rate.

Parameters are known by their paths alone, such as `stage4/block1/Conv_0/kernel`. What a user says
of them is in the paths of the unrolled network; a stage's equal blocks may be stacked in one array,
whose parts then train together or not at all.

A schedule is a row of phases. The trainable parameters only grow from one to the next, so that what
an optimiser keeps of those that train already is never touched. A frozen leaf of a tree is None,
which JAX takes for no leaf at all: it has no gradient, no optimiser state and no decay.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax

from resjax.config import Transfer
from resjax.errors import UserError
from resjax.models.layout import path_name

Tree = Any
NEVER = math.inf


class Phase(NamedTuple):
    """A part of training in which the same parameters train."""

    first_step: int
    thaws: frozenset[str]  # the parameters that train from here on
    trains: frozenset[str]  # those, and the ones of the phases before


def starts(paths: Mapping[str, tuple[str, ...]], transfer: Transfer) -> dict[str, float]:
    """The epoch from which each parameter trains, `NEVER` where it stays frozen.

    Args:
      paths: what `unrolled_paths` gave.
      transfer: its `freeze` and `thaw`.

    Raises:
      UserError: a pattern matches nothing, or a part of an array only; nothing trains at first.
    """
    frozen = [pattern.strip() for pattern in transfer.freeze.split(",") if pattern.strip()]
    said = {f"transfer.freeze={pattern}": pattern for pattern in frozen}
    said |= {
        f"transfer.thaw.{pattern}={epoch:g}": pattern for pattern, epoch in transfer.thaw.items()
    }
    for field, pattern in said.items():
        _require_whole(field, pattern, paths)

    def start(path: str) -> float:
        thawing = [pattern for pattern in transfer.thaw if _matches(pattern, path)]
        if thawing:
            return max((len(pattern), transfer.thaw[pattern]) for pattern in thawing)[1]
        return NEVER if any(_matches(pattern, path) for pattern in frozen) else 0.0

    epochs = {name: start(unrolled[0]) for name, unrolled in paths.items()}
    if min(epochs.values()) > 0:
        raise UserError(
            "transfer.freeze and transfer.thaw: nothing trains at the start; let something, "
            "such as transfer.thaw.head=0"
        )
    return epochs


def phases(epochs: Mapping[str, float], steps_an_epoch: float) -> tuple[Phase, ...]:
    """The schedule, in order; the first phase begins at step 0.

    What trains from an epoch on trains from the first step that begins after so many epochs.

    Args:
      epochs: from which each parameter trains, as `starts` gives them.
      steps_an_epoch: a fraction, where batches span the ends of epochs.
    """
    begins: dict[int, set[str]] = {}
    for name, epoch in epochs.items():
        if epoch != NEVER:
            begins.setdefault(math.ceil(epoch * steps_an_epoch), set()).add(name)
    made: list[Phase] = []
    for step, thaws in sorted(begins.items()):
        before = made[-1].trains if made else frozenset[str]()
        made.append(Phase(step, frozenset(thaws), before | thaws))
    return tuple(made)


def at_rest(paths: Iterable[str], trains: Collection[str]) -> frozenset[str]:
    """The modules that have parameters of their own, of which none trains."""
    return frozenset(map(_module, paths)) - frozenset(map(_module, trains))


def split(tree: Tree, chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """A tree of the leaves whose paths are `chosen`, and one of the others, None elsewhere."""

    def where(wanted: bool) -> Tree:
        return jax.tree.map_with_path(
            lambda path, leaf: leaf if chosen(path_name(path)) == wanted else None, tree
        )

    return where(True), where(False)


def merge(*trees: Tree) -> Tree:
    """Of trees of one structure, None aside, each leaf from the one that has it."""
    return jax.tree.map(
        lambda *leaves: next((leaf for leaf in leaves if leaf is not None), None),
        *trees,
        is_leaf=lambda leaf: leaf is None,
    )


def rate_factors(
    paths: Collection[str], transfer: Transfer, learning_rate: float
) -> dict[str, float]:
    """The share of the learning rate at which each parameter trains, 1 for the head's.

    Groups are the stem, every stage and the head; the last norm of a pre-activation network goes
    with the last stage. `layer_decay` is the factor from a group to the one before. `first_rate`
    is that of the stem, and the groups between it and the head are evenly spread on a logarithmic
    scale: fastai's `slice(first_rate, learning_rate)`.
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
    """The number of a parameter's stage, 0 outside of all."""
    found = re.match(r"stage(\d+)/", path)
    return int(found[1]) if found else 0


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _matches(pattern: str, path: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*")


def _require_whole(field: str, pattern: str, paths: Mapping[str, tuple[str, ...]]) -> None:
    """Refuses a pattern that matches no parameter, or some of the blocks in one array."""
    matched = [[_matches(pattern, path) for path in unrolled] for unrolled in paths.values()]
    if not any(map(any, matched)):
        modules = ", ".join(dict.fromkeys(path.partition("/")[0] for path in paths))
        raise UserError(f"{field}: matches no parameter; the network has {modules}")
    if any(any(blocks) and not all(blocks) for blocks in matched):
        raise UserError(
            f"{field}: matches some of a stage's equal blocks, which are scanned together; set "
            "model.loop=unroll"
        )
