"""A pytree is saved with its digests and restored bit by bit; the best checkpoint stays."""

import json
import os
import shutil
import subprocess
import threading
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resjax.disk import CHECKSUMS, DamagedError, write_checksums
from resjax.errors import UserError
from resjax.run_files import Metric
from resjax.train import checkpoints as saving
from resjax.train.checkpoint_reader import (
    CheckpointReader,
    evaluation_costs,
    named_arrays,
    read_checkpoint,
)
from resjax.train.checkpoints import KEEP_LATEST, CheckpointManager

ERROR, ACCURACY = Metric("error"), Metric("accuracy", lower_is_better=False)
RECORD = {"metrics": ""}


class State(NamedTuple):
    step: Any
    params: Any
    ema: Any
    opt_state: Any
    key: Any


def state_at(step, seed=0):
    """A state with every dtype that training uses, and numbers that are easily lost."""
    key = jax.random.key(seed)
    kernel = jax.random.normal(key, (3, 3, 2, 4))
    return State(
        step=jnp.asarray(step, jnp.int32),
        params={"conv": {"kernel": kernel}, "head": {"bias": jnp.asarray([1e-45, -0.0, jnp.nan])}},
        ema=None,
        opt_state=({"trace": kernel.astype(jnp.bfloat16)}, {"frozen": ()}),
        key=jax.random.fold_in(key, 1),
    )


@pytest.fixture
def checkpoints(tmp_path):
    manager = CheckpointManager(tmp_path / "checkpoints", ERROR)
    yield manager
    manager.close()


def bits(state):
    """Dtype, shape and bytes of every array by name."""
    arrays = {name: np.asarray(array) for name, array in named_arrays(state).items()}
    return {name: (each.dtype, each.shape, each.tobytes()) for name, each in arrays.items()}


def test_another_manager_restores_a_state_bit_by_bit(checkpoints, tmp_path):
    checkpoints.save(state_at(7), 7, RECORD)
    checkpoints.close()
    reader = CheckpointManager(tmp_path / "checkpoints", ERROR)
    restored = reader.restore_latest(lambda _: state_at(0, seed=1)).state
    reader.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state_at(7))
    assert bits(restored) == bits(state_at(7))


def test_shapes_are_a_template_and_place_what_is_restored(checkpoints):
    state = state_at(7)
    checkpoints.save_and_wait(state, 7, RECORD)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), state
    )
    restored = CheckpointReader(checkpoints.folder).restore_latest(lambda _: shapes).state
    assert bits(restored) == bits(state)
    assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {device}


def test_without_a_template_all_arrays_come_by_name(checkpoints):
    checkpoints.save_and_wait(state_at(7), 7, RECORD)
    arrays = checkpoints.restore_latest(None).state
    assert bits(arrays) == bits(state_at(7))


def test_a_restored_key_draws_the_same_numbers(checkpoints):
    checkpoints.save(state_at(7), 7, RECORD)
    restored = checkpoints.restore_latest(lambda _: state_at(0, seed=1)).state
    assert restored.key.dtype == state_at(7).key.dtype
    np.testing.assert_array_equal(*(jax.random.bits(s.key, (8,)) for s in (state_at(7), restored)))


def test_a_saved_state_may_be_donated_at_once(checkpoints):
    state = state_at(2)
    checkpoints.save(state, 2, RECORD)
    jax.tree.map(lambda array: array.delete(), state)
    assert bits(checkpoints.restore_latest(state_at).state) == bits(state_at(2))


def test_the_newest_checkpoints_are_preserved_and_the_newest_is_restored(checkpoints):
    assert checkpoints.restore_latest(state_at) is None
    for step in (2, 4, 6, 8):
        checkpoints.save(state_at(step), step, RECORD)
    assert checkpoints.restore_latest(state_at).step == 8
    assert checkpoints.steps() == [2, 4, 6, 8][-KEEP_LATEST:]


