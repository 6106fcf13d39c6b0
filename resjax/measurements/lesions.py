"""Lesions: blocks of a trained network deleted or exchanged (Veit et al. 2016, arXiv 1605.06431).

A deleted block passes on what its shortcut carries. A block of a plain network has no shortcut:
deleted, it passes its input on, subsampled and padded with zeros if the shape changes, as option
A does. So in both networks a deleted block changes shapes as before, and adds nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from resjax.errors import UserError
from resjax.models import layout
from resjax.models.layout import path_name
from resjax.models.resnet import ResNet, uses_scan
from resjax.models.shortcuts import NoShortcut, Scaled, pad, scale_branch

LESIONS = "lesions"
"""The variable collection with one number per block: 1 keeps its branch, 0 deletes it."""


class LesionedModel:
    """A network whose blocks can be deleted; `apply` takes the variables of `delete`."""

    def __init__(self, model: ResNet):
        self._model = model

    def apply(self, variables: Mapping[str, Any], *arguments: Any, **keywords: Any) -> Any:
        """Does what the network's `apply` does.

        Raises:
          UserError: a block calls no shortcut, through which a block is deleted.
        """
        shortcuts: set[str] = set()

        def intercept(call: Any, arguments: Any, keywords: Any, context: Any) -> Any:
            added, module = call(*arguments, **keywords), context.module
            if context.method_name != "__call__" or module.path[-1:] != ("shortcut",):
                return added
            shortcuts.add("/".join(module.path))
            return _delete(added, arguments[0], module)

        with nn.intercept_methods(intercept):
            outputs = self._model.apply(variables, *arguments, **keywords)
        keeps = jax.tree.leaves_with_path(variables[LESIONS])
        names = {path_name(path).removesuffix("/keep") for path, _ in keeps}
        if missing := names - shortcuts:
            block = min(missing).removesuffix("/shortcut")
            raise UserError(f"{block} calls no shortcut, through which a block is deleted")
        return outputs


def _delete(added: Any, x: Array, shortcut: nn.Module) -> Any:
    """Wraps the output of a shortcut so that it deletes the branch if the block is deleted.

    Args:
      added: the output of the shortcut.
      x: the input of the block.
      shortcut: the module.
    """
    keep = shortcut.scope.get_variable(LESIONS, "keep").astype(x.dtype)
    if isinstance(shortcut, NoShortcut):
        return Scaled((1 - keep) * pad(x, shortcut.features, shortcut.strides), keep)
    return scale_branch(added, keep)


def block_names(model: ResNet) -> list[str]:
    """Returns the names of a network's blocks in order: "stage1/block1", ..."""
    return [
        f"stage{stage}/block{block}"
        for stage, blocks in enumerate(model.stages, 1)
        for block in range(1, blocks + 1)
    ]


def delete(model: ResNet, variables: Mapping[str, Any], blocks: Iterable[str]) -> dict[str, Any]:
    """Returns variables with which a `LesionedModel` computes without some of the blocks.

    All results have one structure, so all lesions of a network share a compiled program.

    Args:
      model: the network.
      variables: of the network, in the layout of its loop.
      blocks: names as in `block_names`; none leave the network whole.

    Raises:
      UserError: there is no such block.
    """
    deleted, names = set(blocks), block_names(model)
    if unknown := deleted - {*names}:
        raise UserError(f"no block {min(unknown)!r}; the network has {names[0]} to {names[-1]}")
    keeps: dict[str, Any] = {}
    for name in names:
        stage, block = name.split("/")
        keep = jnp.asarray(float(name not in deleted))
        keeps.setdefault(stage, {})[block] = {"shortcut": {"keep": keep}}
    lesions, scans = {LESIONS: keeps}, uses_scan(model.loop, model.stages)
    return {**variables, **(layout.scanned(lesions) if scans else lesions)}


def permute(
    model: ResNet, variables: Mapping[str, Any], orders: Mapping[int, Sequence[int]]
) -> dict[str, Any]:
    """Returns variables in which the equal blocks of stages are in another order.

    Args:
      model: the network.
      variables: of the network, in the layout of its loop.
      orders: for each stage, counted from 1, the blocks in their new order: a permutation of 2, 3,
        ..., as the first block of a stage may change the shape and stays.

    Raises:
      UserError: an order is not such a permutation.
    """
    permuted = {collection: dict(modules) for collection, modules in variables.items()}
    for stage, order in orders.items():
        equal = range(2, model.stages[stage - 1] + 1)
        if sorted(order) != [*equal]:
            raise UserError(
                f"stage {stage}: {list(order)} is not an order of the blocks {[*equal]}"
            )
        for modules in permuted.values():
            if blocks := modules.get(f"stage{stage}"):
                modules[f"stage{stage}"] = {**blocks, **_reordered(blocks, order)}
    return permuted


def _reordered(blocks: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """Returns the equal blocks of a stage, in either layout, in another order."""
    if "blocks" in blocks:
        places = np.array(order) - 2
        return {"blocks": jax.tree.map(lambda leaf: leaf[places], blocks["blocks"])}
    names = (f"block{index}" for index in order)
    return {f"block{place}": blocks[name] for place, name in enumerate(names, 2) if name in blocks}


def random_orders(model: ResNet, swaps: int, rng: np.random.Generator) -> dict[int, list[int]]:
    """Returns the orders of all stages after random swaps of two equal blocks of one stage.

    Raises:
      UserError: no stage has two equal blocks.
    """
    orders = {stage: np.arange(2, n + 1) for stage, n in enumerate(model.stages, 1) if n > 2}
    if not orders:
        raise UserError("no stage has two equal blocks after its first one, which could be swapped")
    pairs = np.array([len(order) * (len(order) - 1) / 2 for order in orders.values()])
    for _ in range(swaps):
        order = orders[rng.choice([*orders], p=pairs / pairs.sum())]
        first, second = rng.choice(len(order), 2, replace=False)
        order[[first, second]] = order[[second, first]]
    return {stage: order.tolist() for stage, order in orders.items()}


def kendall_tau(orders: Mapping[int, Sequence[int]]) -> float:
    """Returns the share of pairs of blocks in order minus that out of order, over all stages."""
    signs = [
        np.sign(later - earlier)
        for order in orders.values()
        for place, earlier in enumerate(order)
        for later in order[place + 1 :]
    ]
    return float(np.mean(signs)) if signs else 1.0
