"""What does not fit into memory is refused in one line, with a batch that does fit."""

import re

import jax
import pytest

from resjax.errors import UserError
from resjax.train import memory
from resjax.train.loop import train
from resjax.train.step import Program

MEBI = 2**20


@pytest.fixture
def room(monkeypatch):
    """A function that sets how many bytes a device has."""
    return lambda limit: monkeypatch.setattr(memory, "device_memory", lambda: limit)


def peak(config, field):
    program = Program(config)
    state = program.init(0)
    if field == "batch_size":
        return program.compiled(state, 3).peak_bytes
    return program.compiled_evaluation(state).peak_bytes


@pytest.mark.parametrize("field", ["batch_size", "eval_batch_size"])
def test_a_batch_too_large_is_refused_with_one_that_fits(configure, room, tmp_path, field, request):
    if field == "batch_size":  # of which a network of one layer needs most, and compiles in no time
        request.getfixturevalue("regression")
    config = configure({f"data.{field}": 5_000 if field == "batch_size" else 360})
    whole = peak(config, field)
    room(whole // 2)
    small = {"batch_size": "eval_batch_size", "eval_batch_size": "batch_size"}[field]
    config = configure({f"data.{field}": getattr(config.data, field), f"data.{small}": 8})
    with pytest.raises(UserError, match="needs") as refusal:
        train(config, tmp_path / "run")
    told = str(refusal.value)
    assert "\n" not in told
    assert f"data.{field}={getattr(config.data, field)} needs {whole / 2**30:.2f} GiB" in told
    fits = int(re.search(r"; (\d+) fits$", told)[1])
    assert peak(configure({f"data.{field}": fits}), field) <= whole // 2
    assert peak(configure({f"data.{field}": int(1.4 * fits)}), field) > whole // 2
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("regression")  # compiles in no time
def test_where_nothing_fits_the_batch_is_not_to_blame(configure, room, tmp_path):
    room(1000)
    with pytest.raises(UserError, match="no smaller one fits either; a narrower network might"):
        train(configure({"data.batch_size": 48}), tmp_path / "run")


@pytest.mark.usefixtures("regression")  # compiles in no time
def test_the_size_that_fits_divides_among_the_accumulated_parts(configure, room, tmp_path):
    config = configure({"data.batch_size": 3_000, "train.accumulation_steps": 3})
    room(peak(config, "batch_size") // 2)
    with pytest.raises(UserError, match="fits") as refusal:
        train(config, tmp_path / "run")
    assert int(re.search(r"; (\d+) fits$", str(refusal.value))[1]) % 3 == 0


def test_a_cpu_has_the_memory_that_the_system_has_left():
    if jax.local_devices()[0].memory_stats():
        pytest.skip("the device counts its own")
    assert 100 * MEBI < memory.device_memory() < 2**45


def test_what_the_allocator_refuses_is_told_in_one_line(configure, room, tmp_path):
    room(None)  # as where nobody says how much there is
    config = configure({"data.batch_size": 300_000_000, "data.crop_padding": 0})
    with pytest.raises(UserError, match=r"has no room: .*Out of memory") as told:
        train(config, tmp_path / "run")
    assert "lower data.batch_size=300000000, or" in str(told.value)
    assert "\n" not in str(told.value)
