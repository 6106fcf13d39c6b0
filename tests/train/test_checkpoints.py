"""A state goes to disk and comes back as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resjax.train.checkpoints import KEPT, Checkpoints
from resjax.train.step import State

RECORD = {"metrics": ""}


def state_at(step, seed=0):
    """A state with a layer of random numbers, and every dtype that a state can have."""
    key = jax.random.key(seed)
    kernel = jax.random.normal(key, (3, 3, 2, 4))
    return State(
        step=jnp.asarray(step, jnp.int32),
        params={"conv": {"kernel": kernel}, "head": {"bias": jnp.asarray([1e-45, -0.0, jnp.nan])}},
        batch_stats={"norm": {"mean": kernel.mean((0, 1, 2))}},
        optimizer=(jnp.zeros((), jnp.int32), {"trace": kernel.astype(jnp.bfloat16)}),
        average={"params": {"conv": {"kernel": kernel / 3}}},
        key=jax.random.fold_in(key, 1),
        running_error=jnp.float32(0.3),
        warm=jnp.asarray(True),
        diverged=jnp.asarray(False),
    )


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints")
    yield opened
    opened.close()


def bits(state):
    """Dtype, shape and bytes of every array."""
    plain = state._replace(key=jax.random.key_data(state.key))
    arrays = map(np.asarray, jax.tree.leaves(plain))
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def test_a_state_comes_back_bit_by_bit_in_another_process_s_manager(tmp_path):
    state = state_at(7)
    writer = Checkpoints(tmp_path / "checkpoints")
    writer.save(state, 7, RECORD)
    writer.close()
    reader = Checkpoints(tmp_path / "checkpoints")
    restored = reader.restore(state_at(0, seed=1)).state
    reader.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)


def test_a_restored_key_draws_what_the_saved_one_would_have(checkpoints):
    state = state_at(7)
    checkpoints.save(state, 7, RECORD)
    restored = checkpoints.restore(state_at(0, seed=1)).state
    assert restored.key.dtype == state.key.dtype
    np.testing.assert_array_equal(*(jax.random.bits(s.key, (8,)) for s in (state, restored)))


def test_the_newest_are_kept_and_the_newest_of_them_is_restored(checkpoints, tmp_path):
    steps = (2, 4, 6, 8)
    for step in steps:
        checkpoints.save(state_at(step), step, RECORD)
    assert checkpoints.restore(state_at(0)).step == 8
    checkpoints.close()
    kept = sorted(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == list(steps[-KEPT:])


def test_where_nothing_was_saved_there_is_nothing_to_restore(checkpoints):
    assert checkpoints.restore(state_at(0)) is None


def test_a_saved_state_may_be_donated_at_once(checkpoints):
    state, expected = state_at(2), bits(state_at(2))
    checkpoints.save(state, 2, RECORD)
    jax.tree.map(lambda array: array.delete(), state)
    assert bits(checkpoints.restore(state_at(0)).state) == expected


def test_a_folder_relative_to_the_working_directory_is_as_good(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = Checkpoints((tmp_path / "checkpoints").relative_to(tmp_path))
    relative.save(state_at(2), 2, RECORD)
    relative.close()
    assert (tmp_path / "checkpoints" / "2").is_dir()
