"""Explains why JAX does not start on the devices that JAX_PLATFORMS names."""

import difflib
import os
from importlib.util import find_spec

from resjax.errors import UserError

EXTRAS = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}
PLUGINS = {"cuda": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "tpu": ("libtpu",)}


def require_devices() -> None:
    """Starts JAX.

    Raises:
      UserError: it does not start; says what is missing and what to type.
    """
    import jax

    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # without a GPU, JAX fails an assertion
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).partition(" (set JAX_PLATFORMS")[0].split()).rstrip(".")
        hints = [_hint(name) for name in platforms.split(",") if name]
        parts = [reason, *hints, "unset JAX_PLATFORMS to use what JAX finds"]
        text = "; ".join(filter(None, parts))
        raise UserError(f"JAX does not start with JAX_PLATFORMS={platforms}: {text}") from error


def _hint(platform: str) -> str:
    if platform not in EXTRAS:
        close = difflib.get_close_matches(platform, ["cpu", *EXTRAS], 1, 0.4)
        return f"did you mean {close[0]}?" if close else "known: cpu, cuda, tpu"
    extra = EXTRAS[platform]
    if not any(map(_installed, PLUGINS[extra])):
        return f'install its plugin: pip install ".[{extra}]"'
    if extra == "tpu":
        return "no TPU answers on this machine"
    return "`nvidia-smi` shows GPUs and driver; CUDA 13 needs driver 580 or later"


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that contains it
        return False
