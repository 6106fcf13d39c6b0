"""A device that is not there is one line that says what is missing and what to type."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from resjax.errors import UserError
from resjax.xla.devices import require_devices

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.py"


@pytest.fixture
def failing(monkeypatch):
    """Makes JAX fail on these platforms, as it does without them."""

    def fail(platforms, error):
        def devices():
            raise error

        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        monkeypatch.setattr(jax, "devices", devices)
        with pytest.raises(UserError) as raised:
            require_devices()
        return str(raised.value)

    return fail


def test_jax_on_what_is_there_starts():
    require_devices()


@pytest.mark.parametrize(
    ("platforms", "hint"),
    [
        ("cuda", 'install its plugin: pip install ".[cuda]"'),
        ("gpu", 'install its plugin: pip install ".[cuda]"'),
        ("tpu", 'install its plugin: pip install ".[tpu]"'),
        ("cdua", "did you mean cuda?"),
        ("metal", "known: cpu, cuda, tpu"),
    ],
)
def test_a_platform_without_its_plugin_is_told_what_to_install(
    failing, monkeypatch, platforms, hint
):
    monkeypatch.setattr("resjax.xla.devices.find_spec", lambda _: None)
    message = failing(platforms, AssertionError())
    assert message == (
        f"JAX does not start with JAX_PLATFORMS={platforms}: {hint}; "
        "unset JAX_PLATFORMS to use what JAX finds"
    )


def test_a_plugin_that_finds_no_gpu_says_what_it_says_and_which_driver_it_needs(
    failing, monkeypatch
):
    monkeypatch.setattr("resjax.xla.devices.find_spec", lambda _: importlib.util.find_spec("jax"))
    error = RuntimeError(
        "Unable to initialize backend 'cuda': no supported devices\nfound for platform CUDA "
        "(set JAX_PLATFORMS='' to automatically choose an available backend)"
    )
    message = failing("cuda,tpu", error)
    assert "no supported devices found for platform CUDA; `nvidia-smi` shows" in message
    assert "driver 580 or later; no TPU answers" in message
    assert "choose an available backend" not in message


def test_a_command_on_a_platform_that_is_not_there_is_one_line(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "resjax", "train", f"--config={CONFIG}", f"--workdir={tmp_path}"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cdua"},
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("resjax: error: JAX does not start with JAX_PLATFORMS=cdua: ")
    assert ended.stderr.count("\n") == 1
