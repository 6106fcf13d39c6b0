"""Training that starts from weights instead of random parameters: `transfer.weights`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resjax.config import Config, Transfer
from resjax.data.normalization import Statistics
from resjax.disk import digest
from resjax.errors import UserError, first_few
from resjax.models.layout import Variables, path_name, scanned, unrolled_shapes
from resjax.train.checkpoint_reader import differences
from resjax.train.load_weights import load_weights
from resjax.transfer.importing import imagenet_classes
from resjax.transfer.surgery import reorder_classes, with_channels
from resjax.transfer.weights import ARRAYS, Weights, flatten, is_weights_folder

HEAD = "params/head/"
HEADS = HEAD, "batch_stats/head/"


def initial_weights(config: Config, channels: int) -> Weights | None:
    """Returns the weights that `transfer.weights` names, or None if training starts from random.

    Args:
      config: of the run.
      channels: of the data's images, to which the first convolution is adapted.

    Raises:
      UserError: there are no such weights, or they are damaged.
    """
    if config.transfer.weights is None:
        return None
    return with_channels(load_weights(config.transfer.weights), channels)


def require_fit(config: Config, initial: Weights, shapes: Variables) -> None:
    """Checks that weights are those of the run's network, except for a head that is replaced.

    Args:
      config: of the run.
      initial: from `initial_weights`.
      shapes: of the network's variables, in either layout.

    Raises:
      UserError: they have another number of classes, or belong to another network.
    """
    where = f"transfer.weights={config.transfer.weights}"
    if config.transfer.head == "zero" and config.task.name != "classification":
        raise UserError(
            f"transfer.head=zero is for classification; for task.name={config.task.name} set "
            "transfer.head=new"
        )
    ignored = () if config.transfer.head == "keep" else HEADS
    theirs, ours = _shapes(initial.variables, ignored), _shapes(shapes, ignored)
    found, classes = (shapes.get(f"{HEAD}bias", (0,))[0] for shapes in (theirs, ours))
    if found != classes:
        have = f"have {found:,} classes" if found else "have no head"
        raise UserError(f"{where} {have}, the data {classes:,}; set transfer.head=new")
    if different := list(differences(theirs, ours, "the weights")):
        raise UserError(
            f"{where} are those of another network: {first_few(different, separator='; ')}; "
            "leave model.* open to use theirs"
        )


def match_classes(config: Config, initial: Weights, names: Sequence[str]) -> Weights:
    """Returns weights whose head has the data's classes in the data's order, if it is kept.

    Names in another order are reordered with the head. Weights without names are left as they are.

    Args:
      config: of the run.
      initial: weights that fit.
      names: of the data's classes.

    Raises:
      UserError: the head knows other classes.
    """
    theirs, ours = initial.class_names, tuple(names)
    kept = config.transfer.head == "keep" and config.task.name == "classification"
    if not (kept and theirs) or theirs == ours or _are_imagenet(theirs, ours):
        return initial
    if sorted(theirs) == sorted(ours) and len({*ours}) == len(ours):
        return reorder_classes(initial, ours)
    differing = [
        f"only the {who} have {first_few(each for each in these if each not in those)}"
        for who, these, those in (("weights", theirs, ours), ("data", ours, theirs))
        if {*these} - {*those}
    ] or ["some names occur twice"]
    raise UserError(
        f"transfer.weights={config.transfer.weights} know other classes than the data: "
        f"{'; '.join(differing)}. Set transfer.head=new, or, if only the names differ, name the "
        "classes of the weights as the data does: `resjax import WEIGHTS --out=DIR "
        "--class-names=FILE`"
    )


def _are_imagenet(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Returns whether both are ImageNet's classes, one as words, one as WordNet's numbers in order.

    Weights have words; folders of images have numbers such as n01440764.
    """
    numbers = all(re.fullmatch(r"n\d{8}", name) for name in ours)
    return numbers and list(ours) == sorted(ours) and tuple(theirs) == imagenet_classes()


def replace_variables(state: Any, initial: Weights, transfer: Transfer) -> Any:
    """Returns a state with the parameters and running statistics of weights, in its EMA too.

    Args:
      state: one replica, on the devices where it stays.
      initial: weights that fit.
      transfer: its `head` says whether the head is replaced too.
    """
    variables = initial.variables
    if any("/blocks/" in path_name(path) for path, _ in jax.tree.leaves_with_path(state.params)):
        variables = scanned(variables)
    arrays = flatten(variables)
    if transfer.head != "keep":
        arrays = {name: array for name, array in arrays.items() if not name.startswith(HEADS)}
    if transfer.head == "zero":
        arrays[f"{HEAD}kernel"] = np.zeros(state.params["head"]["kernel"].shape, np.float32)

    def replaced(path: Any, leaf: Any) -> Any:
        array = arrays.get(path_name(path))
        if array is None:
            return leaf
        # A copy, because a buffer can be donated only once.
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: np.array(array[index], leaf.dtype)
        )

    own = {"params": state.params, "batch_stats": state.batch_stats}
    ema = None if state.ema is None else jax.tree.map_with_path(replaced, state.ema)
    return state._replace(**jax.tree.map_with_path(replaced, own), ema=ema)


def normalization_statistics(
    config: Config, initial: Weights | None, own: Statistics, image_shape: Sequence[int]
) -> Statistics:
    """Returns the data's own statistics, or those of the weights for `data.normalization=weights`.

    Raises:
      UserError: the weights subtract a mean image of another size.
    """
    if config.data.normalization != "weights" or initial is None:
        return own
    for array in initial.statistics[:2]:
        if array.shape[:-1] not in ((), tuple(image_shape[:2])):
            size = " x ".join(map(str, array.shape[:2]))
            raise UserError(
                f"transfer.weights={config.transfer.weights} subtract a mean image of {size} "
                f"pixels; these images have {image_shape[0]} x {image_shape[1]}; set "
                "data.normalization=channel"
            )
    return own._replace(mean=initial.statistics.mean, std=initial.statistics.std)


def provenance(config: Config, initial: Weights | None) -> dict[str, Any]:
    """Returns where the initial weights come from, for the run's provenance.json."""
    if initial is None:
        return {}
    folder, source = Path(str(config.transfer.weights)), dict(initial.source)
    if is_weights_folder(folder):
        source = {"folder": str(folder), "sha256": digest(folder / ARRAYS), "source": source}
    return {"weights": source}


def _shapes(variables: Variables, ignored: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    shapes = unrolled_shapes(variables)
    return {path: shape for path, shape in shapes.items() if not path.startswith(ignored)}
