"""XLA compile options for programs that run once and for programs that run many times."""

import os
from pathlib import Path
from typing import Any

import jax

from resjax.machine import available_cores


def quick_compile() -> dict[str, Any] | None:
    """Options of `jax.jit` for what runs once, such as drawing weights: less time to compile.

    On CPU the random numbers of a few dozen kernels take several seconds to compile, and a sixth of
    that unoptimised.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, **_code_generation()}


def step_compile() -> dict[str, Any] | None:
    """Options of `jax.jit` for what has these networks' convolutions and runs many times.

    On CPU LLVM's costlier passes are a sixth of the time to compile, and no faster step comes of
    them. Convolutions there are YNNPACK's unless one asks for XLA's own. Those of jax 0.10 keep to
    one thread within a loop, and a step of ResNet-20 is a fifth shorter without them on two cores,
    a tenth longer on one; from jax 0.11 on it is as long, and narrower ones are a tenth shorter.
    """
    if jax.default_backend() != "cpu":
        return None
    options = {
        "xla_backend_optimization_level": 1,
        "xla_llvm_disable_expensive_passes": True,
        **_code_generation(),
    }
    if OLD_JAX and available_cores() == 1:
        return options
    # A choice of one excludes the others: sums stay with YNNPACK.
    return options | {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


OLD_JAX = jax.__version_info__ < (0, 11)


def _code_generation() -> dict[str, Any]:
    """How XLA's CPU compiler hands a program to LLVM: in as many parts as there are cores.

    With jax 0.10 every operation as such and not each fused loop by a compiler of its own: scanned
    networks then compile in four fifths of the time and run as fast. Unrolled ones of 110 layers
    take twice as long to compile, but scanned is what they are here. jax 0.12 has no such choice.
    """
    parts = {"xla_cpu_parallel_codegen_split_count": min(32, available_cores())}
    return parts | ({"xla_cpu_use_fusion_emitters": False} if OLD_JAX else {})


def enable_compilation_cache(folder: Path) -> None:
    """Caches compiled programs in `folder`, for later processes on this machine.

    The folder belongs to the work and not to the user's home, because hosts with other processors
    may share that. A folder that the user has set stays.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
