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


def _each_stage(change: Any, variables: Variables) -> Variables:
    return {
        collection: {
            name: change(value) if re.fullmatch(r"stage\d+", name) else value
            for name, value in modules.items()
        }
        for collection, modules in variables.items()
    }
