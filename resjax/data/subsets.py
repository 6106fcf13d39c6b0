"""Subsets of a loaded dataset: some of its classes, a few training examples of each."""

from collections.abc import Sequence

import numpy as np

from resjax.data.examples import DataError, Split
from resjax.errors import first_few


def class_indices(name: str, class_names: Sequence[str], classes: Sequence[int | str]) -> list[int]:
    """Returns the indices of classes that a user named.

    A string is a name. A number is a name too if any class of the dataset is named by a number,
    else an index from 0: 2 is the class "2" of a folder with classes "0" to "11", whose names are
    sorted 0, 1, 10, 11, 2, ..., and the third class of one with classes "bird", "cat", "dog".

    Raises:
      DataError: there is no such class, or one is named twice.
    """
    by_name = {each: index for index, each in enumerate(class_names)}
    numbered = any(each.isdecimal() for each in class_names)
    indices = []
    for each in classes:
        if isinstance(each, str) or numbered:
            index = by_name.get(str(each))
        else:
            index = each if each < len(class_names) else None
        if index is None:
            known = first_few(class_names, 10)
            numbers = "" if numbered else f" (or 0 to {len(class_names) - 1})"
            raise DataError(f"data.classes: {name} has no class {each}, only {known}{numbers}")
        if index in indices:
            raise DataError(f"data.classes: {each} names the class {class_names[index]!r} twice")
        indices.append(index)
    return indices


def select_classes(split: Split, classes: Sequence[int], class_names: Sequence[str]) -> Split:
    """Returns the examples of some classes in their order, relabeled by position in `classes`.

    Args:
      split: the images and labels.
      classes: the labels to select.
      class_names: of all classes.

    Raises:
      DataError: the split has no example of these classes.
    """
    selected = np.isin(split.labels, classes)
    if not selected.any():
        names = ", ".join(class_names[label] for label in classes)
        raise DataError(f"data.classes: the split has no example of the classes {names}")
    relabeled = np.argsort(classes)[np.searchsorted(np.sort(classes), split.labels[selected])]
    return Split.labeled(split.images[selected], relabeled.astype(split.labels.dtype))


def sample_per_class(split: Split, per_class: int, seed: int, class_names: Sequence[str]) -> Split:
    """Returns `per_class` random examples of each class, in the split's order.

    The sample depends only on the seed and the split's labels, and a larger sample with the same
    seed contains the smaller ones.

    Raises:
      DataError: a class has fewer examples.
    """
    chosen = []
    for label, name in enumerate(class_names):
        members = np.flatnonzero(split.labels == label)
        if len(members) < per_class:
            raise DataError(
                f"data.per_class={per_class}: class {name!r} has {len(members)} training examples"
            )
        generator = np.random.default_rng((seed, label))
        chosen.append(generator.permutation(members)[:per_class])
    rows = np.sort(np.concatenate(chosen))
    return split[rows]
