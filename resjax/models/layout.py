"""Converts variables between the two layouts of a network: unrolled, or stacked for a scan.

Leaves may be arrays of anything that NumPy stacks.
"""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Variables = dict[str, Any]
STACKED = re.compile(r"\b(stage\d+/)blocks(/|$)")  # the part of a path that names stacked blocks


def unrolled(variables: Variables) -> Variables:
    """Splits `stageK/blocks` (stacked along axis 0) into `stageK/block2`, `stageK/block3`, ..."""

    def split(stage: Variables) -> Variables:
        if "blocks" not in stage:
            return stage
        rest = {name: value for name, value in stage.items() if name != "blocks"}
        for index in range(min(map(len, jax.tree.leaves(stage["blocks"])), default=0)):
            rest[f"block{index + 2}"] = jax.tree.map(lambda leaf, i=index: leaf[i], stage["blocks"])
        return rest

    return _map_stages(split, variables)


def scanned(variables: Variables) -> Variables:
    """Stacks `stageK/block2`, `stageK/block3`, ... into `stageK/blocks`, along axis 0."""

    def stack(stage: Variables) -> Variables:
        equal = [name for name in stage if re.fullmatch(r"block\d+", name) and name != "block1"]
        if not equal:
            return stage
        equal.sort(key=lambda name: int(name.removeprefix("block")))
        rest = {name: value for name, value in stage.items() if name not in equal}
        blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(stage[name] for name in equal))
        return {**rest, "blocks": blocks}

    return _map_stages(stack, variables)


def is_scanned(variables: Variables) -> bool:
    """Returns whether a network has blocks that are stacked for a scan."""
    paths = (path_name(path) for path, _ in jax.tree.leaves_with_path(variables))
    return any(map(STACKED.search, paths))


def path_name(path: Any) -> str:
    """Returns a pytree path as text: `stage4/block1/Conv_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matches(pattern: str, path: str) -> bool:
    """Returns whether a shell-style pattern matches a path, or a module that contains it."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*")


def natural_order(path: str) -> tuple[Any, ...]:
    """A sort key that puts stem, stages, blocks and layers in the order of the network."""
    first = {"stem": 0, "norm": 2, "relu_0": 2, "head": 3}.get(path.partition("/")[0], 1)
    words = re.split(r"(\d+)", path)
    return (first, *((int(word) if word.isdecimal() else word) for word in words))


def first_nonfinite(variables: Any) -> str | None:
    """Returns the path of the first array that is not finite, in the network's order, or None.

    Args:
      variables: by collection, such as `params`. Of an array that is spread over processes, the
        parts of this process are looked at.
    """
    for collection, tree in variables.items():
        leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for name in sorted(leaves, key=natural_order):
            if not _is_finite(leaves[name]):
                return f"{collection}/{name}"
    return None


def _is_finite(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return bool(np.isfinite(leaf).all())
    return all(np.isfinite(shard.data).all() for shard in leaf.addressable_shards)


def unrolled_paths(params: Any) -> dict[str, tuple[str, ...]]:
    """Maps each parameter to its paths in the unrolled network: a scanned array has one per block.

    Args:
      params: arrays, or anything with their `shape`, in either layout.
    """
    paths = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        name = path_name(path)
        stage, stacked, rest = name.partition("/blocks/")
        blocks = range(2, leaf.shape[0] + 2) if stacked else ()
        paths[name] = tuple(f"{stage}/block{index}/{rest}" for index in blocks) or (name,)
    return paths


def unrolled_shapes(variables: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array of the unrolled network by path, from either layout."""
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(variables)}
    return {
        path: shapes[name] if paths == (name,) else shapes[name][1:]
        for name, paths in unrolled_paths(variables).items()
        for path in paths
    }


def _map_stages(change: Callable[[Variables], Variables], variables: Variables) -> Variables:
    return {
        collection: {
            name: change(value) if re.fullmatch(r"stage\d+", name) else value
            for name, value in modules.items()
        }
        for collection, modules in variables.items()
    }
