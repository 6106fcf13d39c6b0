"""Estimates how long a device computes, before anything runs.

An estimate depends on the config and the device alone, so a run is divided in the same way whenever
it is launched.
"""

from resjax.machine import threads
from resjax.xla.target import platform

SECONDS_AT_ONCE = 4.0  # estimated time of the work that a device gets at once, if it is divisible
# Operations per second of a CPU core. On an AMD EPYC with AVX-512 training does 6e10 (width 8) to
# 13e10 (ResNet-50), and other CPUs are slower. Problem: each dispatch allocates its memory anew,
# which costs ResNet-56 about a third of its speed if every step is dispatched alone.
CORE_FLOPS = 5e10
ACCELERATOR_FLOPS = 1e12  # a lower bound for accelerators in use today
LAYER_SECONDS = 7e-5  # of a layer so small that its operations take no time


def forward_seconds(images: int, macs: int, depth: int, devices: int) -> float:
    """Returns the time of a forward pass; a backward pass takes twice as long.

    Args:
      images: on all devices.
      macs: multiply-adds per image.
      depth: number of layers.
      devices: number of accelerators; CPU devices share the cores.
    """
    rate = devices * ACCELERATOR_FLOPS
    if platform() == "cpu":
        rate = threads() * CORE_FLOPS
    return max(2 * macs * images / rate, depth * LAYER_SECONDS)
