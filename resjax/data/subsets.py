"""Parts of a dataset that is here whole: some of its classes, a few training examples of each."""

from collections.abc import Sequence

import numpy as np

from resjax.data.examples import DataError, Split


def of_classes(split: Split, classes: Sequence[int]) -> Split:
    """The examples of some classes, in the split's order; the first of `classes` becomes class 0.

    Args:
      split: with labels from 0.
      classes: numbers of classes, each once.

    Raises:
      DataError: the split has no example of them.
    """
    kept = np.isin(split.labels, classes)
    if not kept.any():
        numbers = ", ".join(map(str, classes))
        raise DataError(f"data.classes: the split has no example of the classes {numbers}")
    renumbered = np.argsort(classes)[np.searchsorted(np.sort(classes), split.labels[kept])]
    return Split(split.images[kept], renumbered.astype(split.labels.dtype))


def few(split: Split, per_class: int, draw: int, class_names: Sequence[str]) -> Split:
    """As many examples of every class, drawn at random, in the split's order.

    The draw depends on nothing but its number and the split's labels; of two with the same number
    the larger holds the smaller.

    Args:
      split: with a label for every name.
      per_class: examples of a class.
      draw: number of the draw, from 0.
      class_names: one a class.

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
        generator = np.random.default_rng((draw, label))
        chosen.append(generator.permutation(members)[:per_class])
    rows = np.sort(np.concatenate(chosen))
    return Split(split.images[rows], split.labels[rows])
