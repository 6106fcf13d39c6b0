"""Measures how well features separate the classes: linear probes and nearest neighbors.

The linear probe is a logistic regression on standardized features with an L2 penalty chosen on a
validation split, as in Kornblith et al. 2019 (arXiv 1805.08974). Neighbors vote by their cosine
similarity, as in Wu et al. 2018 (arXiv 1805.01978), whose number of neighbors and temperature are
the defaults.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from resjax.data.user_data import hold_out_fifth
from resjax.errors import UserError
from resjax.inference.features import Features
from resjax.inference.images import require_finite

PENALTIES = np.logspace(1, -6, 8)  # factors of half the squared norm, added to the mean loss
NEIGHBORS, TEMPERATURE = 200, 0.07
CHUNK = 1024  # test images whose similarities to all training images are computed at once

Values = Float[np.ndarray, "n d"]
Labels = Int[np.ndarray, "n"]


def linear_probe(train: Values, labels: Labels, test: Values) -> Labels:
    """Predicts the classes of `test` by logistic regression.

    The last fifth of each class of `train` selects the penalty, the largest of equally good ones;
    the regression is then fitted to all of `train`.

    Raises:
      UserError: there is only one class, or none has two examples.
    """
    if len(np.unique(labels)) < 2:
        raise UserError("a linear probe needs features of two classes or more")
    first, validation = hold_out_fifth(labels)
    if not len(validation):
        raise UserError("a linear probe needs a class with two examples, to select its penalty")
    errors = [
        np.mean(fitted(train[first], labels[first], each)(train[validation]) != labels[validation])
        for each in PENALTIES
    ]
    return fitted(train, labels, PENALTIES[int(np.argmin(errors))])(test)


def fitted(values: Values, labels: Labels, penalty: float) -> Callable[[Values], Labels]:
    """Returns the `predict` of a logistic regression that is fitted with one of `PENALTIES`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # scikit-learn scales the sum of the losses instead of the penalty.
    regression = LogisticRegression(C=1 / (penalty * len(values)), max_iter=1000)
    with warnings.catch_warnings():
        # The weights of separable classes grow without bound under the smallest penalties.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return make_pipeline(StandardScaler(), regression).fit(values, labels).predict


def nearest_neighbors(
    train: Values,
    labels: Labels,
    test: Values,
    neighbors: int = NEIGHBORS,
    temperature: float = TEMPERATURE,
) -> Labels:
    """Predicts the classes of `test` by votes of the most similar features of `train`.

    A vote has the weight exp(cosine / temperature).

    Args:
      train: features.
      labels: classes of `train`.
      test: features.
      neighbors: maximum number of votes.
      temperature: lower values favor the nearest neighbors.
    """
    among, count = _unit(train), min(neighbors, len(train))
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
    "knn": nearest_neighbors,
}


def probe(train: Features, test: Features, kind: str = "linear") -> dict[str, Any]:
    """Returns the test error of classes learned from the features of `train`.

    Args:
      train: with labels.
      test: with labels, from the same network and classes.
      kind: a key of `KINDS`.

    Returns:
      `train_images`, `test_images`, and `test_error`, a fraction.

    Raises:
      UserError: their networks or classes differ, they have no labels, or there are too few.
    """
    if train.labels is None or test.labels is None:
        which = "training" if train.labels is None else "test"
        raise UserError(f"the {which} features have no labels; make them with --data=NAME")
    for which, each in (("training features", train), ("test features", test)):
        require_finite(each.values, each.origins, which)
    if train.class_names != test.class_names:
        raise UserError("the two files' features are of different classes")
    widths = train.values.shape[1], test.values.shape[1]
    if len(set(widths)) > 1:
        raise UserError(
            f"the training features have {widths[0]} numbers per image, the test features "
            f"{widths[1]}; make both with one network and stage"
        )
    found = KINDS[kind](train.values, train.labels, test.values)
    return {
        "train_images": len(train.values),
        "test_images": len(test.values),
        "test_error": float(np.mean(found != test.labels)),
    }