def evaluations(name, values):
    lines = [{"step": 2 * i + 2, "split": "test", name: each} for i, each in enumerate(values)]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.mark.parametrize(
    ("primary", "values", "best"),
    [(ERROR, [0.5, 0.1, 0.3, 0.1, 0.2, 0.4], 4), (ACCURACY, [0.1, 0.2, None, 0.5, 0.4, 0.3], 8)],
)
def test_the_best_checkpoint_is_preserved_also_after_a_resume(tmp_path, primary, values, best):
    for step in range(2, 14, 2):  # a manager for each save, as after a crash
        manager = CheckpointManager(tmp_path / "checkpoints", primary)
        metrics = evaluations(primary.name, values[: step // 2])
        manager.save(state_at(step), step, {"metrics": metrics})
        manager.close()
    assert manager.steps() == [best, 10, 12]
    assert manager.restore_selected("best", state_at, primary).step == best
    assert manager.restore_selected("last", state_at, primary).step == 12


def test_a_best_checkpoint_that_was_not_kept_is_not_replaced_by_another(checkpoints):
    metrics = evaluations("error", [0.5, 0.1, 0.3, 0.4])
    for step in (6, 8):
        checkpoints.save(state_at(step), step, {"metrics": metrics})
    checkpoints.wait()
    with pytest.raises(UserError) as refused:
        checkpoints.restore_selected("best", state_at, ERROR)
    assert str(refused.value).partition("checkpoints: ")[2] == (
        "the best test error was at step 4 (0.1), and no checkpoint of that step was kept; of "
        "those that were, step 6 (0.3) is the best. Name a step, or train with "
        "train.checkpoint_every equal to train.eval_every"
    )
    assert checkpoints.restore_selected("6", state_at, ERROR).step == 6


def test_without_a_finite_evaluation_none_is_the_best(checkpoints):
    checkpoints.save(state_at(2), 2, {"metrics": evaluations("error", [None])})
    checkpoints.wait()
    with pytest.raises(UserError, match="no test error is finite, so none is the best"):
        checkpoints.restore_selected("best", state_at, ERROR)


def test_an_evaluation_that_is_not_finite_is_never_the_best():
    text = evaluations("error", [None, 0.3, float("inf")]) + evaluations("loss", [1.0])
    assert evaluation_costs(text, ERROR) == {4: 0.3}


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manager = CheckpointManager((tmp_path / "checkpoints").relative_to(tmp_path), ERROR)
    monkeypatch.chdir(tmp_path.parent)
    manager.save(state_at(2), 2, RECORD)
    manager.close()
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_a_checkpoint_of_another_network_is_refused_with_the_differences(checkpoints):
    checkpoints.save(state_at(2), 2, RECORD)
    other = state_at(0)
    other.params["conv"]["kernel"] = jnp.zeros((3, 3, 2, 8))
    other.params["head"]["kernel"] = other.params["head"].pop("bias")
    with pytest.raises(UserError) as raised:
        checkpoints.restore_latest(lambda _: other)
    assert str(raised.value).partition("checkpoints/2 ")[2] == (
        "holds another network: params/conv/kernel is (3, 3, 2, 4) float32 in the checkpoint and "
        "(3, 3, 2, 8) float32 here; params/head/bias is only in the checkpoint; "
        "params/head/kernel is not in the checkpoint"
    )


def snapshots(monkeypatch, folder, kept):
    """Copies `folder` before each change that Python makes in it, as a SIGKILL would leave it."""
    one_at_a_time = threading.RLock()  # Orbax's threads change it too

    def copy_file(source, target):
        with suppress(FileNotFoundError):  # TensorStore has renamed it meanwhile
            shutil.copy2(source, target)

    def hooked(owner, name):
        change = getattr(owner, name)

        def snapshot_and_change(*arguments, **keywords):
            if not any(str(folder) in str(argument) for argument in arguments):
                return change(*arguments, **keywords)
            with one_at_a_time:
                shutil.copytree(folder, kept / str(len(moments)), copy_function=copy_file)
                moments.append(f"{name} {' '.join(map(str, arguments[:2]))}")
                return change(*arguments, **keywords)

        monkeypatch.setattr(owner, name, snapshot_and_change)

    moments = []
    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "open"):
        hooked(os, name)
    return moments


def test_at_every_instant_of_a_save_every_checkpoint_is_whole(tmp_path, monkeypatch):
    folder, kept = tmp_path / "run" / "checkpoints", tmp_path / "kept"
    folder.parent.mkdir()
    kept.mkdir()
    manager = CheckpointManager(folder, ERROR)
    manager.save_and_wait(state_at(2), 2, RECORD)
    moments = snapshots(monkeypatch, folder, kept)
    for step in (4, 6, 8):
        manager.save_and_wait(state_at(step), step, RECORD)
    manager.close()
    monkeypatch.undo()
    found, newest = [], 2
    for copy in sorted(kept.iterdir(), key=lambda path: int(path.name)):
        reader = CheckpointReader(copy)
        for step in reader.steps():
            read_checkpoint(reader.folder / str(step))
        found.append(reader.steps())
        assert reader.steps()[-1] >= newest  # nothing that was committed is lost
        newest = reader.steps()[-1]
    assert [2, 4, 6] in found  # between a commit and the deletion of what it makes superfluous
    for what in ("rename", "replace"):
        assert any(moment.startswith(what) for moment in moments)
    assert len(moments) > 30
    for leftover in (copy for copy in kept.iterdir() if (copy / saving.TRASH).exists()):
        CheckpointManager(leftover, ERROR).close()
        assert not (leftover / saving.TRASH).exists()


def test_files_that_orbax_writes_at_the_commit_may_hold_anything(checkpoints):
    for step in (2, 4):
        checkpoints.save_and_wait(state_at(step), step, RECORD)
        for name in saving.WRITTEN_AT_COMMIT:
            (checkpoints.folder / str(step) / name).write_bytes(b"\xff" * step)
    restored = CheckpointManager(checkpoints.folder, ERROR)
    assert bits(restored.restore_latest(state_at).state) == bits(state_at(4))
    for step in (6, 8):
        restored.save_and_wait(state_at(step), step, RECORD)
    restored.close()
    assert restored.steps() == [6, 8]


def test_sha256sum_accepts_the_list_of_files(checkpoints, tmp_path):
    checkpoints.save_and_wait(state_at(2), 2, RECORD)
    folder = tmp_path / "checkpoints" / "2"
    assert {line.split("  ")[1] for line in (folder / CHECKSUMS).read_text().splitlines()} == {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != CHECKSUMS and path.parent != folder
    }
    subprocess.run(["sha256sum", "--check", "--quiet", CHECKSUMS], cwd=folder, check=True)


def test_an_array_that_is_not_the_saved_one_is_found_by_its_digest_alone(checkpoints, tmp_path):
    checkpoints.save_and_wait(state_at(2), 2, RECORD)
    checkpoints.save_and_wait(state_at(4, seed=1), 4, RECORD)
    newest, other = (tmp_path / "checkpoints" / step for step in ("4", "2"))
    shutil.rmtree(newest / "state")
    shutil.copytree(other / "state", newest / "state")  # sound files with other numbers
    write_checksums(newest, saving.WRITTEN_AT_COMMIT)
    with pytest.raises(DamagedError, match="changed since it was saved"):
        read_checkpoint(newest)
    said = []
    restored = CheckpointReader(tmp_path / "checkpoints", said.append).restore_latest(state_at)
    assert restored.step == 2
    assert "4 is damaged" in said[0]


def test_a_folder_with_other_digits_or_leading_zeros_is_no_checkpoint(tmp_path):
    for name in ("3", "٣", "²", "007", "+4", "1" * 200):
        (tmp_path / name).mkdir()
    assert CheckpointReader(tmp_path).steps() == [3, int("1" * 200)]
