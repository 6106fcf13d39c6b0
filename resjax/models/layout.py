"""The two layouts of one network's variables: blocks side by side, or stacked for a scan.

A checkpoint of one loads in the other. Leaves may be arrays of anything that NumPy stacks.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

Variables = dict[str, Any]


def unrolled(variables: Variables) -> Variables:
    """`stageK/blocks` (stacked along axis 0) becomes `stageK/block2`, `stageK/block3`, ..."""

    def split(stage: Variables) -> Variables:
        if "blocks" not in stage:
            return stage
        rest = {name: value for name, value in stage.items() if name != "blocks"}
        count = len(jax.tree.leaves(stage["blocks"])[0])
        for index in range(count):
            block = jax.tree.map(lambda stacked, i=index: stacked[i], stage["blocks"])
            rest[f"block{index + 2}"] = block
        return rest

    return _each_stage(split, variables)


def scanned(variables: Variables) -> Variables:
    """`stageK/block2`, `stageK/block3`, ... become `stageK/blocks`, stacked along axis 0."""

    def stack(stage: Variables) -> Variables:
        equal = sorted(
            (name for name in stage if re.fullmatch(r"block\d+", name) and name != "block1"),
            key=lambda name: int(name.removeprefix("block")),
        )
        if not equal:
            return stage
        rest = {name: value for name, value in stage.items() if name not in equal}
        rest["blocks"] = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(stage[name] for name in equal)
        )
        return rest

    return _each_stage(stack, variables)


def path_name(path: Any) -> str:
    """A path of JAX's as text: `stage4/block1/Conv_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def unrolled_paths(params: Any) -> dict[str, tuple[str, ...]]:
    """Of every parameter the paths, in the unrolled network, of what its array holds.

    Args:
      params: arrays, or whatever has their `shape`, in either layout.
    """
    found = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        name = path_name(path)
        stage, stacked, rest = name.partition("/blocks/")
        blocks = range(2, leaf.shape[0] + 2) if stacked else ()
        found[name] = tuple(f"{stage}/block{index}/{rest}" for index in blocks) or (name,)
    return found


def _each_stage(change: Any, variables: Variables) -> Variables:
    return {
        collection: {
            name: change(value) if re.fullmatch(r"stage\d+", name) else value
            for name, value in modules.items()
        }
        for collection, modules in variables.items()
    }
