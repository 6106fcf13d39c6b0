"""Probes: what they find in features of digits, and where the truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resjax.cli import main
from resjax.errors import UserError
from resjax.inference.features import Features, features, of_dataset, save_features
from resjax.inference.probes import PENALTIES, fitted, linear_probe, nearest_neighbors, probe


@pytest.fixture(scope="module")
def parts(weights):
    """Features of the training and the test digits."""
    return tuple(features(weights, of_dataset("digits", split)) for split in ("train", "test"))


@pytest.mark.parametrize(("kind", "most"), [("linear", 0.25), ("knn", 0.35)])
def test_features_of_a_network_separate_digits(parts, kind, most):
    assert probe(*parts, kind)["test_error"] <= most


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_features_of_noise_separate_nothing(parts, kind):
    generator = np.random.default_rng(0)
    noise = [
        part._replace(values=generator.normal(size=part.values.shape).astype(np.float32))
        for part in parts
    ]
    assert probe(*noise, kind)["test_error"] > 0.8


@settings(max_examples=5)  # a probe is eight fits
@given(st.integers(0, 2**32 - 1))
def test_scale_and_offset_of_features_do_not_matter_to_the_linear_probe(seed):
    generator = np.random.default_rng(seed)
    labels = np.arange(30) % 3
    values = generator.normal(size=(30, 4)) + 4 * np.eye(3, 4)[labels]
    scale, offset = generator.uniform(0.5, 20, 4), generator.normal(size=4)
    plain = linear_probe(values, labels, values)
    moved = linear_probe(values * scale + offset, labels, values * scale + offset)
    assert np.mean(plain != moved) <= 1 / 30  # an example between two classes may fall either way


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_neighbors_vote_as_the_paper_says(seed, neighbors):
    generator = np.random.default_rng(seed)
    train, test = generator.normal(size=(30, 4)), generator.normal(size=(5, 4))
    labels = np.append(generator.integers(0, 3, 29), 2)
    expected = []
    for row in test:
        cosines = [row @ v / np.linalg.norm(row) / np.linalg.norm(v) for v in train]
        votes = np.zeros(3)
        for index in np.argsort(cosines)[::-1][:neighbors]:
            votes[labels[index]] += np.exp(cosines[index] / 0.5)
        expected.append(votes.argmax())
    found = nearest_neighbors(train, labels, test, neighbors, temperature=0.5)
    assert found.tolist() == expected


def test_the_selected_penalty_generalizes():
    """Four numbers tell a little of the class; the least penalty would fit the noise of others."""
    generator = np.random.default_rng(0)

    def drawn(count):
        labels = np.arange(count) % 2
        values = generator.normal(size=(count, 41))
        values[:, :4] += 1.2 * labels[:, None]
        return values, labels

    (values, labels), (test, truth) = drawn(200), drawn(1000)
    error = np.mean(linear_probe(values, labels, test) != truth)
    assert error <= np.mean(fitted(values, labels, PENALTIES[-1])(test) != truth) - 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "training features have no labels"),
        ({"class_names": ("a", "b")}, "of different classes"),
        ({"values": np.zeros((4, 3), np.float32)}, "have 3 numbers per image, the test features 2"),
        ({"values": np.full((4, 2), np.nan, np.float32)}, "training features of a are not finite"),
        ({"labels": np.zeros(4, np.int32)}, "two classes or more"),
        ({"values": np.zeros((2, 2), np.float32), "labels": np.arange(2)}, "two examples"),
    ],
)
def test_features_that_do_not_match_are_refused(changes, message):
    names = ("x", "y")
    whole = Features(np.eye(4, 2, dtype=np.float32), tuple("abcd"), np.arange(4) % 2, names)
    with pytest.raises(UserError, match=message):
        probe(whole._replace(**changes), whole)


def test_the_command_prints_the_error(parts, tmp_path, capsys):
    for name, part in zip(("train.npz", "test.parquet"), parts, strict=True):
        save_features(part, tmp_path / name)
    typed = ["probe", str(tmp_path / "train.npz"), str(tmp_path / "test.parquet"), "--kind=knn"]
    assert main(typed) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed["train_images"] == "1,437"
    assert float(printed["test_error"]) == pytest.approx(
        probe(*parts, "knn")["test_error"], rel=1e-3
    )
