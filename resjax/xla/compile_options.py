"""XLA's compile options on CPU: for programs that run once, and for training steps.

Effects were measured on 2 cores with jax 0.10 and 0.12. On accelerators XLA's defaults stay. The
options change results in their last digits, so they depend on nothing but `machine.threads()`,
which a run keeps when it is resumed.
"""

from typing import Any

import jax

from resjax.machine import threads
from resjax.xla.target import described_target, platform

OLD_JAX = jax.__version_info__ < (0, 11)


def quick_compile() -> dict[str, Any] | None:
    """Returns options of `jax.jit` for a program that runs once, such as drawing weights.

    Problem: random numbers for a few dozen kernels take several seconds to compile.
    Effect: without optimization they take a sixth of that.

    Problem (jax 0.10): fused loops go through a compiler of their own. Effect without it: small
    programs compile in half of the time. Their transposes are six times slower, so training steps
    keep it. Later versions have no such option.
    """
    if platform() != "cpu":
        return None
    options = {"xla_backend_optimization_level": 0, **_parallel_compile()}
    return options | ({"xla_cpu_use_fusion_emitters": False} if OLD_JAX else {})


def step_compile() -> dict[str, Any] | None:
    """Returns options of `jax.jit` for a program that runs convolutions many times.

    Problem: LLVM's expensive passes take a sixth of the compile time. Effect without them: no step
    is slower.

    Problem: XLA hands convolutions to YNNPACK, whose convolutions use one thread inside a loop (jax
    0.10). Effect of XLA's own: a step of ResNet-20 is a fifth faster on two cores and a tenth
    slower on one, where YNNPACK stays. From jax 0.11 on ResNet-20 is as fast with either, and
    narrower networks are a tenth faster with XLA's. Only sums stay with YNNPACK; without them a
    step of ResNet-20 is a sixth slower, and the sums are less exact.

    Problem: such a sum drops NaN if a maximum with a constant precedes it (jax 0.10), also with
    XLA's default options. So networks have no such maximum: see `resjax.models.activation.relu`.
    """
    if platform() != "cpu":
        target = described_target()
        if platform() == "tpu" or target is None or target.present:
            return None
        return {"xla_gpu_autotune_level": 0}  # which needs a GPU to measure kernels on
    options = {
        "xla_backend_optimization_level": 1,
        "xla_llvm_disable_expensive_passes": True,
        **_parallel_compile(),
    }
    if OLD_JAX and threads() == 1:
        return options
    # The option lists what YNNPACK may run: sums alone.
    return options | {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


def _parallel_compile() -> dict[str, Any]:
    """Returns in how many parts XLA hands a program to LLVM: as many as there are cores."""
    return {"xla_cpu_parallel_codegen_split_count": min(32, threads())}
