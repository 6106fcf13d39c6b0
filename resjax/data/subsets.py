"""Subsets of a loaded dataset: some of its classes, a few training examples of each."""

from collections.abc import Sequence

import numpy as np

from resjax.data.examples import DataError, Split


def select_classes(split: Split, classes: Sequence[int]) -> Split:
    """Returns the examples of some classes in their order, relabeled by position in `classes`.

    Raises:
      DataError: the split has no example of these classes.
    """
    selected = np.isin(split.labels, classes)
    if not selected.any():
        numbers = ", ".join(map(str, classes))
        raise DataError(f"data.classes: the split has no example of the classes {numbers}")
    relabeled = np.argsort(classes)[np.searchsorted(np.sort(classes), split.labels[selected])]
    return Split(split.images[selected], relabeled.astype(split.labels.dtype))


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
    return Split(split.images[rows], split.labels[rows])
