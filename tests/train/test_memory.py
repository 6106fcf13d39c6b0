"""A run that does not fit into memory is refused in one line, with a batch size that fits."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from resjax.errors import UserError
from resjax.train import memory
from resjax.train.loop import train
from resjax.train.trainer import Dispatch, Trainer

MEBI = 2**20


@pytest.fixture
def memory_limit(monkeypatch):
    """A function that sets how many bytes a device has."""
    return lambda limit: monkeypatch.setattr(memory, "device_memory", lambda: limit)


def peak(config, field):
    trainer = Trainer(config)
    state = trainer.init(0)
    if field == "batch_size":
        return trainer.compile_dispatch(state, Dispatch(0, 3)).peak_bytes
    return trainer.compile_evaluation(state).peak_bytes


@pytest.mark.parametrize("field", ["batch_size", "eval_batch_size"])
def test_a_batch_that_is_too_large_is_refused_with_a_size_that_fits(
    configure, memory_limit, tmp_path, field, request
):
    if field == "batch_size":  # a network of one layer compiles in no time
        request.getfixturevalue("regression")
    config = configure({f"data.{field}": 1_400 if field == "batch_size" else 360})
    whole = peak(config, field)
    memory_limit(whole // 2)
    small = {"batch_size": "eval_batch_size", "eval_batch_size": "batch_size"}[field]
    config = configure({f"data.{field}": getattr(config.data, field), f"data.{small}": 8})
    with pytest.raises(UserError, match="needs") as refusal:
        train(config, tmp_path / "run")
    message = str(refusal.value)
    assert "\n" not in message
    assert f"data.{field}={getattr(config.data, field)} needs {whole / 2**30:.2f} GiB" in message
    fits = int(re.search(r"; (\d+) fits$", message)[1])
    assert peak(configure({f"data.{field}": fits}), field) <= whole // 2
    assert peak(configure({f"data.{field}": int(1.4 * fits)}), field) > whole // 2
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("regression")  # compiles in no time
def test_if_no_batch_size_fits_a_narrower_network_or_remat_is_suggested(
    configure, memory_limit, tmp_path
):
    memory_limit(1000)
    with pytest.raises(UserError, match="no smaller one fits either; try a narrower network"):
        train(configure({"data.batch_size": 48}), tmp_path / "run")


@pytest.mark.usefixtures("regression")  # compiles in no time
def test_the_size_that_fits_divides_among_the_accumulated_parts(configure, memory_limit, tmp_path):
    config = configure({"data.batch_size": 1_200, "train.accumulation_steps": 3})
    memory_limit(peak(config, "batch_size") * 7 // 8)
    with pytest.raises(UserError, match="fits") as refusal:
        train(config, tmp_path / "run")
    assert int(re.search(r"; (\d+) fits$", str(refusal.value))[1]) % 3 == 0


def test_a_cpu_has_the_memory_that_the_system_reports_as_available():
    if jax.local_devices()[0].memory_stats():
        pytest.skip("the device counts its own")
    if not Path("/proc/meminfo").exists():
        pytest.skip("only Linux reports it")
    assert 100 * MEBI < memory.device_memory() < 2**45


@pytest.mark.usefixtures("regression")
@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory on HBM, the total memory required for HLO temporaries (2.00G) exceeds "
        "available HBM (1.00G).",
        "Ran out of memory in memory space hbm. Used 2.00G of 1.00G hbm. Exceeded hbm capacity by "
        "1.00G.",
    ],
)
def test_a_program_that_the_compiler_of_tpus_refuses_is_refused_like_any_other(
    configure, memory_limit, monkeypatch, message
):
    memory_limit(2**30)
    compile_dispatch = Trainer.compile_dispatch

    def refuse(trainer, *arguments):
        if trainer.config.data.batch_size > 200:
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")
        return compile_dispatch(trainer, *arguments)

    monkeypatch.setattr(Trainer, "compile_dispatch", refuse)
    trainer = Trainer(configure({"data.batch_size": 400}))
    with pytest.raises(UserError) as refusal:
        memory.require_memory(trainer, trainer.init(0), Dispatch(0, 3))
    assert "data.batch_size=400 needs 2.00 GiB" in str(refusal.value)
    assert "and 1.00 GiB are available" in str(refusal.value)
    fits = int(re.search(r"; (\d+) fits$", str(refusal.value))[1])
    assert 100 <= fits <= 200


@pytest.mark.usefixtures("regression")
def test_another_error_of_a_compiler_stays_what_it_is(configure, memory_limit, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")

    memory_limit(2**30)
    monkeypatch.setattr(Trainer, "compile_dispatch", fail)
    trainer = Trainer(configure())
    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault"):
        memory.require_memory(trainer, trainer.init(0), Dispatch(0, 3))


class Immense(nn.Module):
    """A network that needs 67 MB per pixel of an image; sorting keeps XLA from fusing them away."""

    classes: int

    @nn.compact
    def __call__(self, images, train=False):
        pixels = images.reshape(len(images), -1, 1)
        largest = jnp.sort(pixels * jnp.arange(2.0**24))[..., -1]
        return nn.Dense(self.classes, name="head")(largest)


def test_an_error_of_the_allocator_is_one_line_that_suggests_a_smaller_batch(
    configure, memory_limit, with_network, tmp_path
):
    memory_limit(None)  # unknown, so nothing is refused before it is tried
    with_network(Immense)
    config = configure({"data.batch_size": 1_400, "data.crop_padding": 0})
    with pytest.raises(UserError, match=r"is out of memory: .*Out of memory") as refusal:
        train(config, tmp_path / "run")
    assert "lower data.batch_size=1400, or" in str(refusal.value)
    assert "\n" not in str(refusal.value)
