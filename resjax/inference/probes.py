"""How much features tell of the classes: a linear probe, and the nearest neighbours.

The probe is logistic regression on standardised features, its L2 penalty chosen on a validation
part, as Kornblith et al. 2019 (arXiv 1805.08974) do. Neighbours vote by their cosine similarity, as
in Wu et al. 2018 (arXiv 1805.01978), whose 200 neighbours and temperature are the defaults.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from resjax.data.user_data import hold_out_fifth
from resjax.errors import UserError
from resjax.inference.features import Features

PENALTIES = np.logspace(1, -6, 8)  # on half the squared norm, beside the mean loss
NEIGHBOURS, TEMPERATURE = 200, 0.07
CHUNK = 1024  # test images whose similarities to all training images are held at once

Values = Float[np.ndarray, "n d"]
Labels = Int[np.ndarray, "n"]


def linear_probe(train: Values, labels: Labels, test: Values) -> Labels:
    """Classes of `test` by logistic regression.

    The last fifth of every class of `train` chooses the penalty, the largest of equally good ones;
    then all of `train` counts.

    Raises:
      UserError: there is one class only, or none has two examples.
    """
    if len(np.unique(labels)) < 2:
        raise UserError("a linear probe needs features of two classes or more")
    first, validation = hold_out_fifth(labels)
    if not len(validation):
        raise UserError("a linear probe needs two examples of a class, to choose its penalty")
    errors = [
        np.mean(fitted(train[first], labels[first], each)(train[validation]) != labels[validation])
        for each in PENALTIES
    ]
    return fitted(train, labels, PENALTIES[int(np.argmin(errors))])(test)


def fitted(values: Values, labels: Labels, penalty: float) -> Callable[[Values], Labels]:
    """What tells classes by logistic regression, learned under a penalty (of `PENALTIES`)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # scikit-learn weighs the sum of the losses, not the penalty on the mean.
    regression = LogisticRegression(C=1 / (penalty * len(values)), max_iter=1000)
    with warnings.catch_warnings():
        # Of separable classes the weights grow for ever under the least penalties.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return make_pipeline(StandardScaler(), regression).fit(values, labels).predict


def nearest_neighbours(
    train: Values,
    labels: Labels,
    test: Values,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Labels:
    """Classes of `test` by the votes of the most similar features of `train`.

    A neighbour's vote weighs exp(cosine / temperature).

    Args:
      train: features.
      labels: of them.
      test: features.
      neighbours: that vote; all, where there are fewer.
      temperature: the lower, the more the nearest count.
    """
    among, count = _unit(train), min(neighbours, len(train))
    voters = np.eye(labels.max() + 1)[labels]

    def chosen(rows: Values) -> Labels:
        cosines = _unit(rows) @ among.T
        near = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        # Relative to 1, the largest cosine, so that no exponential overflows.
        votes = np.exp((np.take_along_axis(cosines, near, 1) - 1) / temperature)
        return np.einsum("nk,nkc->nc", votes, voters[near]).argmax(1)

    parts = [chosen(test[start : start + CHUNK]) for start in range(0, len(test), CHUNK)]
    return np.concatenate(parts)


def _unit(values: Values) -> Values:
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.maximum(norms, np.finfo(values.dtype).tiny)


KINDS: dict[str, Callable[[Values, Labels, Values], Labels]] = {
    "linear": linear_probe,
    "knn": nearest_neighbours,
}


def probe(train: Features, test: Features, kind: str = "linear") -> dict[str, Any]:
    """The error on `test` of classes that are learned from the features of `train`.

    Args:
      train: with labels.
      test: with labels, of the same network and classes.
      kind: a key of `KINDS`.

    Returns:
      `train_images`, `test_images`, and `test_error`, a fraction.

    Raises:
      UserError: they do not go together, have no labels, or are too few.
    """
    if train.labels is None or test.labels is None:
        which = "training" if train.labels is None else "test"
        raise UserError(f"the {which} features have no labels; make them with --data=NAME")
    if not (np.isfinite(train.values).all() and np.isfinite(test.values).all()):
        raise UserError("the features hold what is no finite number")
    if train.class_names != test.class_names:
        raise UserError("the two files' features are of different classes")
    widths = train.values.shape[1], test.values.shape[1]
    if len(set(widths)) > 1:
        raise UserError(
            f"the training features have {widths[0]} numbers an image, the test features "
            f"{widths[1]}; make both with one network and stage"
        )
    found = KINDS[kind](train.values, train.labels, test.values)
    return {
        "train_images": len(train.values),
        "test_images": len(test.values),
        "test_error": float(np.mean(found != test.labels)),
    }
