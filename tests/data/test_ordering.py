"""The order of examples: every example once per epoch, the same batches after a resume."""

import jax
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resjax.data.ordering import EpochOrder, batch_indices
from resjax.xla.compile_options import quick_compile

compiled = jax.jit(
    batch_indices,
    static_argnames=("steps", "batch_size", "examples"),
    compiler_options=quick_compile(),
)


def batches(first_step, steps, batch_size, examples, seed=0):
    indices = compiled(jax.random.key(seed), first_step, steps, batch_size, examples)
    assert indices.shape == (steps, batch_size)
    return np.asarray(indices)


@settings(max_examples=8, deadline=None)  # each compiles
@given(st.integers(1, 40), st.integers(1, 30))
@example(batch_size=7, examples=7)
def test_an_epoch_contains_every_example_exactly_once(batch_size, examples):
    epochs = 3
    steps = -(-epochs * examples // batch_size)
    indices = batches(0, steps, batch_size, examples).ravel()[: epochs * examples]
    for epoch in indices.reshape(epochs, examples):
        assert sorted(epoch) == list(range(examples))


@settings(max_examples=6, deadline=None)  # each compiles twice
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 30))
@example(steps=3, batch_size=7, examples=7)
def test_batches_from_any_step_on_are_those_of_the_whole_run(steps, batch_size, examples):
    whole = batches(0, 30, batch_size, examples)
    for first_step in range(30 - steps):
        part = batches(first_step, steps, batch_size, examples)
        assert (part == whole[first_step : first_step + steps]).all()


def test_epochs_and_runs_have_different_orders():
    first, second = batches(0, 2, 50, 50)
    other, _ = batches(0, 2, 50, 50, seed=1)
    assert (first != second).any()
    assert (first != other).any()


def test_every_permutation_occurs():
    epochs = batches(0, 120, 3, 3)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6


@settings(max_examples=8, deadline=None)  # each compiles
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 50))
@example(batch_size=7, examples=7, first_step=3)
def test_the_order_on_the_host_is_that_on_the_devices(batch_size, examples, first_step):
    steps = 6
    order = EpochOrder(jax.random.key(0), examples)
    positions = [(first_step + step) * batch_size for step in range(steps)]
    found = np.stack([order(position, batch_size) for position in positions])
    assert (found == batches(first_step, steps, batch_size, examples)).all()


def test_the_order_has_not_changed():
    # Another order would change the curve of every run.
    assert EpochOrder(jax.random.key(7), 10)(5, 10).tolist() == [6, 8, 3, 0, 5, 6, 8, 0, 4, 1]
