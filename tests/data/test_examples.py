"""Split expressions select what TFDS documents."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resjax.data.datasets import DataError, open_dataset
from resjax.data.examples import ArrayExamples, Slices, Split, select


def row(count, name="train"):
    return ArrayExamples(
        Split.labeled(np.zeros((count, 1, 1, 1), np.uint8), np.arange(count)), name
    )


@settings(deadline=None)  # the first imports TFDS
@given(st.integers(1, 300), st.integers(0, 100))
def test_complementary_slices_are_disjoint_and_complete(count, percent):
    cut = []
    for expression in (f"train[:{percent}%]", f"train[{percent}%:]"):
        with contextlib.suppress(DataError):  # one of them may be empty
            cut += select(expression, {"train": row(count)}).parts
    indices = [index for _, start, stop in cut for index in range(start, stop)]
    assert indices == list(range(count))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("train", [("train", 0, 1437)]),
        ("train[:90%]", [("train", 0, 1293)]),
        ("train[-100:]", [("train", 1337, 1437)]),
        ("train[10:20]+test", [("train", 10, 20), ("test", 0, 360)]),
        ("train[:0]+test", [("test", 0, 360)]),
        ("all", [("train", 0, 1437), ("test", 0, 360)]),
    ],
)
def test_expressions_mean_what_tfds_documents(expression, expected):
    selected = select(expression, {"train": row(1437), "test": row(360, "test")})
    assert [(examples.name, *bounds) for examples, *bounds in selected.parts] == expected


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted), min_size=1))
def test_slices_are_concatenated(bounds):
    examples = row(9)
    joined = Slices(tuple((examples, start, stop) for start, stop in bounds))
    expected = [index for start, stop in bounds for index in range(start, stop)]
    assert len(joined) == len(expected)
    assert [joined[index].targets["label"] for index in range(len(joined))] == expected
    for beyond in (-1, len(joined)):
        with pytest.raises(IndexError):
            joined[beyond]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("train[:0]", "split 'train[:0]' is empty"),
        ("trian", "split 'trian': ValueError: Unknown split 'trian'.*; the splits are train, test"),
        ("train[:x]", "split 'train[:x]': "),
        ("train[:2000]", "split 'train[:2000]': "),
    ],
)
def test_an_impossible_expression_is_an_error(expression, message):
    with pytest.raises(DataError, match=message.replace("[", r"\[")) as refused:
        open_dataset("digits", expression)
    assert "\n" not in str(refused.value)


def test_the_origin_of_an_example_is_its_index_in_the_whole_split():
    opened = open_dataset("digits", "train[:90%]", "train[90%:]")
    assert opened.test[0].origin == "digits train[1293]"
    whole = open_dataset("digits").train
    assert (opened.test[0].image == whole[1293].image).all()
