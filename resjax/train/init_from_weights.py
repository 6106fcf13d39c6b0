"""What training starts from where it does not start at random: weights of a folder or a run."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resjax import disk, run_files
from resjax.config import Config, Transfer
from resjax.data.normalization import Statistics
from resjax.errors import UserError
from resjax.models.layout import Variables, path_name, scanned, unrolled, unrolled_paths
from resjax.transfer import weights
from resjax.transfer.weights import Preprocessing, Weights

SHOWN = 5  # arrays that a message lists
HEAD = "params/head/"


def fitting(
    config: Config, shapes: Variables, classes: int, image_shape: Sequence[int]
) -> Weights | None:
    """The weights that `transfer.weights` names, or None; their first convolution made to fit.

    Args:
      config: of the run.
      shapes: of the network's variables, in either layout.
      classes: of the data.
      image_shape: of the data, (h, w, channels).

    Raises:
      UserError: they are not there, are of other classes, or of another network.
    """
    if config.transfer.weights is None:
        return None
    found = _adapted(load(Path(config.transfer.weights)), image_shape[2])
    where, head = f"transfer.weights={config.transfer.weights}", config.transfer.head
    there = _shapes(found.variables)
    if head == "keep":
        theirs = there.get(f"{HEAD}bias", (0,))[0]
        if theirs != classes:
            have = f"have {theirs:,} classes" if theirs else "have no head"
            raise UserError(f"{where} {have}, the data {classes:,}; set transfer.head=new")
    differing = list(_differences(there, _shapes(shapes), () if head == "keep" else (HEAD,)))
    if differing:
        more = f"; and {len(differing) - SHOWN} more" * (len(differing) > SHOWN)
        raise UserError(
            f"{where} are of another network: {'; '.join(differing[:SHOWN])}{more}; leave model.* "
            "open and it is theirs"
        )
    return found


def replaced(state: Any, found: Weights, transfer: Transfer) -> Any:
    """A state whose parameters and statistics, averages too, are those of the weights.

    Args:
      state: of one copy, on the devices where it is to stay.
      found: what `fitting` gave.
      transfer: whose `head` says where that comes from.
    """
    variables = found.variables
    if any("/blocks/" in path_name(path) for path, _ in jax.tree.leaves_with_path(state.params)):
        variables = scanned(variables)
    arrays = weights.flat(variables)
    if transfer.head != "keep":
        arrays = {name: array for name, array in arrays.items() if not name.startswith(HEAD)}
    if transfer.head == "zero":
        arrays[f"{HEAD}kernel"] = np.zeros(state.params["head"]["kernel"].shape, np.float32)

    def placed(path: Any, leaf: Any) -> Any:
        array = arrays.get(path_name(path))
        if array is None:
            return leaf
        # A copy: a buffer is donated once.
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: np.array(array[index], leaf.dtype)
        )

    own = {"params": state.params, "batch_stats": state.batch_stats}
    average = None if state.average is None else jax.tree.map_with_path(placed, state.average)
    return state._replace(**jax.tree.map_with_path(placed, own), average=average)


def statistics(config: Config, own: Statistics, image_shape: Sequence[int]) -> Statistics:
    """Of the data, or under `data.normalization=weights` those that the weights were trained with.

    Raises:
      UserError: the weights know none, or they are those of images of another size.
    """
    if config.data.normalization != "weights":
        return own
    folder = Path(str(config.transfer.weights))
    if not weights.is_weights_folder(folder):
        raise UserError(
            f"transfer.weights={folder}: a run keeps no statistics of its images; set "
            "data.normalization=channel, or import the run first: "
            f"`resjax import {folder} --out=DIR`"
        )
    theirs = _adapted(weights.load(folder), image_shape[2]).statistics
    for array in (theirs.mean, theirs.std):
        if array.shape[:-1] not in ((), tuple(image_shape[:2])):
            size = " x ".join(map(str, array.shape[:2]))
            raise UserError(
                f"transfer.weights={folder} were trained on images of {size} pixels less their "
                f"mean image, and these are {image_shape[0]} x {image_shape[1]}; set "
                "data.normalization=channel"
            )
    return own._replace(mean=theirs.mean, std=theirs.std)


def origin(config: Config) -> dict[str, Any]:
    """Where the weights come from, for the provenance of what is made of them."""
    if config.transfer.weights is None:
        return {}
    folder = Path(config.transfer.weights)
    source = load(folder).source
    if weights.is_weights_folder(folder):
        arrays = disk.digest(folder / weights.ARRAYS)
        source = {"folder": str(folder), "sha256": arrays, "source": dict(source)}
    return {"weights": dict(source)}


def load(folder: Path) -> Weights:
    """The weights of a weights folder, or of a run's newest checkpoint that verifies.

    Of a run they are the averaged ones, where it kept an average.

    Raises:
      UserError: there are none, or they are damaged.
    """
    return weights.load(folder) if weights.is_weights_folder(folder) else _of_run(folder)


def _of_run(folder: Path) -> Weights:
    # A checkpoint is a state, of which the step knows; and the step starts from here.
    from resjax.train.checkpoint_reader import CheckpointReader, read_checkpoint

    for step in reversed(CheckpointReader(folder / "checkpoints").steps()):
        checkpoint = folder / "checkpoints" / str(step)
        try:
            arrays, _ = read_checkpoint(checkpoint)
            break
        except disk.DamagedError:
            continue
    else:
        raise UserError(f"transfer.weights={folder}: the run has no checkpoint that is whole")
    prefix = "average/" if any(name.startswith("average/") for name in arrays) else ""
    found = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith((f"{prefix}params/", f"{prefix}batch_stats/"))
    }
    variables = unrolled(weights.nested(found))
    config = run_files.read_config(folder / "config.json")
    kernel = variables["params"]["stem"]["Conv_0"]["kernel"]
    size = config["data"].get("image_size") or 0
    return Weights(
        model={**config["model"], "classes": len(variables["params"]["head"]["bias"])},
        variables=variables,
        statistics=Statistics(np.zeros((), np.float32), np.ones((), np.float32)),
        preprocessing=Preprocessing(size, size, channels=kernel.shape[2]),
        source={"folder": str(checkpoint), "sha256": disk.digest(checkpoint / disk.CHECKSUMS)},
    )


def _adapted(found: Weights, channels: int) -> Weights:
    """Weights whose first convolution takes images of so many channels."""
    if found.preprocessing.channels == channels:
        return found
    from resjax.transfer.surgery import with_channels

    return with_channels(found, channels)


def _shapes(variables: Variables) -> dict[str, tuple[int, ...]]:
    """Of every array in the unrolled layout, from variables or shapes in either."""
    sizes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(variables)}
    return {
        path: sizes[name] if paths == (name,) else sizes[name][1:]
        for name, paths in unrolled_paths(variables).items()
        for path in paths
    }


def _differences(
    there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]], aside: Sequence[str]
) -> Iterator[str]:
    for name in sorted(there.keys() | here.keys()):
        if name.startswith(tuple(aside)):
            continue
        if name not in here:
            yield f"{name} is only there"
        elif name not in there:
            yield f"{name} is missing there"
        elif there[name] != here[name]:
            yield f"{name} is {there[name]} there and {here[name]} here"
