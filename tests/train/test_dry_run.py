"""A dry run says what a run needs, from the programs that the run would compile."""

import re

import jax
import pytest

from resjax.cli import main
from resjax.errors import UserError
from resjax.train import dry_run as module
from resjax.train import memory
from resjax.train.dry_run import dry_run
from resjax.train.plan import plan
from resjax.train.trainer import Trainer


@pytest.fixture
def memory_limit(monkeypatch):
    """A function that sets how many bytes a device has."""

    def limit(size):
        monkeypatch.setattr(memory, "device_memory", lambda: size)
        monkeypatch.setattr(module, "device_memory", lambda: size)

    return limit


def silent(_):
    """Ignores an announcement."""


def peak(config):
    trainer = Trainer(config)
    state = trainer.init(0)
    return trainer.compile_dispatch(state, max(plan(trainer, 0))).peak_bytes


@pytest.mark.usefixtures("regression")  # compiles in no time
def test_memory_is_that_of_the_runs_program_and_a_larger_batch_would_not_fit(
    configure, memory_limit
):
    def resident(size):
        return configure({"data.batch_size": size, "data.feed": "device"})

    limit = peak(resident(400))
    memory_limit(limit)
    needs = dry_run(resident(300), silent)
    expected = peak(resident(300)) / 2**20
    assert needs["memory per device"].startswith(f"{expected:,.0f} MiB for training")
    fits = int(re.search(r"batch_size=(\d+) fits", needs["largest batch"])[1])
    assert peak(resident(fits)) <= limit
    assert peak(resident(int(1.3 * fits))) > limit


@pytest.mark.usefixtures("regression")
def test_no_batch_is_larger_than_the_training_split(configure, memory_limit):
    memory_limit(2**40)
    needs = dry_run(configure(), silent)
    assert needs["largest batch"].startswith("data.batch_size=1437 fits")
    assert "the training split has 1,437 images" in needs["largest batch"]


@pytest.mark.usefixtures("regression")
def test_what_does_not_fit_is_refused_as_a_run_refuses_it(configure, memory_limit):
    memory_limit(1000)
    with pytest.raises(UserError, match=r"data\.batch_size=16 needs .* no smaller one fits either"):
        dry_run(configure({"data.batch_size": 16}), silent)


@pytest.mark.usefixtures("regression")
def test_without_known_memory_nothing_is_said_about_the_largest_batch(configure, memory_limit):
    memory_limit(None)
    needs = dry_run(configure(), silent)
    assert "the device's memory is unknown" in needs["memory per device"]
    assert needs["largest batch"].startswith("unknown")


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.loop": "scan", "model.depth": 14},
        {"train.accumulation_steps": 2},
        {"parallel.backend": "pmap"},
    ],
)
def test_flops_of_a_step_are_three_forward_passes_but_for_the_gradient_of_the_images(
    configure, overrides
):
    config = configure({"data.batch_size": 16, **overrides})
    trainer = Trainer(config)
    stem = trainer.shapes["params"]["stem"]["Conv_0"]["kernel"].size * 8 * 8
    macs = 3 * trainer.counts.macs - stem
    assert trainer.step_flops(trainer.init(0), phase=0) == 2 * 16 * macs


@pytest.mark.usefixtures("regression")
def test_times_are_those_of_the_arithmetic_at_the_measured_rate(configure, monkeypatch):
    monkeypatch.setattr(module, "product_rate", lambda *_, **__: 1e6)
    config = configure({"data.batch_size": 16, "train.steps": 10, "train.eval_every": 6})
    needs = dry_run(config, silent)
    images, macs = 16, 64 * 10  # forward, and backward for the weights only
    step = 2 * 2 * images * macs
    run = 10 * step + 2 * 2 * 360 * macs
    assert needs["FLOPs per step"].startswith(f"{step:.3g} ")
    assert needs["time per step"].startswith(f"at least {step / 1e3:.3g} ms")
    assert needs["time of the run"].startswith(f"at least {run / 1e6:.3g} s for 10 steps and 2 ev")


@pytest.mark.usefixtures("regression")
def test_nothing_is_computed_but_the_rate_of_the_device(configure, monkeypatch):
    monkeypatch.setattr(module, "product_rate", lambda *_, **__: 1e9)
    before = set(map(id, jax.live_arrays()))
    dry_run(configure({"data.batch_size": 24}), silent)
    images = [array for array in jax.live_arrays() if id(array) not in before and array.size > 1000]
    assert not images


@pytest.mark.parametrize(("seconds", "text"), [(7200, "2 h"), (90, "1.5 min"), (3e-3, "3 ms")])
def test_durations_have_a_readable_unit(seconds, text):
    assert module.duration(seconds) == text


def refusal(capsys, *typed):
    assert main(["train", "--config=configs/quickstart.py", *typed]) == 2
    return capsys.readouterr().err


def test_the_command_prints_what_a_run_needs_and_makes_no_folder(
    regression, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(module, "product_rate", lambda *_, **__: 1e9)
    monkeypatch.setattr("resjax.xla.compilation_cache.enable_compilation_cache", lambda: None)
    folder = tmp_path / "run"
    typed = ["train", "--config=configs/quickstart.py", "--dry-run", f"--workdir={folder}"]
    assert main(typed) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:20].rstrip() for line in lines[-5:]] == [
        *("memory per device", "largest batch", "FLOPs per step", "time per step"),
        "time of the run",
    ]
    assert not folder.exists()


@pytest.mark.parametrize("name", ["tpu:v5e:2x2", ""])
def test_a_topology_without_a_dry_run_is_refused(capsys, tmp_path, name):
    typed = (f"--workdir={tmp_path}", f"--topology={name}")
    assert "needs --dry-run" in refusal(capsys, *typed)


def test_a_dry_run_joins_no_other_processes(capsys):
    assert "leave out --distributed" in refusal(capsys, "--dry-run", "--distributed")


@pytest.mark.parametrize("name", ["tpu:x", ""])
def test_an_unknown_topology_is_refused_with_examples(capsys, name):
    refused = refusal(capsys, "--dry-run", f"--topology={name}")
    assert "known are, for example, tpu:v5e:2x2" in refused
