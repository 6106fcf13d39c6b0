"""A state goes to disk and comes back as it was."""

import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resjax.disk import CHECKSUMS
from resjax.errors import UserError
from resjax.train.checkpoints import KEEP_LATEST, CheckpointManager
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
    opened = CheckpointManager(tmp_path / "checkpoints")
    yield opened
    opened.close()


def bits(state):
    """Dtype, shape and bytes of every array."""
    plain = state._replace(key=jax.random.key_data(state.key))
    arrays = map(np.asarray, jax.tree.leaves(plain))
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def test_a_state_comes_back_bit_by_bit_in_another_process_s_manager(tmp_path):
    state = state_at(7)
    writer = CheckpointManager(tmp_path / "checkpoints")
    writer.save(state, 7, RECORD)
    writer.close()
    reader = CheckpointManager(tmp_path / "checkpoints")
    restored = reader.restore(lambda _: state_at(0, seed=1)).state
    reader.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)


def test_a_restored_key_draws_what_the_saved_one_would_have(checkpoints):
    state = state_at(7)
    checkpoints.save(state, 7, RECORD)
    restored = checkpoints.restore(lambda _: state_at(0, seed=1)).state
    assert restored.key.dtype == state.key.dtype
    np.testing.assert_array_equal(*(jax.random.bits(s.key, (8,)) for s in (state, restored)))


def test_the_newest_are_kept_and_the_newest_of_them_is_restored(checkpoints, tmp_path):
    steps = (2, 4, 6, 8)
    for step in steps:
        checkpoints.save(state_at(step), step, RECORD)
    assert checkpoints.restore(state_at).step == 8
    checkpoints.close()
    kept = sorted(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == list(steps[-KEEP_LATEST:])


def test_where_nothing_was_saved_there_is_nothing_to_restore(checkpoints):
    assert checkpoints.restore(state_at) is None


def test_a_saved_state_may_be_donated_at_once(checkpoints):
    state, expected = state_at(2), bits(state_at(2))
    checkpoints.save(state, 2, RECORD)
    jax.tree.map(lambda array: array.delete(), state)
    assert bits(checkpoints.restore(state_at).state) == expected


def test_a_folder_relative_to_the_working_directory_is_as_good(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = CheckpointManager((tmp_path / "checkpoints").relative_to(tmp_path))
    relative.save(state_at(2), 2, RECORD)
    relative.close()
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_a_checkpoint_of_another_network_is_refused_with_what_differs(checkpoints):
    checkpoints.save(state_at(2), 2, RECORD)
    like = state_at(0)
    like.params["conv"]["kernel"] = jnp.zeros((3, 3, 2, 8))
    like.params["head"]["kernel"] = like.params["head"].pop("bias")
    with pytest.raises(UserError) as raised:
        checkpoints.restore(lambda _: like)
    told = str(raised.value)
    assert "checkpoints/2 holds another network: " in told
    assert "params/conv/kernel is (3, 3, 2, 4) float32 there and (3, 3, 2, 8) float32" in told
    assert "params/head/bias is only there" in told
    assert "params/head/kernel is missing there" in told
    assert "\n" not in told


def test_the_best_stays_beside_the_newest(checkpoints, tmp_path):
    metrics = ""
    for step, error in ((2, 0.5), (4, 0.1), (6, 0.3), (8, 0.4), (10, 0.2)):
        metrics += json.dumps({"step": step, "split": "test", "loss": 1.0, "error": error}) + "\n"
        checkpoints.save(state_at(step), step, {"metrics": metrics})
    checkpoints.wait()
    assert checkpoints.steps() == [4, 8, 10]
    assert checkpoints.chosen("best", state_at).step == 4
    assert checkpoints.chosen("last", state_at).step == 10


def test_sha256sum_understands_the_seal(checkpoints, tmp_path):
    checkpoints.save(state_at(2), 2, RECORD)
    checkpoints.wait()
    folder = tmp_path / "checkpoints" / "2"
    assert {line.split("  ")[1] for line in (folder / CHECKSUMS).read_text().splitlines()} == {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != CHECKSUMS
    }
    subprocess.run(["sha256sum", "--check", "--quiet", CHECKSUMS], cwd=folder, check=True)
